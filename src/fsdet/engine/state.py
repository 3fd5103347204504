# SPDX-License-Identifier: AGPL-3.0-or-later
"""All of a run that its checkpoints hold: taken out as plain values, put back in place."""

from collections.abc import Mapping
from typing import Any

import torch

from fsdet import __version__
from fsdet.engine import checkpoint
from fsdet.engine.clipping import Clipping
from fsdet.engine.guard import StepGuard
from fsdet.engine.position import Position
from fsdet.engine.quarantine import Quarantine
from fsdet.engine.step import StepController


class RunState:
    """Model, objective, EMA, optimizer, scaler, generators, guard, clip norms and position of one run.

    controller: owns the first five. guard, clipping, quarantine: with states of their own. resolved: the whole
    configuration as plain values. `position` is replaced by `put`, so ask for it here.
    """

    def __init__(
        self, controller: StepController, guard: StepGuard, clipping: Clipping, quarantine: Quarantine,
        resolved: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.controller, self.guard, self.clipping, self.quarantine = controller, guard, clipping, quarantine
        self.resolved = resolved
        self.position = Position()

    def take(self) -> dict[str, Any]:
        """What `put` puts back, and what rebuilds the model elsewhere; its tensors are the live ones."""
        controller, position = self.controller, self.position
        task, ema = controller.task, controller.ema
        model = task.model.state_dict()
        return {
            "format": checkpoint.FORMAT,
            "task": task.name,
            "spec": dict(task.describe()),
            "model": model,
            "ema": ema.state_dict() if ema else model,
            "ema_count": ema.count if ema else 0,
            "optimizer": controller.optimizer.state_dict(),
            "scaler": controller.scaler.state_dict(),
            "objective": task.objective.state_dict(),
            "step": controller.step,
            "overflows": [controller.overflows, controller.overflows_low, controller.proven],
            "epoch": position.batch // task.batches_per_epoch + 1,
            "batch": position.batch,
            "batches_per_epoch": task.batches_per_epoch,
            "finished": position.finished,
            "position": vars(position),
            "guard": self.guard.state_dict(),
            "clipping": self.clipping.state_dict(),
            "quarantine": self.quarantine.state_dict(),
            "rng": checkpoint.random_state(),
            "config": dict(self.resolved),
            "precision": controller.precision,
            "threads": torch.get_num_threads(),
            "world": controller.peers.world,
            "versions": {"torch": str(torch.__version__), "fsdet": __version__},
        }

    def put(self, state: Mapping[str, Any]) -> None:
        """Be where `state` was taken, tensor by tensor in place; the run is not finished any more."""
        controller = self.controller
        controller.task.model.load_state_dict(state["model"])
        controller.task.objective.load_state_dict(state["objective"])
        if controller.ema:
            controller.ema.load_state_dict(state["ema"], state["ema_count"])
        checkpoint.load_optimizer(controller.optimizer, state["optimizer"])
        controller.scaler.load_state_dict(state["scaler"])
        controller.step = state["step"]
        controller.overflows, controller.overflows_low, controller.proven = (*state["overflows"], 0.0)[:3]
        self.position = Position(**(state["position"] | {"finished": False}))
        self.guard.load_state_dict(state["guard"])
        self.clipping.load_state_dict(state.get("clipping", {}))
        self.quarantine.load_state_dict(state.get("quarantine", {}))
        checkpoint.restore_random_state(state["rng"])
