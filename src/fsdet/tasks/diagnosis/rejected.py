# SPDX-License-Identifier: AGPL-3.0-or-later
"""Was anything rejected, and when: at once, early, late, now and then, or only in half precision."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from fsdet.command import typed
from fsdet.engine.checkpoint import in_run
from fsdet.engine.history import Row
from fsdet.tasks.diagnosis.finding import GREW, NAMED, SHARE, SYMPTOMS, Finding, Run, explosions, slower


def rejections(run: Run) -> Iterable[Finding]:
    """One finding for why steps were rejected, by the first question of the tree: at once, early, later, sometimes."""
    if not run.rejected:
        return
    counts = Counter(row["outcome"] for row in run.rejected)
    each = ", ".join(f"{name} {n}" for name, n in counts.items())
    why = f"{each}; {_when(run)}; culprit: {run.rejected[0].get('culprit')}"
    if counts.keys() == {"no_grad"}:
        yield Finding("nothing_trains", "no parameter that trains receives a gradient", why,
                      ("look at stage.freeze: a part that a loss reaches has to train",
                       "set a loss weight above 0"), ("frozen_head",))  # fmt: skip
    elif run.fp16 and counts["bad_loss"] and _only_in_half(run):
        yield Finding("fp16_overflow", "activations are too large for half precision", why,
                      ("set run.precision=bf16, or fp32 where the device has no bf16",
                       f"if it has to be fp16, find what grows: `{run.replay}` names the module"),
                      ("loss_scale_collapse", *SYMPTOMS))  # fmt: skip
    elif scale_fell(run):
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
    init = run.config.stage.init_from
    begun = f": `{typed('fsdet info {}', in_run(init))}`, or without stage.init_from" if init else ""
    return Finding(
        "nan_at_start",
        "not finite before any step was taken, so neither the learning rate nor clipping can be the reason",
        why + named,
        (f"look at the weights the run starts from{begun}",
         f"replay the batch: `{run.replay}` names the first module that is not finite",
         f"read the files and labels: `{run.check}`"),
    )  # fmt: skip


def _bad_images(run: Run, images: Sequence[str], why: str) -> Finding:
    named = ", ".join(images[:NAMED])
    return Finding(
        "nan_sometimes",
        "the same images are in the rejected batches, and the steps between are sound: it is the data",
        f"{why}; images: {named}",
        (f"look at {named} and its labels: `{run.check}` reads every file",
         "leave the image out, or mend it; the learning rate is not the reason"),
    )  # fmt: skip


def _too_fast(run: Run, why: str) -> Finding:
    last = run.committed[-1]
    grown = f"norm {last['grad_l2_preclip']:.4g}, total loss {last['total']:.4g} in the last logged step before it"
    return Finding("lr_too_high", "it grew before it broke: the steps are too long", f"{why}; {grown}",
                   (*slower(run), "go on from a checkpoint of before, with the lower rate"),
                   SYMPTOMS)  # fmt: skip


def _later(run: Run, why: str) -> Finding:
    if run.broke and run.rejected[0]["epoch"] <= 1:
        return Finding(
            "nan_in_epoch_1",
            "it broke in the first epoch, and nothing that was logged before had grown",
            why,
            (*slower(run), "lengthen optim.warmup_epochs",
             f"if it breaks at the same place then, it is the data or a loss: `{run.replay}` names it",
             "log.every=1 shows the last steps before it"),
            SYMPTOMS,
        )  # fmt: skip
    if run.broke:
        return Finding(
            "nan_late",
            "from one step to the next nothing was finite any more, and nothing had grown before: "
            "a weight or a buffer is broken, or the loss has a place where it is not defined",
            why,
            (f"resume from the last checkpoint, `{run.resume}`: it is sound, checkpoints with NaN are refused",
             f"if it breaks there again, replay: `{run.replay}` names loss, parameter and module",
             "code of your own that writes into weights or buffers is the next suspect"),
        )  # fmt: skip
    return Finding(
        "nan_sometimes",
        "now and then a batch is not finite, and the steps between are sound: look at its images before the rate",
        why,
        (f"look at the named images; replay one: `{run.replay}`",
         "if the replay is finite, precision was the reason: run.precision=fp32"),
    )  # fmt: skip


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
    evidence = incident(path).get("evidence")
    return evidence.get("cause") if isinstance(evidence, dict) else None


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
    return grown or any(row["batch"] >= before[-1]["batch"] for row in told) or bool(explosions(run, before))


def scale_fell(run: Run) -> bool:
    lowest = min((row["loss_scale"] for row in run.history.steps), default=1.0)
    return run.fp16 and lowest < run.config.guard.min_scale


def loss_scale(run: Run) -> Iterable[Finding]:
    if scale_fell(run):
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


def incident(path: Path) -> Row:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def culprit_of(path: Path) -> str:
    """An incident in one line."""
    content = incident(path)
    if not content:
        return "unreadable"
    images = ", ".join(map(str, content.get("image_ids", [])[:NAMED]))
    return f"{content.get('culprit') or content.get('outcome')}; images {images or '-'}"
