# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where a run is, in plain values, all of which go into its checkpoints."""

import math
from dataclasses import dataclass, field

from fsdet.engine.schedule import PLATEAU_PATIENCE
from fsdet.types import StepReport


@dataclass
class Position:
    """`batch` counts consumed micro-batches, those of rejected steps too.

    epochs_told: epochs with a row in results.csv. evaluated: evaluation intervals done; evaluated_batch: the batch of
    the last evaluation. parts: into how many each batch is cut since the whole did not fit into memory. stale:
    evaluations since the best one or the last LR drop. sums, committed: of this epoch.
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

    def add(self, report: StepReport) -> None:
        """Count a committed step into the epoch's means."""
        values = {f"train/{k}_loss": v for k, v in report.raw.items()}
        values |= {"train/total_loss": report.total, "train/grad_norm": report.grad_l2_preclip}
        self.sums = {k: self.sums.get(k, 0.0) + v for k, v in values.items()}
        self.committed += 1

    def close_epoch(self, epoch: int) -> dict[str, float]:
        """Means over the epoch's committed steps (empty when all were rejected); the next epoch starts at zero."""
        means = {k: v / self.committed for k, v in self.sums.items()}
        self.epochs_told, self.sums, self.committed = epoch, {}, 0
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
