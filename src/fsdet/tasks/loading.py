# SPDX-License-Identifier: AGPL-3.0-or-later
"""A trained detector back from its checkpoint, with what it knows of classes and sizes."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fsdet.data.preprocessing import Preprocessing
from fsdet.detect.scoring import Vocabulary, own_classes
from fsdet.engine import checkpoint as checkpoints
from fsdet.engine.optimizer import choose_device
from fsdet.errors import CheckpointError, DataError, explain
from fsdet.models.build import build_model
from fsdet.models.detector import DualDetector
from fsdet.names import composed


@dataclass(frozen=True, eq=False)
class Trained:
    """model: in eval mode, EMA weights where the run kept them. spec: Task.describe() of the training."""

    model: DualDetector  # of the few-shot task; otherwise the network of that task
    spec: Mapping[str, Any]
    path: Path
    sha256: str

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.spec["classes"])

    @property
    def preprocessing(self) -> Preprocessing:
        """Of a few-shot detector. Raises CheckpointError when it is not what this version does."""
        return Preprocessing.of(self.spec, str(self.path))

    @property
    def finetuned(self) -> bool:
        """Whether novel classes are columns of the model itself (stage 3)."""
        return len(self.spec["classes"]) > len(self.spec["base"])

    def own(self, classes: Sequence[int]) -> Vocabulary:
        """Those of its own classes, by number, as a detector in use looks for them."""
        return own_classes(classes, len(self.spec["base"]), self.spec["mode"], tuned=self.finetuned)


def load_trained(path: str | Path, device: str = "cpu") -> Trained:
    """The detector of a checkpoint on `device`: auto, cpu, mps, cuda or cuda:N.

    Raises:
        CheckpointError: the file is missing, damaged, unsafe, or not of a few-shot detector.
        ConfigError: no such device.
    """
    place, content = choose_device(device, "--device"), checkpoints.load(path)
    spec = spec_of(path, content)
    if spec["task"] != "fewshot":
        raise CheckpointError(explain("a checkpoint of the few-shot detector", f"one of the task {spec['task']}",
                                      str(path), "fsdet eval judges that task and draws its images"))  # fmt: skip
    Preprocessing.of(spec, str(path))
    return rebuilt(path, content, build_model(spec["model"], str(path)), place)


def spec_of(path: str | Path, content: Mapping[str, Any]) -> Mapping[str, Any]:
    """What Task.describe() said when a checkpoint was written. Raises CheckpointError when it says nothing of use."""
    spec = content.get("spec")
    if not isinstance(spec, Mapping) or not {"task", "model", "classes"} <= set(spec):
        raise CheckpointError(explain("a checkpoint of a fsdet training", f"spec {str(spec)[:80]}", str(path),
                                      "use best.pt or last.pt of a fsdet train run"))  # fmt: skip
    return {key: [composed(name) for name in value] if key in ("classes", "base") and isinstance(value, list) else value
            for key, value in spec.items()}  # fmt: skip


def rebuilt(path: str | Path, content: Mapping[str, Any], model: nn.Module, place: torch.device) -> Trained:
    """`model` with the weights of a checkpoint that has been read, on a device.

    Raises:
        CheckpointError: weights that do not fit the checkpoint's own spec.
    """
    path, spec = Path(path), spec_of(path, content)
    state = content.get("ema") or content["model"]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(explain("weights that fit the checkpoint's own spec", str(error)[:200], str(path),
                                      "the file was edited or damaged; use another checkpoint")) from error  # fmt: skip
    if encoder := getattr(model, "encoder", None):
        encoder.beside(path.parent)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Trained(model.to(place).eval(), spec, path, digest)


def data_of(trained: Trained) -> str:
    """The data set a detector was trained on. Raises DataError when it is not there, seen from the current folder."""
    path = str(trained.spec["data"])
    if not Path(path).expanduser().exists():
        got = f"nothing at '{path}', seen from {Path.cwd()}"
        raise DataError(explain("the data set it was trained on", got, str(trained.path), "name it with --data D"))
    return path
