# SPDX-License-Identifier: AGPL-3.0-or-later
"""Going back to a checkpoint when too many steps were rejected.

The batches that were rejected since are left out from then on, and the LR is lower: f(committed steps) x
guard.rewind_lr^rewinds. All of it is in the position, so that a resume goes the same way.
"""

from collections.abc import Mapping
from typing import Any

from fsdet.engine.state import RunState

SHOWN = 8  # batches named in a sentence


def go_back(state: RunState, saved: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """Put `saved` back without the batches that were rejected after it; returns the rewind's row.

    The incidents that were written stay counted, and earlier rewinds stay in force.
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
    return entry


def sentence(entry: Mapping[str, Any], most: int) -> str:
    """A rewind's row in words; `most`: how many there may be."""
    skipped = entry["skipped"]
    named = ", ".join(map(str, skipped[:SHOWN])) + (", ..." if len(skipped) > SHOWN else "")
    return (
        f"{entry['reason']}\nrewind {entry['number']} of {most}: back from step {entry['from_step']} to step "
        f"{entry['to_step']}, {len(skipped)} batches skipped from now on ({named}), LR x {entry['lr_factor']:g}"
    )
