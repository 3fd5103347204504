# SPDX-License-Identifier: AGPL-3.0-or-later
"""A finding, a run as the rules ask it, and what several rules share."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean, median

from fsdet.command import checking, typed
from fsdet.config import Config
from fsdet.engine.history import History, Row

FEW = 8  # logged steps below which a trend is no trend
SHARE = 0.75  # of the rejected batches that hold an image, from which it is the suspect
GROWTH = 1.5  # last losses over the first ones: diverging
CLIMB = 2.0  # the last losses over the lowest ones, a few rows each: it learnt, and unlearns
GREW = 5.0  # norm or loss before a rejection over its median: it was coming
STILL = 0.15  # share by which a loss moved from its first to its last third: not learning
SHOT_UP = 10.0  # a loss over the first one: no batch is that different
LEARNT = 0.8  # of its first third that a loss fell to: it does learn
NOTHING = 0.02  # a box loss, raw, that asks for nothing
CONSTANT = 1e-4  # relative spread of a loss whose gradient is dead
FEW_VALIDATIONS = 4  # below which a validation is no trend
FOUND = 0.3  # AP50 of boxes whatever their class, from which a detector finds things
NAMED_RIGHT = 0.5  # AP50 with classes over the one without, below which most things have a wrong name
STEADY = 1.2  # training loss after a validation drop over the one before: the training did not notice
HEAVY = 10.0  # median of norm before over norm after clipping, from which clipping holds a run back by itself
LOW_LR = {"sgd": 1e-4, "adamw": 1e-6, "muon": 1e-4}  # rates below these move nothing within a run
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
    def check(self) -> str:
        """The command that reads the run's data."""
        return checking(self.config.data.path or "DATA", self.config.task)  # a run without data names a placeholder

    @cached_property
    def probe(self) -> str:
        """The command that looks at the run's first batch."""
        return typed("fsdet probe {}", self.history.folder / "config.yaml")

    @cached_property
    def resume(self) -> str:
        """The command that goes on from the run's last checkpoint."""
        return typed("fsdet train --resume {}", self.history.folder)

    @cached_property
    def replay(self) -> str:
        """The command that runs a rejected batch of the run again: the first that was kept."""
        kept = [path.parent for path in self.history.incidents]
        return typed("fsdet probe --incident {}", kept[0] if kept else self.history.folder / "incidents/step_N")

    @cached_property
    def committed(self) -> list[Row]:
        return [row for row in self.history.committed if is_number(row["total"])]

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
        return [value for value in found if is_number(value)]

    def change_of(self, values: Sequence[float]) -> float:
        """Mean of the last fifth over the mean of the first two."""
        count = max(2, len(values) // 5)
        return fmean(values[-count:]) / max(fmean(values[:2]), 1e-12)


def drift(values: Sequence[float]) -> float:
    """Median of the last third over that of the first."""
    third = max(1, len(values) // 3)
    return median(values[-third:]) / max(median(values[:third]), 1e-12)


def slower(run: Run) -> tuple[str, ...]:
    o = run.config.optim
    out = [f"lower optim.lr: {o.lr:g} -> {o.lr / 10:g} (ten times) and look whether it falls"]
    if not o.warmup_epochs:
        out.append("set optim.warmup_epochs: 1 or more")
    if o.clip_norm == 0:
        out.append("set optim.clip_norm: 10, nothing bounds a step now")
    return tuple(out)


def explosions(run: Run, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["grad_l2_preclip"] > run.config.guard.norm_explosion]


def tiny_rate(run: Run) -> bool:
    return run.config.optim.lr < LOW_LR[run.config.optim.name]


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def rounded(value: float) -> str:
    """Two significant digits."""
    return f"{float(f'{value:.1e}'):g}"
