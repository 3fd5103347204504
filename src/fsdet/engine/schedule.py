# SPDX-License-Identifier: AGPL-3.0-or-later
"""Learning rate, clip norm and freezing as pure functions of the committed step or the epoch.

Nothing here holds state, so a resumed run is on schedule by construction.
"""

import math
from collections.abc import Mapping, Sequence

PLATEAU_FACTOR = 0.5  # LR multiplier of each drop
PLATEAU_PATIENCE = 3  # evaluations without improvement before a drop
GROWTH_LEAST, GROWTH_MOST = 20, 200  # steps between two doublings of the loss scale
KINDS = ("cosine", "linear", "restarts", "plateau", "constant")


def lr_factor(
    step: int,
    total_steps: int,
    warmup_steps: int,
    kind: str,
    min_ratio: float = 0.0,
    *,
    restarts: int = 3,
    drops: int = 0,
) -> float:
    """Multiplier of the base LR for the next step.

    Args:
        step: committed optimizer steps so far, from 0; rejected steps do not count.
        total_steps: committed steps of the whole run. warmup_steps: linear ramp, whose first value is 1 / warmup_steps.
        kind: cosine (Loshchilov & Hutter 2017), linear (as Ultralytics), restarts (cosine cycles), plateau, constant.
        min_ratio: lowest multiplier, min_lr / lr. drops: LR drops so far, read by `plateau` only.
    Returns:
        a factor in (0, 1] when min_ratio is 0; never 0 before the end of the schedule.
    """
    if kind not in KINDS:
        raise ValueError(f"lr_factor expects kind in {KINDS}, got {kind!r}")
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    low = min(min_ratio, 1.0)
    if kind == "constant":
        return 1.0
    if kind == "plateau":
        return max(PLATEAU_FACTOR**drops, low)
    progress = min((step - warmup_steps) / max(1, total_steps - warmup_steps), 1.0)
    if kind == "restarts" and progress < 1.0:
        progress = progress * restarts % 1.0
    shape = 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return low + (1.0 - low) * shape


def clip_norm_at(epoch: int, spec: float | Mapping[int, float]) -> float:
    """Clip norm of `epoch` (counted from 1): the entry of the latest key not after it, else the first; 0 means none."""
    if not isinstance(spec, Mapping):
        return float(spec)
    reached = [key for key in spec if key <= epoch]
    return float(spec[max(reached) if reached else min(spec)])


def frozen_at(epoch: int, spec: Sequence[str] | Mapping[int, Sequence[str]]) -> tuple[str, ...]:
    """Prefixes frozen in `epoch` (counted from 1): a list holds throughout, a mapping's entry from its epoch on."""
    if not isinstance(spec, Mapping):
        return tuple(spec)
    reached = [key for key in spec if key <= epoch]
    return tuple(spec[max(reached)]) if reached else ()


def total_steps(epochs: float | None, steps: int | None, batches_per_epoch: int, accumulate: int) -> int:
    """Optimizer steps of a run: `steps` when set, else the windows of each epoch, its remainder being one too."""
    if steps is not None:
        return steps
    batches = total_batches(epochs, batches_per_epoch)
    whole, rest = divmod(batches, batches_per_epoch)
    return whole * math.ceil(batches_per_epoch / accumulate) + math.ceil(rest / accumulate)


def growth_interval(steps: int, asked: int | None) -> int:
    """Steps without overflow before fp16's loss scale doubles: `asked`, else so many that a short run sees it grow.

    torch's 2000 are more steps than a few-shot run has, so that its scale could only fall.
    """
    return asked or min(GROWTH_MOST, max(GROWTH_LEAST, steps // 10))


def total_batches(epochs: float | None, batches_per_epoch: int) -> int:
    """Micro-batches in `epochs`, at least one."""
    return max(1, round((epochs or 0) * batches_per_epoch))
