# SPDX-License-Identifier: AGPL-3.0-or-later
"""Going back to a checkpoint when too many steps were rejected.

The batches that were rejected since are left out from then on, and the LR is lower: f(committed steps) x
guard.rewind_lr^rewinds. All of it is in the position, so that a resume goes the same way.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fsdet.engine.position import Position
from fsdet.engine.records import Cut
from fsdet.engine.state import RunState
from fsdet.errors import counted
from fsdet.types import StepReport

SHOWN = 8  # batches named in a sentence


def may_go_back(state: RunState) -> bool:
    """Whether going back can help, and has not been tried often enough."""
    return state.guard.curable and len(state.position.rewinds) < state.guard.limits.max_rewinds


def cut(state: RunState, saved: Mapping[str, Any]) -> Cut:
    """Which rows of the log stay: those of `saved`, and those of the rewinds so far."""
    return replace(Position(**saved["position"]).cut, rewinds=state.position.rewinds)


def go_back(state: RunState, saved: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """Put `saved` back without the batches that were rejected after it; returns the rewind's row.

    The incidents that were written stay counted, earlier rewinds stay in force, and the budget begins anew.
    """
    left, incidents, lost = state.position, state.guard.incidents, state.controller.step
    state.put(saved)
    position = state.position
    entry = {
        "number": len(left.rewinds) + 1,
        "from_step": lost,
        "from_batch": left.batch,
        "to_step": saved["step"],
        "to_batch": saved["batch"],
        "epoch": saved["epoch"],
        "skipped": sorted({index for index in left.rejected if index >= saved["batch"]}),
        "lr_factor": state.guard.limits.rewind_lr ** (len(left.rewinds) + 1),
        "reason": reason,
    }
    position.rewinds = [*left.rewinds, entry]
    position.batch = position.after(0)
    state.guard.incidents = incidents
    state.guard.pardon()
    return entry


def sentence(entry: Mapping[str, Any], most: int) -> str:
    """A rewind's row in words; `most`: how many there may be."""
    skipped = entry["skipped"]
    batches = counted(len(skipped), "batch", "es")
    named = ", ".join(map(str, skipped[:SHOWN])) + (", ..." if len(skipped) > SHOWN else "")
    return (
        f"{entry['reason']}\nrewind {entry['number']} of {most}: back from step {entry['from_step']} to step "
        f"{entry['to_step']}, {batches} skipped from now on ({named}), LR x {entry['lr_factor']:g}"
    )


def epitaph(state: RunState, reason: str, report: StepReport, path: Path) -> str:
    """Why the run ends: the last rejected step, where its evidence lies, and what was tried."""
    epoch = state.position.batch // state.controller.task.batches_per_epoch + 1
    tried = [f"before: {sentence(entry, state.guard.limits.max_rewinds)}" for entry in state.position.rewinds]
    told = f"training stopped at step {report.step}, epoch {epoch}: {reason}"
    return "\n".join([told, f"culprit: {report.culprit}", *tried, f"report: {path}"])
