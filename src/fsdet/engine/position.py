# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where a run is, in plain values, all of which go into its checkpoints."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fsdet.engine.records import Cut
from fsdet.engine.schedule import PLATEAU_PATIENCE
from fsdet.types import StepReport

REMEMBERED = 10_000  # rejected batches that a rewind can leave out


@dataclass
class Position:
    """`batch` counts consumed micro-batches, those of rejected steps and those that are skipped too.

    epochs_told: epochs with a row in results.csv. evaluated: evaluation intervals done; evaluated_batch: the batch of
    the last evaluation. stale: evaluations since the best one or the last LR drop. sums, committed: of this epoch.
    parts: into how many each batch is cut since the whole did not fit into memory.
    told_batch: the batch of the last row in results.csv. rejected: indices of the batches of rejected steps.
    rewinds: each return to a checkpoint, as its row tells it. rows, table: rows of metrics.jsonl and results.csv.
    renumbered: earlier batches were counted in epochs of another length.
    """

    batch: int = 0
    parts: int = 1
    probed: bool = False
    epochs_told: int = 0
    evaluated: int = 0
    evaluated_batch: int = -1
    best: float | None = None
    best_step: int = 0
    stale: int = 0
    drops: int = 0
    finished: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)
    committed: int = 0
    rejected: list[int] = field(default_factory=list)
    rewinds: list[dict[str, Any]] = field(default_factory=list)
    told_batch: int = -1
    rows: int | None = None
    table: int | None = None
    renumbered: bool = False

    @property
    def cut(self) -> Cut:
        """Which rows of the log are there when a run goes on from here."""
        return Cut(None if self.renumbered else self.batch, self.rewinds, self.rows, self.table)

    @property
    def skipped(self) -> frozenset[int]:
        """Indices of the batches that are left out, because rewinds found them to blame."""
        return frozenset(index for rewind in self.rewinds for index in rewind["skipped"])

    def left(self, end: int) -> int:
        """Batches to take before index `end`."""
        return end - self.batch - sum(self.batch <= index < end for index in self.skipped)

    def after(self, count: int) -> int:
        """`batch` once `count` more are taken; it never rests on one that is skipped."""
        batch, skipped = self.batch, self.skipped
        while count or batch in skipped:
            count -= batch not in skipped
            batch += 1
        return batch

    def carry_over(self, before: int, now: int) -> None:
        """Be as far into the same epoch when one has `now` batches, not `before`; indices then mean other batches."""
        whole, rest = divmod(self.batch, before)
        self.batch = whole * now + rest * now // before
        self.evaluated_batch, self.rejected, self.renumbered = -1, [], True
        self.rewinds = [{**rewind, "skipped": []} for rewind in self.rewinds]

    def reject(self, indices: Sequence[int]) -> None:
        """Remember the batches of a rejected step."""
        self.rejected = [*self.rejected, *indices][-REMEMBERED:]

    def add(self, report: StepReport) -> None:
        """Count a committed step into the epoch's means."""
        values = {f"train/{k}_loss": v for k, v in report.raw.items()}
        values |= {"train/total_loss": report.total, "train/grad_norm": report.grad_l2_preclip}
        self.sums = {k: self.sums.get(k, 0.0) + v for k, v in values.items()}
        self.committed += 1

    def close_epoch(self, epoch: int) -> dict[str, float]:
        """Means over the epoch's committed steps (empty when all were rejected); the next epoch starts at zero."""
        means = {k: v / self.committed for k, v in self.sums.items()}
        self.epochs_told, self.told_batch, self.sums, self.committed = epoch, self.batch, {}, 0
        return means

    def rank(self, value: float, step: int) -> bool:
        """Whether an evaluation is the best so far; the first always is. Counts what the plateau schedule needs."""
        unknown = self.best is None or math.isnan(self.best)
        if self.best is None or value > self.best or (unknown and not math.isnan(value)):
            self.best, self.best_step, self.stale = value, step, 0
            return True
        self.stale += 1
        if self.stale >= PLATEAU_PATIENCE:
            self.stale, self.drops = 0, self.drops + 1
        return False
