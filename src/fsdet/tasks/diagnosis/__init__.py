# SPDX-License-Identifier: AGPL-3.0-or-later
"""What went wrong in a run and what to change, from its records alone.

Three questions in the order of a decision tree: was anything rejected, and when; are the steps that were taken sound;
does what is learnt fit what is judged. A finding that explains others leaves them out.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fsdet import config as configs
from fsdet.config import Config
from fsdet.engine.checkpoint import candidates, damage
from fsdet.engine.history import History
from fsdet.errors import ConfigError, counted
from fsdet.tasks.diagnosis.finding import FEW, Finding, Run
from fsdet.tasks.diagnosis.learning import labels, too_slow, validation
from fsdet.tasks.diagnosis.rejected import culprit_of, loss_scale, rejections
from fsdet.tasks.diagnosis.steps import (
    cpe_zero,
    dead_gradient,
    dfl_high,
    diverging,
    first_batch,
    first_losses,
    frozen,
    loss_jump,
    loud,
    loud_when_warm,
    no_positives,
    norms,
    over_clipping,
)

__all__ = ["Diagnosis", "Finding", "culprit_of", "diagnose"]

RULES: tuple[Callable[[Run], Iterable[Finding]], ...] = (  # causes before what may be their consequence
    rejections, loss_scale, frozen, dead_gradient, diverging, no_positives, cpe_zero, validation, labels, too_slow,
    norms, dfl_high, loss_jump, over_clipping, first_batch,
)  # fmt: skip


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
    return Diagnosis(
        kept, (*remarks, *_damaged(run), *_rewinds(run), *_calibration(run), *_loud_warm_up(run), *_low_start(run),
               *_short(run))
    )  # fmt: skip


def _settings(folder: Path) -> tuple[Config, list[str]]:
    path = folder / "config.yaml"
    try:
        return configs.load(path if path.is_file() else None), []
    except ConfigError as error:
        first = str(error).splitlines()[0]
        return Config(), [f"config.yaml does not fit this version, thresholds are the defaults ({first})"]


def _damaged(run: Run) -> list[str]:
    """Checkpoints that are not as they were written, which says nothing of the training."""
    return [told for path in candidates(run.history.folder) if (told := damage(path))]


def _calibration(run: Run) -> list[str]:
    count = run.history.outcomes["amp_backoff"]
    told = f"amp_backoff {count}: fp16 lowered its loss scale; some of these are how it finds it, and no error"
    return [told] if count else []


def _rewinds(run: Run) -> list[str]:
    """The steps that led to one were taken back, so no rule sees them; the incidents are there."""
    return [
        f"rewind {row['number']}: from step {row['from_step']} back to step {row['to_step']}, "
        f"{counted(len(row['skipped']), 'batch', 'es')} skipped, LR x {row['lr_factor']:g}: {row['reason']}"
        for row in run.history.rewinds
    ]


def _loud_warm_up(run: Run) -> list[str]:
    rows = loud(run)
    if not rows or loud_when_warm(run, rows):
        return []
    return [f"large gradient norms in warm-up only, first at step {rows[0]['step']}: clipping took them"]


def _low_start(run: Run) -> list[str]:
    """A first loss below its expected value harms nothing by itself."""
    low = [text for text in first_losses(run) if "below its expected" in text]
    return [f"lower than an untrained model should show: {'; '.join(low)}"] if low else []


def _short(run: Run) -> list[str]:
    count = len(run.committed)
    return [f"only {count} logged steps: too few to judge a trend"] if 0 < count < FEW else []
