# SPDX-License-Identifier: AGPL-3.0-or-later
"""A model judged by its task, in eval mode; training does not notice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fsdet.engine.checkpoint import random_state, restore_random_state
from fsdet.types import Task


def judge(task: Task, model: nn.Module, folder: Path, step: int) -> tuple[dict[str, Any], Sequence[Path]]:
    """What `task.evaluate` finds of `model`, and its pictures in `folder`/episodes; generators are left as they were.

    `model` is left in eval mode.
    """
    state = random_state()
    model.eval()
    with torch.no_grad():
        metrics = dict(task.evaluate(model))
        paths = task.illustrate(model, folder / "episodes", step)
    restore_random_state(state)
    return metrics, paths
