# SPDX-License-Identifier: AGPL-3.0-or-later
"""A trained detector back from its checkpoint, with what it knows of classes and sizes."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fsdet.engine import checkpoint as checkpoints
from fsdet.errors import CheckpointError, explain
from fsdet.models.build import build_model
from fsdet.models.detector import DualDetector


@dataclass(frozen=True, eq=False)
class Trained:
    """model: in eval mode, EMA weights where the run kept them. spec: Task.describe() of the training."""

    model: DualDetector
    spec: Mapping[str, Any]
    path: Path
    sha256: str

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.spec["classes"])

    @property
    def finetuned(self) -> bool:
        """Whether novel classes are columns of the model itself (stage 3)."""
        return len(self.spec["classes"]) > len(self.spec["base"])


def load_trained(path: str | Path, device: str = "cpu") -> Trained:
    """Raises CheckpointError when the file is missing, damaged, unsafe, or not of a few-shot detector."""
    path = Path(path)
    content = checkpoints.load(path)
    spec = content.get("spec")
    if not isinstance(spec, Mapping) or spec.get("task") != "fewshot" or "model" not in spec:
        raise CheckpointError(explain("a checkpoint of the few-shot detector", f"spec {str(spec)[:80]}", str(path),
                                      "use best.pt or last.pt of a fsdet train run"))  # fmt: skip
    model = build_model(spec["model"], str(path))
    state = content.get("ema") or content["model"]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(explain("weights that fit the checkpoint's own spec", str(error)[:200], str(path),
                                      "the file was edited or damaged; use another checkpoint")) from error  # fmt: skip
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Trained(model.to(torch.device(device)).eval(), spec, path, digest)
