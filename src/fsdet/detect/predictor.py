# SPDX-License-Identifier: AGPL-3.0-or-later
"""A detector in use: classes registered from labelled images, found in other images."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fsdet.bank import PrototypeBank
from fsdet.data.collate import to_tensor
from fsdet.data.images import read_rgb
from fsdet.data.transforms import Sample, letterbox, resize_long
from fsdet.detect.calibration import COPIES, USUAL, Calibrator, Place, copies, outliers
from fsdet.detect.postprocess import NMS_IOU, select, to_original
from fsdet.detect.scoring import ClassShots, Vocabulary, class_scores, own_classes
from fsdet.detect.support import embed_instances, negative_rows, whole_images
from fsdet.errors import DataError, explain
from fsdet.models.build import model_sha256
from fsdet.models.detector import DualDetector
from fsdet.models.heads import Dense
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
        self._bank = bank or PrototypeBank((), (), model_sha256(model))
        self._bank.check_model(model_sha256(model), "bank")
        self._album, self._pending = Album(), False

    @property
    def names(self) -> tuple[str, ...]:
        """Names by label: the model's own classes, then the registered ones."""
        return (*self.classes, *(n for n in self._bank.names if n not in self.classes))

    @property
    def registered(self) -> tuple[str, ...]:
        """Names of the registered classes."""
        return self._bank.names

    @property
    def bank(self) -> PrototypeBank:
        """The registered classes, each with the threshold that its support images propose."""
        if self._pending:
            self._calibrate()
        return self._bank

    def register(self, name: str, records: Sequence[ImageRecord]) -> None:
        """Add every instance in `records` (whatever its label, crowds left out) as a shot of class `name`.

        Thresholds of all classes that were registered here are proposed anew before the bank is next used: a class's
        score depends on what else is sought, and other classes' images show where it is not.
        Raises:
            DataError: there is none, or an image cannot be read.
        """
        self.add(name, [(str(r.path), read_rgb(r.path), r.boxes[~r.crowd]) for r in records])

    def add(self, name: str, images: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> None:
        """`register` of (what the image is called, uint8 [H, W, 3] RGB, boxes [m, 4] xyxy px): each box is a shot."""
        found = []
        for _, pixels, boxes in images:
            image, factor = resize_long(pixels, self.image_size)
            found.append(Sample(image, boxes * np.float32(factor), np.zeros(len(boxes), np.int64)))
        instances = [(sample, i) for sample in found for i in range(len(sample.boxes))]
        if not instances:
            raise DataError(explain(f"an instance of '{name}'", "none that is not a crowd", "register",
                                    "give an image with a box around one object"))  # fmt: skip
        rows = embed_instances(self.model, instances, self.support_size)
        negatives, shots = self._beside(found, rows)
        one = PrototypeBank((name,), (rows.cpu(),), self._bank.model_sha256, (negatives,), (shots,))
        self._bank = self._bank.merge(one)
        self._album.add(name, [where for where, _, _ in images], found)
        self._pending = True

    @torch.inference_mode()
    def _beside(self, samples: Sequence[Sample], rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(negatives [m, D], the shot [m] each is from) of one class's images."""
        negatives, shots = [], []
        for dense, boxes in whole_images(self.model, samples, self.image_size):
            placed = torch.from_numpy(boxes).to(rows.device)
            for i in range(len(placed)):
                others = placed[torch.arange(len(placed)) != i]
                negatives.append(negative_rows(dense, placed[i], others, rows[len(shots)]))
                shots.append(torch.full((len(negatives[-1]),), len(shots)))
        return torch.cat(negatives).cpu(), torch.cat(shots)

    @torch.inference_mode()
    def _calibrate(self) -> None:
        """Propose a threshold for every class whose support images are at hand."""
        own, names = self._vocabulary(), list(self._album.shots)
        columns = [self._bank.names.index(name) for name in names]
        shots = {c: self._album.shots[name] for c, name in zip(columns, names, strict=True)}
        looks = Calibrator(self.model, own, [shots.get(c, ()) for c in range(len(self._bank.names))])
        for (image, _), (dense, boxes) in zip(self._album.samples.items(), self._looked(self._album.samples.values()),
                                              strict=True):  # fmt: skip
            looks.look(image, dense, boxes)
        single = [c for c in columns if looks.needs_copies(c)]
        altered = (copy for c in single for copy in copies(self._album.samples[shots[c][0].image], shots[c][0].box,
                                                           self.image_size))  # fmt: skip
        for i, (dense, boxes) in enumerate(self._looked(altered)):
            looks.look_at_copy(single[i // COPIES], dense, boxes[0])
        proposals = looks.proposals()
        told = {name: (proposals[c].threshold, proposals[c].how) for c, name in zip(columns, names, strict=True)}
        self._bank, self._pending = self._bank.proposed(told), False

    def _looked(self, samples: Iterable[Sample]) -> Iterator[tuple[Dense, torch.Tensor]]:
        for dense, boxes in whole_images(self.model, samples, self.image_size):
            yield dense, torch.from_numpy(boxes).to(dense.boxes.device)

    def odd_shots(self) -> list[str]:
        """A line for each shot that is far from the others of its class, of classes with at least three."""
        lines = []
        for name, rows in zip(self._bank.names, self._bank.instances, strict=True):
            paths = [place.image for place in self._album.shots.get(name, ())]
            for k, likeness, usual in outliers(rows):
                where = paths[k] if len(paths) == len(rows) else f"shot {k}"
                lines.append(f"'{name}': {where} is unlike the other {len(rows) - 1} shots (cosine {likeness:.2f}, "
                             f"usually {usual:.2f}): is it that class, and is its box right?")  # fmt: skip
        return lines

    def _vocabulary(self) -> Vocabulary:
        own = [i for i, n in enumerate(self.classes) if n not in self._bank.names]
        labels = tuple(self.names.index(n) for n in self._bank.names)
        device = self.model.head.bias.device
        shots = tuple(class_shots(self._bank, i, device) for i in range(len(labels)))
        return replace(own_classes(own, self.base, self.mode), prototypes=self._bank.prototypes().to(device),
                       prototype_labels=labels, shots=shots)  # fmt: skip

    def _limits(self, threshold: float | None) -> torch.Tensor:
        """[labels] least score of each class."""
        limit = torch.full((len(self.names),), USUAL if threshold is None else threshold)
        if threshold is None:
            for name, proposed in zip(self.bank.names, self.bank.thresholds, strict=True):
                limit[self.names.index(name)] = USUAL if proposed is None else proposed
        return limit

    def frozen(self) -> tuple[Vocabulary, torch.Tensor]:
        """What it looks for, and [labels] the least score of each class: all that a file needs beside the network."""
        return self._vocabulary(), self._limits(None)

    @torch.inference_mode()
    def predict(self, image: np.ndarray | str | Path, threshold: float | None = None,
                iou: float = NMS_IOU) -> Detections:  # fmt: skip
        """Detections in one image, best first.

        Args:
            image: path, or uint8 [H, W, 3] RGB. threshold: least score of every class; None takes the one that each
                registered class proposed, and .25 for the others. iou: overlap above which NMS removes.
        Raises:
            DataError: the image cannot be read.
        """
        pixels = image if isinstance(image, np.ndarray) else read_rgb(Path(image))
        boxed, factor, padding = letterbox(pixels, self.image_size)
        dense = self.model.dense(to_tensor([boxed], self.image_size).to(self.model.head.bias.device))
        words, limit = self._vocabulary(), self._limits(threshold)
        branch, labels = words.columns(dense.boxes.device)
        least = float(limit.min()) if len(limit) else 0.0
        scores = class_scores(self.model, dense, words)
        [found] = select(dense.boxes, scores, branch, labels, threshold=least, iou=iou)
        return to_original(found.above(limit), factor, padding, pixels.shape[:2])


def class_shots(bank: PrototypeBank, index: int, device: torch.device) -> ClassShots:
    """A bank's class as scoring reads it."""
    rows = (bank.instances[index], bank.negatives[index], bank.negative_shots[index])
    return ClassShots(*(t.to(device) for t in rows))


class Album:
    """Support images by path, with every box that a class has in them.

    samples: {image: Sample at network scale}. shots: {class name: its shots}, in the order of their embeddings.
    """

    def __init__(self) -> None:
        self.samples: dict[str, Sample] = {}
        self.shots: dict[str, list[Place]] = {}

    def add(self, name: str, images: Sequence[str], samples: Sequence[Sample]) -> None:
        """The images of one class's shots; the same image may come again with boxes of another class."""
        for path, sample in zip(images, samples, strict=True):
            old = self.samples.get(path)
            start = 0 if old is None else len(old.boxes)
            if old is not None:
                sample = replace(sample, boxes=np.concatenate((old.boxes, sample.boxes)),
                                 labels=np.concatenate((old.labels, sample.labels)))  # fmt: skip
            self.samples[path] = sample
            self.shots.setdefault(name, []).extend(Place(path, i) for i in range(start, len(sample.boxes)))
