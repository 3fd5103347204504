# SPDX-License-Identifier: AGPL-3.0-or-later
"""A detector in use: classes registered from labelled images, found in other images."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fsdet.bank import PrototypeBank
from fsdet.data.collate import to_tensor
from fsdet.data.images import read_rgb
from fsdet.data.transforms import Sample, letterbox, resize_long
from fsdet.detect.postprocess import NMS_IOU, select, to_original
from fsdet.detect.scoring import Vocabulary, class_scores, own_classes
from fsdet.detect.support import embed_instances
from fsdet.errors import DataError, explain
from fsdet.models.build import model_sha256
from fsdet.models.detector import DualDetector
from fsdet.types import Detections, ImageRecord


class Predictor:
    """Finds base classes through the standard branch and registered classes through the prototype branch.

    Args:
        model: in eval mode. classes: names of the model's own classes; image_size, support_size: px, as in training.
        bank: classes registered before; it must come from these weights.
        base: how many of `classes` are base classes (None: all); stage 3 added the rest. mode: as trained.
    Raises:
        CheckpointError: the bank is of other weights.
    """

    def __init__(self, model: DualDetector, classes: Sequence[str], image_size: int, support_size: int,
                 bank: PrototypeBank | None = None, *, base: int | None = None,
                 mode: str = "dual") -> None:  # fmt: skip
        self.model, self.classes = model.eval(), tuple(classes)
        self.image_size, self.support_size, self.mode = image_size, support_size, mode
        self.base = len(self.classes) if base is None else base
        self.bank = bank or PrototypeBank((), (), model_sha256(model))
        self.bank.check_model(model_sha256(model), "bank")

    @property
    def names(self) -> tuple[str, ...]:
        """Names by label: the model's own classes, then the registered ones."""
        return (*self.classes, *(n for n in self.bank.names if n not in self.classes))

    def register(self, name: str, records: Sequence[ImageRecord]) -> None:
        """Add every instance in `records` (whatever its label, crowds left out) as a shot of class `name`.

        Raises:
            DataError: there is none, or an image cannot be read.
        """
        instances = []
        for record in records:
            image, factor = resize_long(read_rgb(record.path), self.image_size)
            sample = Sample(image, record.boxes * np.float32(factor), record.labels)
            instances += [(sample, i) for i in np.flatnonzero(~record.crowd).tolist()]
        if not instances:
            raise DataError(explain(f"an instance of '{name}'", "none that is not a crowd", "register",
                                    "give an image with a box around one object"))  # fmt: skip
        rows = embed_instances(self.model, instances, self.support_size).cpu()
        self.bank = self.bank.merge(PrototypeBank((name,), (rows,), self.bank.model_sha256))

    def _vocabulary(self) -> Vocabulary:
        own = [i for i, n in enumerate(self.classes) if n not in self.bank.names]
        labels = tuple(self.names.index(n) for n in self.bank.names)
        prototypes = self.bank.prototypes().to(self.model.head.bias.device)
        return replace(own_classes(own, self.base, self.mode), prototypes=prototypes, prototype_labels=labels)

    @torch.inference_mode()
    def predict(self, image: np.ndarray | str | Path, threshold: float = 0.25, iou: float = NMS_IOU) -> Detections:
        """Detections in one image, best first.

        Args:
            image: path, or uint8 [H, W, 3] RGB. threshold: least score. iou: overlap above which NMS removes.
        Raises:
            DataError: the image cannot be read.
        """
        pixels = image if isinstance(image, np.ndarray) else read_rgb(Path(image))
        boxed, factor, padding = letterbox(pixels, self.image_size)
        dense = self.model.dense(to_tensor([boxed], self.image_size).to(self.model.head.bias.device))
        words = self._vocabulary()
        branch, labels = words.columns(dense.boxes.device)
        found = select(
            dense.boxes, class_scores(self.model, dense, words), branch, labels, threshold=threshold, iou=iou
        )
        return to_original(found[0], factor, padding, pixels.shape[:2])
