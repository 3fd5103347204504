# SPDX-License-Identifier: AGPL-3.0-or-later
"""What went wrong in a run and what to change, from its records alone.

Three questions in the order of a decision tree: was anything rejected, and when; are the steps that were taken sound;
does what is learnt fit what is judged. A finding that explains others leaves them out.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, median

from fsdet import config as configs
from fsdet.config import Config
from fsdet.engine.history import History, Row
from fsdet.errors import ConfigError

FEW = 8  # logged steps below which a trend is no trend
SHARE = 0.75  # of the rejected batches that hold an image, from which it is the suspect
GROWTH = 1.5  # last losses over the first ones: diverging
CLIMB = 2.0  # the last losses over the lowest ones, a few rows each: it learnt, and unlearns
GREW = 5.0  # norm or loss before a rejection over its median: it was coming
STILL = 0.02  # share of its first value by which a loss moved: not learning
LEARNT = 0.8  # of its first value that a box loss fell to: it does learn
NOTHING = 0.02  # a box loss, raw, that asks for nothing
CONSTANT = 1e-4  # relative spread of a loss whose gradient is dead
BLIND = 0.05  # validation AP50 of a detector that finds nothing
BLIND_TIMES = 4  # validations, all blind, before that says anything
STEADY = 1.2  # training loss after a validation drop over the one before: the training did not notice
NAMED = 4  # images named
SYMPTOMS = (  # what a deeper cause brings along
    "loss_jump", "norm_warning", "norm_explosion", "over_clipping", "dfl_high", "validation_drop", "poisoned_norm",
    "label_slip", "first_loss", "no_positives",
)  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """name: stable, for scripts. what: one sentence. why: the evidence. change: what to do, most likely first."""

    name: str
    what: str
    why: str
    change: tuple[str, ...]
    explains: tuple[str, ...] = ()  # names of findings that are its consequences

    def __str__(self) -> str:
        steps = "".join(f"\n  change: {text}" for text in self.change)
        return f"{self.name}: {self.what}\n  seen: {self.why}{steps}"


@dataclass(frozen=True)
class Run:
    """A history with what is asked of it again and again."""

    history: History
    config: Config

    @cached_property
    def committed(self) -> list[Row]:
        return [row for row in self.history.committed if _finite(row["total"])]

    @cached_property
    def rejected(self) -> list[Row]:
        return self.history.rejected

    @cached_property
    def warm(self) -> list[Row]:
        """Committed rows after the learning rate first stood at its highest."""
        rates = [max(row["lr"].values(), default=0.0) for row in self.committed]
        return self.committed[rates.index(max(rates)) + 1 :] if rates else []

    @cached_property
    def fp16(self) -> bool:
        return self.config.run.precision == "fp16" or any(row["loss_scale"] != 1 for row in self.history.steps)

    @cached_property
    def fresh(self) -> bool:
        """Started from random weights, so that losses have a way to fall."""
        return not self.config.stage.init_from

    @cached_property
    def broke(self) -> bool:
        """The run ends in rejections that no committed step interrupts: from there on nothing was learnt."""
        last = self.history.steps[-1] if self.history.steps else None
        return last in self.rejected and not self.history.finished and len(self.tail) > 1

    @cached_property
    def tail(self) -> list[Row]:
        """The rejected rows after the last committed step."""
        return [row for row in self.rejected if row["step"] == self.history.last_step]

    def values(self, name: str, rows: Sequence[Row] | None = None) -> list[float]:
        found = (row["raw"].get(name) for row in (self.committed if rows is None else rows))
        return [value for value in found if _finite(value)]

    def change_of(self, values: Sequence[float]) -> float:
        """Mean of the last fifth over the mean of the first two."""
        count = max(2, len(values) // 5)
        return fmean(values[-count:]) / max(fmean(values[:2]), 1e-12)


@dataclass(frozen=True)
class Diagnosis:
    """Findings, most likely cause first, and remarks that are no findings."""

    findings: tuple[Finding, ...]
    remarks: tuple[str, ...] = field(default=())


def diagnose(history: History) -> Diagnosis:
    """Everything the records of a run say against it."""
    settings, remarks = _settings(history.folder)
    run = Run(history, settings)
    found = [finding for rule in RULES for finding in rule(run)]
    explained = {name for finding in found for name in finding.explains}
    kept = tuple(f for f in found if f.name not in explained)
    return Diagnosis(kept, (*remarks, *_calibration(run), *_loud_warm_up(run), *_low_start(run), *_short(run)))


def _settings(folder: Path) -> tuple[Config, list[str]]:
    path = folder / "config.yaml"
    try:
        return configs.load(path if path.is_file() else None), []
    except ConfigError as error:
        first = str(error).splitlines()[0]
        return Config(), [f"config.yaml does not fit this version, thresholds are the defaults ({first})"]


def _calibration(run: Run) -> list[str]:
    count = run.history.outcomes["amp_backoff"]
    told = f"amp_backoff {count}: fp16 lowered its loss scale; some of these are how it finds it, and no error"
    return [told] if count else []


def _loud_warm_up(run: Run) -> list[str]:
    rows = _loud(run)
    if not rows or _loud_when_warm(run, rows):
        return []
    return [f"large gradient norms in warm-up only, first at step {rows[0]['step']}: clipping took them"]


def _low_start(run: Run) -> list[str]:
    """A first loss below its expected value harms nothing by itself."""
    low = [text for text in _first_losses(run) if "below its expected" in text]
    return [f"lower than an untrained model should show: {'; '.join(low)}"] if low else []


def _short(run: Run) -> list[str]:
    count = len(run.committed)
    return [f"only {count} logged steps: too few to judge a trend"] if 0 < count < FEW else []


# --- was anything rejected, and when -------------------------------------------------------------------------------


def rejections(run: Run) -> Iterable[Finding]:
    """One finding for why steps were rejected, by the first question of the tree: at once, early, later, sometimes."""
    if not run.rejected:
        return
    counts = Counter(row["outcome"] for row in run.rejected)
    why = f"{_counted(counts)}; {_when(run)}; culprit: {run.rejected[0].get('culprit')}"
    if counts.keys() == {"no_grad"}:
        yield Finding("nothing_trains", "no parameter that trains receives a gradient", why,
                      ("look at stage.freeze: a part that a loss reaches has to train",
                       "set a loss weight above 0"), ("frozen_head",))  # fmt: skip
    elif run.fp16 and counts["bad_loss"] and _only_in_half(run):
        yield Finding("fp16_overflow", "activations are too large for half precision", why,
                      ("set run.precision=bf16, or fp32 where the device has no bf16",
                       "if it has to be fp16, find what grows: `fsdet probe --incident DIR` names the module"),
                      ("loss_scale_collapse", *SYMPTOMS))  # fmt: skip
    elif _scale_fell(run):
        return  # told by loss_scale
    elif not run.committed:
        yield _at_start(run, why)
    elif suspects := _suspects(run.rejected):
        yield _bad_images(run, suspects, why)
    elif set(counts) == {"bad_input"}:
        yield _bad_images(run, run.rejected[0].get("image_ids", []), why)
    elif _was_coming(run):
        yield _too_fast(run, why)
    else:
        yield _later(run, why)


def _at_start(run: Run, why: str) -> Finding:
    bad = [row["name"] for row in run.history.first_probe() if not row["finite"]]
    named = f"; not finite on the first batch: {', '.join(bad)}" if bad else ""
    return Finding(
        "nan_at_start",
        "not finite before any step was taken, so neither the learning rate nor clipping can be the reason",
        why + named,
        ("look at the weights the run starts from: `fsdet info CHECKPOINT`, or without stage.init_from",
         "replay the batch: `fsdet probe --incident DIR` names the first module that is not finite",
         "read the files and labels: `fsdet data check DATA --deep`"),
    )  # fmt: skip


def _bad_images(run: Run, images: Sequence[str], why: str) -> Finding:
    named = ", ".join(images[:NAMED])
    return Finding(
        "nan_sometimes",
        "the same images are in the rejected batches, and the steps between are sound: it is the data",
        f"{why}; images: {named}",
        (f"look at {named} and its labels: `fsdet data check DATA --deep` reads every file",
         "leave the image out, or mend it; the learning rate is not the reason"),
    )  # fmt: skip


def _too_fast(run: Run, why: str) -> Finding:
    last = run.committed[-1]
    grown = f"norm {last['grad_l2_preclip']:.4g}, total loss {last['total']:.4g} in the last logged step before it"
    return Finding("lr_too_high", "it grew before it broke: the steps are too long", f"{why}; {grown}",
                   (*_slower(run), "go on from a checkpoint of before, with the lower rate"),
                   SYMPTOMS)  # fmt: skip


def _later(run: Run, why: str) -> Finding:
    if run.broke and run.rejected[0]["epoch"] <= 1:
        return Finding(
            "nan_in_epoch_1",
            "it broke in the first epoch, and nothing that was logged before had grown",
            why,
            (*_slower(run), "lengthen optim.warmup_epochs",
             "if it breaks at the same place then, it is the data or a loss: `fsdet probe --incident DIR` names it",
             "log.every=1 shows the last steps before it"),
            SYMPTOMS,
        )  # fmt: skip
    if run.broke:
        return Finding(
            "nan_late",
            "from one step to the next nothing was finite any more, and nothing had grown before: "
            "a weight or a buffer is broken, or the loss has a place where it is not defined",
            why,
            ("resume from the last checkpoint (`--resume`): it is sound, checkpoints with NaN are refused",
             "if it breaks there again, replay: `fsdet probe --incident DIR` names loss, parameter and module",
             "code of your own that writes into weights or buffers is the next suspect"),
        )  # fmt: skip
    return Finding(
        "nan_sometimes",
        "now and then a batch is not finite, and the steps between are sound: look at its images before the rate",
        why,
        ("look at the named images; replay one: `fsdet probe --incident DIR`",
         "if the replay is finite, precision was the reason: run.precision=fp32"),
    )  # fmt: skip


def _slower(run: Run) -> tuple[str, ...]:
    o = run.config.optim
    out = [f"lower optim.lr: {o.lr:g} -> {o.lr / 10:g} (ten times) and look whether it falls"]
    if not o.warmup_epochs:
        out.append("set optim.warmup_epochs: 1 or more")
    if o.clip_norm == 0:
        out.append("set optim.clip_norm: 10, nothing bounds a step now")
    return tuple(out)


def _when(run: Run) -> str:
    first, last = run.rejected[0], run.rejected[-1]
    if not run.committed:
        return "from the first batch on"
    if last["epoch"] <= 1:
        return f"all in epoch 1, after step {first['step']}"
    if run.broke and first in run.tail:
        return f"all from step {first['step']} on, epoch {first['epoch']:g}"
    return f"between steps {first['step']} and {last['step']}, epochs {first['epoch']:g} to {last['epoch']:g}"


def _suspects(rejected: Sequence[Row]) -> list[str]:
    """Images that most of at least two different rejected batches share."""
    batches = {row["batch"]: set(row.get("image_ids", ())) for row in rejected}
    if len(batches) < 2:
        return []
    counts = Counter(image for images in batches.values() for image in images)
    return [image for image, n in counts.most_common(NAMED) if n >= max(2, SHARE * len(batches))]


def _only_in_half(run: Run) -> bool:
    """The replay in float32 was sound, or named no module: half precision is what is left, not one image."""
    causes = {cause for path in run.history.incidents if (cause := _cause(path))}
    if causes:
        return "amp" in causes
    told = [str(row.get("culprit")) for row in run.rejected]
    return not _suspects(run.rejected) and not any("first in the output of" in t or "in float32 too" in t for t in told)


def _cause(path: Path) -> str | None:
    """What the replay of an incident found: amp, data, loss or backward; None where it does not say."""
    evidence = _incident(path).get("evidence")
    return evidence.get("cause") if isinstance(evidence, dict) else None


def _incident(path: Path) -> Row:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _was_coming(run: Run) -> bool:
    """Losses or norms grew in the last logged steps before the first rejection, or raised a flag."""
    first = run.rejected[0]
    before = [row for row in run.committed if row["batch"] < first["batch"]]
    if not before:
        return False
    usual = {key: median(row[key] for row in before) for key in ("total", "grad_l2_preclip")}
    grown = any(row[key] > GREW * value for row in before[-2:] for key, value in usual.items())
    flags = run.history.flags()
    told = [row for name in ("norm_warning", "norm_explosion", "loss_jump") for row in flags.get(name, [])]
    return grown or any(row["batch"] >= before[-1]["batch"] for row in told) or bool(_explosions(run, before))


def _explosions(run: Run, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["grad_l2_preclip"] > run.config.guard.norm_explosion]


def _scale_fell(run: Run) -> bool:
    lowest = min((row["loss_scale"] for row in run.history.steps), default=1.0)
    return run.fp16 and lowest < run.config.guard.min_scale


def loss_scale(run: Run) -> Iterable[Finding]:
    if _scale_fell(run):
        scales = [row["loss_scale"] for row in run.history.steps]
        backoffs = run.history.outcomes["amp_backoff"]
        yield Finding(
            "loss_scale_collapse",
            "the loss scale of fp16 fell below what it can work with: gradients overflow at any scale",
            f"from {max(scales):g} to {min(scales):g}, {backoffs} times lowered; limit {run.config.guard.min_scale:g}",
            ("set run.precision=bf16, or fp32 where the device has no bf16",
             "if fp32 breaks too, it is no matter of precision: read its report"),
            SYMPTOMS,
        )  # fmt: skip


# --- are the steps that were taken sound ---------------------------------------------------------------------------


def _first_losses(run: Run) -> list[str]:
    """What the monitor said of losses far from their expected value on the first batch."""
    flags = (rows[0]["message"] for name, rows in run.history.flags().items() if name.startswith("first_"))
    return [text for text in flags if "its expected" in text]


def first_batch(run: Run) -> Iterable[Finding]:
    """Losses far above what an untrained model has to show."""
    high = [text for text in _first_losses(run) if "above its expected" in text]
    if high:
        yield Finding("first_loss", "a loss starts far above its expected value", "; ".join(high),
                      ("look at targets and initialisation: `fsdet probe CONFIG`",
                       "weights from elsewhere? the first steps of a new part are best taken in warm-up"))  # fmt: skip


def diverging(run: Run) -> Iterable[Finding]:
    """Losses that rise where they should fall."""
    if len(run.warm) < FEW or run.rejected:
        return
    totals = [row["total"] for row in run.committed]
    change, loud = run.change_of(totals), _explosions(run, run.warm)
    lowest = min(fmean(totals[i : i + FEW]) for i in range(len(totals) - FEW + 1))
    worse = change > GROWTH or fmean(totals[-FEW:]) > CLIMB * lowest
    if worse or len(loud) > 1:
        seen = f"total loss {totals[0]:.4g} at first, {totals[-1]:.4g} at last, least {lowest:.4g} ({FEW} rows each)"
        if loud:
            seen += f"; {len(loud)} logged norms above {run.config.guard.norm_explosion:g}"
        yield Finding("lr_too_high", "the loss rises: the steps are too long", seen, _slower(run),
                      SYMPTOMS)  # fmt: skip


def _loud(run: Run) -> list[Row]:
    """Logged steps and flags of norms above the warning, in their order."""
    flags = [row for name in ("norm_warning", "norm_explosion") for row in run.history.flags().get(name, [])]
    rows = [row for row in run.committed if row["grad_l2_preclip"] > run.config.guard.norm_warning]
    return sorted((*flags, *rows), key=lambda row: row["step"])


def _loud_when_warm(run: Run, rows: Sequence[Row]) -> bool:
    return not run.warm or rows[-1]["step"] >= run.warm[0]["step"]


def norms(run: Run) -> Iterable[Finding]:
    rows = _loud(run)
    if rows and _loud_when_warm(run, rows):
        limits = run.config.guard
        worst = max((row.get("grad_l2_preclip", 0.0) for row in rows), default=0.0)
        exploded = worst > limits.norm_explosion or any(row.get("flag") == "norm_explosion" for row in rows)
        yield Finding("norm_explosion" if exploded else "norm_warning",
                      "gradient norms before clipping are far too large",
                      f"at {len(rows)} places, the last at step {rows[-1]['step']}; "
                      f"limits {limits.norm_warning:g} and {limits.norm_explosion:g}",
                      ("lower optim.lr or lengthen optim.warmup_epochs",
                       "look at which loss asks for it: log.probe_every=50"))  # fmt: skip


def over_clipping(run: Run) -> Iterable[Finding]:
    """More than half of the warm steps clipped, or one divided by more than the limit."""
    limits, rows = run.config.guard, run.warm
    if len(rows) < FEW:
        return
    ratios = [row["clip_ratio"] for row in rows]
    share = sum(r > 1 for r in ratios) / len(ratios)
    if share <= limits.clipped_share and max(ratios) <= limits.clip_ratio:
        return
    usual = median(row["grad_l2_preclip"] for row in rows)
    yield Finding(
        "over_clipping",
        "clipping, not the learning rate, sets the length of most steps",
        f"{share:.0%} of the logged steps after warm-up were clipped (limit {limits.clipped_share:.0%}), "
        f"the median one by {median(ratios):.3g}; median norm before clipping {usual:.4g}",
        (f"raise optim.clip_norm to about {_round(2 * usual)}, twice the usual norm",
         "lower optim.lr instead if the loss is unsteady; do not do both at once"),
        ("lr_too_low", "label_slip", "frozen_head"),
    )  # fmt: skip


def dead_gradient(run: Run) -> Iterable[Finding]:
    """A loss that has a value and a weight, and asks for nothing."""
    probed = {row["name"]: row for row in run.history.first_probe()}
    for name in sorted({name for row in run.committed for name in row["raw"]}):
        values = run.values(name)
        probe = probed.get(name, {})
        silent = probe.get("finite") and probe.get("norm") == 0.0 and probe.get("weighted", 0.0) != 0.0
        stuck = len(values) >= FEW and min(values) > 0 and max(values) / min(values) - 1 < CONSTANT
        if not (silent or stuck):
            continue
        word = "its gradient at the head is 0" if silent else f"it stays at {values[0]:.6g}"
        yield Finding(
            f"dead_{name}",
            f"{name}_loss has a value and no gradient: something between it and the weights cuts the graph",
            f"{word}; raw {values[0]:.5g} at first, {values[-1]:.5g} at last" if values else word,
            ("take out clamps on probabilities or on the loss: log_softmax is bounded by itself",
             "look for detach(), no_grad and frozen parts on its way: `fsdet probe CONFIG` shows the norm per loss"),
            SYMPTOMS,
        )  # fmt: skip


def dfl_high(run: Run) -> Iterable[Finding]:
    limit, values = run.config.guard.dfl_high, run.values("dfl", run.warm)
    if len(values) >= 2 and median(values) > limit:
        yield Finding("dfl_high", "the box bins are wrong with confidence",
                      f"dfl {median(values):.3g} after warm-up (mean over 4 sides; ln 16 = 2.77 knows nothing; "
                      f"limit {limit:g})",
                      ("boxes beyond reg_max strides? raise model.reg_max or model.levels",
                       "lower optim.lr; a clamp in the loss would only hide it"))  # fmt: skip


def no_positives(run: Run) -> Iterable[Finding]:
    """Box losses of 0 beside a living classification: no anchor answers for any box."""
    bbox, dfl, cls = (run.values(name, run.warm) for name in ("bbox", "dfl", "cls"))
    if len(bbox) >= FEW and len(dfl) >= FEW and median(bbox) < NOTHING > median(dfl) and median(cls) > NOTHING:
        yield Finding("no_positives", "the box losses are nothing: no anchor that answers for a box weighs anything",
                      f"after warm-up bbox {median(bbox):.2g}, dfl {median(dfl):.2g}, cls {median(cls):.3g}",
                      ("look at predicted boxes in episodes/*.jpg: they overlap no true one",
                       "look at the initialisation of the box branch, and at boxes larger than model.reg_max strides"),
                      ("dead_bbox", "dead_dfl", "label_slip"))  # fmt: skip


def cpe_zero(run: Run) -> Iterable[Finding]:
    values, weight = run.values("cpe", run.warm), run.config.loss.weights.cpe
    if weight and len(values) >= 2 and not any(values):
        yield Finding("cpe_zero", "CPE is exactly 0 after warm-up: no proposal contributes",
                      f"{len(values)} logged values, all 0; loss.cpe_iou {run.config.loss.cpe_iou:g}",
                      (f"lower loss.cpe_iou ({run.config.loss.cpe_iou:g}) to .5: proposals below it do not count",
                       "set loss.weights.cpe=0 until boxes overlap that well"))  # fmt: skip


def frozen(run: Run) -> Iterable[Finding]:
    """A head that cannot learn: frozen by configuration, or with a learning rate of 0."""
    freeze = run.config.stage.freeze
    prefixes = {p for some in freeze.values() for p in some} if isinstance(freeze, dict) else set(freeze)
    named = sorted(p for p in prefixes if p.split(".")[0] == "head")
    rates = [row["lr"].get("head") for row in run.warm]
    if named or (rates and not any(r is None or r > 0 for r in rates)):
        why = f"stage.freeze names {', '.join(named)}" if named else "the learning rate of group head is 0"
        yield Finding("frozen_head", "the head does not train, and every loss ends there", why,
                      ("take the head out of stage.freeze; stages freeze backbone and neck",
                       "check optim.lr_scale.head (--head-lr-multiplier) is above 0"),
                      ("lr_too_low", "label_slip"))  # fmt: skip


def loss_jump(run: Run) -> Iterable[Finding]:
    """A loss that leaps against what it was before."""
    totals = [row["total"] for row in run.committed]
    flags = run.history.flags().get("loss_jump", [])
    limit, places = run.config.guard.loss_jump, []
    for i in range(4, len(totals)):
        if totals[i] > limit * fmean(totals[max(0, i - 8) : i]):
            places.append(run.committed[i])
    if not places and not flags:
        return
    at = min(row["step"] for row in (*places, *flags))
    after = [row["total"] for row in run.committed if row["step"] > at]
    before = [row["total"] for row in run.committed if row["step"] < at]
    back = bool(after and before) and min(after[-2:]) < GROWTH * fmean(before[-3:])
    yield Finding(
        "loss_jump",
        f"the loss jumped at step {at}" + (", and came back" if back else ", and has not come back"),
        f"more than {limit:g}x its running mean"
        + (f"; {fmean(before[-3:]):.4g} before, {after[-1]:.4g} at last" if before and after else ""),
        ("what changed there? a part that thawed, a restart of the learning rate, a resume, other weights",
         "if nothing did, look at the batch: log.every=1 around it, or lower optim.lr"),
    )  # fmt: skip


# --- does what is learnt fit what is judged ------------------------------------------------------------------------


def validation(run: Run) -> Iterable[Finding]:
    """A fall of the validation that the training does not show, or does."""
    rows = [row for row in run.history.rows.get("val", []) if _finite(row.get("val/fitness"))]
    best, limit = 0.0, 1 - run.config.guard.validation_drop
    for before, row in zip([None, *rows], rows, strict=False):
        if best > 0 and row["val/fitness"] < limit * best:
            yield _drop(run, before, row, best)
            return
        best = max(best, row["val/fitness"])


def _drop(run: Run, before: Row, row: Row, best: float) -> Finding:
    old = [r["total"] for r in run.committed if r["step"] <= before["step"]]
    new = [r["total"] for r in run.committed if r["step"] > before["step"]]
    why = f"val/fitness {best:.4g} -> {row['val/fitness']:.4g} at step {row['step']}"
    if old and new and fmean(new[-3:]) < STEADY * fmean(old[-3:]):
        return Finding(
            "poisoned_norm",
            "validation fell and the training loss did not: what differs is BatchNorm, which uses its running "
            "statistics there (and the EMA, which copies them)",
            f"{why}; training loss {fmean(old[-3:]):.4g} -> {fmean(new[-3:]):.4g}",
            ("look for a huge or NaN running_mean or running_var in last.pt; go back to best.pt",
             "keep code of yours from running the model in train mode outside of the step",
             "with tiny or odd batches set stage.freeze_norm=true"),
            ("validation_drop",),
        )  # fmt: skip
    return Finding("validation_drop", "validation fell suddenly, and training got worse with it", why,
                   ("go back to best.pt and go on with a lower optim.lr",
                    "what changed there? augmentation, freezing, a restart of the learning rate"))  # fmt: skip


def labels(run: Run) -> Iterable[Finding]:
    """Boxes are learnt and classes are not, or nothing of what is learnt is found in validation."""
    if len(run.warm) < FEW or run.rejected or not run.fresh:
        return
    rows = run.history.rows.get("val", [])
    cls, dfl = run.values("cls"), run.values("dfl")
    if len(cls) < FEW or len(dfl) < FEW or run.change_of(dfl) > LEARNT:
        return
    ap50 = max((row.get("val/base/AP50") or 0.0 for row in rows), default=math.nan)
    if ap50 < BLIND and len(rows) >= BLIND_TIMES and run.change_of(cls) < LEARNT:
        yield Finding(
            "label_slip",
            "training learns, and validation finds nothing: the two do not mean the same by their labels",
            f"cls {cls[0]:.4g} -> {cls[-1]:.4g}, dfl {dfl[0]:.3g} -> {dfl[-1]:.3g}, best val/base/AP50 {ap50:.3g}",
            ("compare class order and box format of the splits: `fsdet data check DATA`, labels.png, episodes/*.jpg",
             "draw training boxes on their images: x and y swapped, or classes shifted by one, can be seen at once"),
        )  # fmt: skip


def too_slow(run: Run) -> Iterable[Finding]:
    """Nothing moves although everything may."""
    if len(run.warm) < FEW or run.rejected or not run.fresh:
        return
    names = sorted({name for row in run.committed for name in row["raw"]} & {"bbox", "cls", "dfl"})
    changes = {name: run.change_of(values) for name in names if len(values := run.values(name)) >= FEW}
    if changes and all(abs(c - 1) < 5 * STILL for c in changes.values()):
        seen = ", ".join(f"{name} x{c:.3f}" for name, c in changes.items())
        o = run.config.optim
        yield Finding("lr_too_low", "the losses hardly move: the steps are too short", f"{seen} over the run",
                      (f"raise optim.lr: {o.lr:g} -> {10 * o.lr:g}", "check that optim.warmup_epochs is not the run"),
                      ("label_slip",))  # fmt: skip


RULES: tuple[Callable[[Run], Iterable[Finding]], ...] = (
    rejections, loss_scale, frozen, dead_gradient, diverging, over_clipping, norms, dfl_high, no_positives, cpe_zero,
    loss_jump,
    validation, labels, too_slow, first_batch,
)  # fmt: skip


def culprit_of(path: Path) -> str:
    """An incident in one line."""
    content = _incident(path)
    if not content:
        return "unreadable"
    images = ", ".join(map(str, content.get("image_ids", [])[:NAMED]))
    return f"{content.get('culprit') or content.get('outcome')}; images {images or '-'}"


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} {n}" for name, n in counts.items())


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _round(value: float) -> str:
    """Two significant digits."""
    return f"{float(f'{value:.1e}'):g}"
