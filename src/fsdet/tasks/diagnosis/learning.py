# SPDX-License-Identifier: AGPL-3.0-or-later
"""Does what is learnt fit what is judged: validation, labels, a rate that is too low."""

import math
from collections.abc import Iterable
from statistics import fmean

from fsdet.engine.history import Row
from fsdet.tasks.diagnosis.finding import (
    BLIND,
    BLIND_TIMES,
    FEW,
    LEARNT,
    STEADY,
    STILL,
    SYMPTOMS,
    Finding,
    Run,
    is_number,
    tiny_rate,
)


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
    if changes and all(abs(c - 1) < STILL for c in changes.values()):
        seen = ", ".join(f"{name} x{c:.3f}" for name, c in changes.items())
        o = run.config.optim
        yield Finding("lr_too_low", "the losses hardly move: the steps are too short", f"{seen} over the run",
                      (f"raise optim.lr: {o.lr:g} -> {10 * o.lr:g}", "check that optim.warmup_epochs is not the run"),
                      SYMPTOMS if tiny_rate(run) else ())  # fmt: skip
