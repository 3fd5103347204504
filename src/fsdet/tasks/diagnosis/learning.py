# SPDX-License-Identifier: AGPL-3.0-or-later
"""Does what is learnt fit what is judged: validation, labels, a rate that is too low."""

from collections.abc import Iterable
from statistics import fmean

from fsdet.engine.history import Row
from fsdet.tasks.diagnosis.finding import (
    FEW,
    FEW_VALIDATIONS,
    FOUND,
    LEARNT,
    NAMED_RIGHT,
    STEADY,
    STILL,
    SYMPTOMS,
    Finding,
    Run,
    drift,
    is_number,
    tiny_rate,
)

PAIRWISE = {"supcon", "cpe", "triplet"}  # losses that may stay where they are in a run that learns


def validation(run: Run) -> Iterable[Finding]:
    """A fall of the validation that the training does not show, or does."""
    rows = [row for row in run.history.rows.get("val", []) if is_number(row.get("val/fitness"))]
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
    """Boxes are found and classes are not, although the training losses fell: the two splits name things differently.

    Classes are learnt after boxes, so it is told of a run that ended, or when the classes have stopped to catch up.
    """
    rows = [row for row in run.history.rows.get("val", []) if is_number(row.get("val/base/AP50_boxes"))]
    shares = [row["val/base/AP50"] / max(row["val/base/AP50_boxes"], 1e-9) for row in rows]
    cls = run.values("cls")
    if len(rows) < FEW_VALIDATIONS or len(cls) < FEW or run.rejected or drift(cls) > LEARNT:
        return
    boxes, named, stuck = rows[-1]["val/base/AP50_boxes"], rows[-1]["val/base/AP50"], shares[-1] <= max(shares[-3:-1])
    if boxes > FOUND and shares[-1] < NAMED_RIGHT and (run.history.finished or stuck):
        yield Finding(
            "label_slip",
            "objects are found and their classes are wrong, although the training loss fell: labels differ by split",
            f"val/base/AP50 {named:.3g} with classes, {boxes:.3g} without; training cls {cls[0]:.4g} -> {cls[-1]:.4g}",
            (f"compare the order of class names between the splits: `{run.check}`, labels.png, episodes/*.jpg",
             "a class id shifted by one, or names in another order, is the usual slip; draw some training labels"),
        )  # fmt: skip


def too_slow(run: Run) -> Iterable[Finding]:
    """Nothing moves although everything may."""
    if len(run.warm) < FEW or run.rejected or not run.fresh:
        return
    names = sorted({name for row in run.committed for name in row["raw"]} - PAIRWISE)
    changes = {name: drift(values) for name in names if len(values := run.values(name)) >= FEW}
    if changes and all(abs(c - 1) < STILL for c in changes.values()):
        seen = ", ".join(f"{name} x{c:.3f}" for name, c in changes.items())
        o = run.config.optim
        yield Finding("lr_too_low", "the losses hardly move: the steps are too short", f"{seen} over the run",
                      (f"raise optim.lr: {o.lr:g} -> {10 * o.lr:g}", "check that optim.warmup_epochs is not the run"),
                      SYMPTOMS if tiny_rate(run) else ())  # fmt: skip
