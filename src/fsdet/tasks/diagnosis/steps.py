# SPDX-License-Identifier: AGPL-3.0-or-later
"""Are the steps that were taken sound: losses, norms, clipping, gradients."""

from collections.abc import Iterable, Sequence
from statistics import fmean, median

from fsdet.engine.history import Row
from fsdet.tasks.diagnosis.finding import (
    CLIMB,
    CONSTANT,
    FEW,
    GROWTH,
    HEAVY,
    NOTHING,
    SHOT_UP,
    SYMPTOMS,
    Finding,
    Run,
    explosions,
    rounded,
    slower,
    tiny_rate,
)

HEADS = {"fewshot": "head", "classifier": "classifier", "maskrcnn": "box_head"}  # the part in which the losses end


def first_losses(run: Run) -> list[str]:
    """What the monitor said of losses far from their expected value on the first batch."""
    flags = (rows[0]["message"] for name, rows in run.history.flags().items() if name.startswith("first_"))
    return [text for text in flags if "its expected" in text]


def first_batch(run: Run) -> Iterable[Finding]:
    """Losses far above what an untrained model has to show."""
    high = [text for text in first_losses(run) if "above its expected" in text]
    if high:
        yield Finding("first_loss", "a loss starts far above its expected value", "; ".join(high),
                      (f"look at targets and initialisation: `{run.probe}`",
                       "weights from elsewhere? the first steps of a new part are best taken in warm-up"))  # fmt: skip


def diverging(run: Run) -> Iterable[Finding]:
    """Losses that rise where they should fall, or shot up on the way."""
    if len(run.warm) < FEW or run.rejected:
        return
    totals = [row["total"] for row in run.committed]
    change, loud = run.change_of(totals), explosions(run, run.warm)
    lowest = min(fmean(totals[i : i + FEW]) for i in range(len(totals) - FEW + 1))
    worse = change > GROWTH or fmean(totals[-FEW:]) > CLIMB * lowest
    if worse or len(loud) > 1 or max(totals) > SHOT_UP * totals[0]:
        seen = f"total loss {totals[0]:.4g} at first, {max(totals):.4g} at most, {totals[-1]:.4g} at last"
        if loud:
            seen += f"; {len(loud)} logged norms above {run.config.guard.norm_explosion:g}"
        yield Finding("lr_too_high", "the loss rises: the steps are too long", seen, slower(run),
                      SYMPTOMS)  # fmt: skip


def loud(run: Run) -> list[Row]:
    """Logged steps and flags of norms above the warning, in their order."""
    flags = [row for name in ("norm_warning", "norm_explosion") for row in run.history.flags().get(name, [])]
    rows = [row for row in run.committed if row["grad_l2_preclip"] > run.config.guard.norm_warning]
    return sorted((*flags, *rows), key=lambda row: row["step"])


def loud_when_warm(run: Run, rows: Sequence[Row]) -> bool:
    return not run.warm or rows[-1]["step"] >= run.warm[0]["step"]


def norms(run: Run) -> Iterable[Finding]:
    rows = loud(run)
    if rows and loud_when_warm(run, rows):
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
        (f"raise optim.clip_norm to about {rounded(2 * usual)}, twice the usual norm",
         "lower optim.lr instead if the loss is unsteady; do not do both at once"),
        () if tiny_rate(run) or median(ratios) < HEAVY else ("lr_too_low",),
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
             f"look for detach(), no_grad and frozen parts on its way: `{run.probe}` shows the norm per loss"),
            tuple(name for name in SYMPTOMS if name != "no_positives"),
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
                      ("lower loss.cpe_iou, .5 at least: proposals that overlap less do not count",
                       "set loss.weights.cpe=0 until boxes overlap that well"))  # fmt: skip


def frozen(run: Run) -> Iterable[Finding]:
    """A head that cannot learn: frozen by configuration, or with a learning rate of 0."""
    freeze, head = run.config.stage.freeze, HEADS[run.config.task]
    prefixes = {p for some in freeze.values() for p in some} if isinstance(freeze, dict) else set(freeze)
    named = sorted(p for p in prefixes if p.split(".")[0] == head)
    rates = [row["lr"].get(head) for row in run.warm]
    if named or (rates and not any(r is None or r > 0 for r in rates)):
        why = f"stage.freeze names {', '.join(named)}" if named else f"the learning rate of group {head} is 0"
        yield Finding("frozen_head", "the head does not train, and every loss ends there", why,
                      ("take the head out of stage.freeze; stages freeze backbone and neck",
                       f"check optim.lr_scale.{head} (--head-lr-multiplier) is above 0"),
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
