# SPDX-License-Identifier: AGPL-3.0-or-later
"""A detector in use: classes registered from labelled images, found in other images."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fsdet.bank import PrototypeBank
from fsdet.data.images import Picture, read_rgb, rgb_of
from fsdet.data.preprocessing import Preprocessing
from fsdet.data.transforms import Sample, resize_long
from fsdet.detect.album import Album, marks
from fsdet.detect.calibration import COPIES, USUAL, Calibrator, Place, copies, outliers
from fsdet.detect.postprocess import NMS_IOU, VOICE, select, to_original
from fsdet.detect.rescore import KEPT, first_threshold, rescored
from fsdet.detect.scoring import ClassShots, Vocabulary, class_scores, own_classes, worth_scoring
from fsdet.detect.support import VIEWS, embed_instances, negative_rows, whole_images
from fsdet.errors import DataError, are, counted, explain, some
from fsdet.files import readable
from fsdet.models.build import model_sha256
from fsdet.models.detector import DualDetector
from fsdet.models.fused import fused
from fsdet.models.heads import Dense
from fsdet.registered import class_name
from fsdet.types import Detections, ImageRecord

log = logging.getLogger("fsdet")


@dataclass(frozen=True, eq=False)
class Sought:
    """What a bank makes a detector look for. limits: [labels] least score of each class, as proposed.

    branch, labels: [T] of the score columns. names: by label.
    """

    words: Vocabulary
    branch: torch.Tensor
    labels: torch.Tensor
    limits: torch.Tensor
    names: tuple[str, ...]

    def only(self, branch: int) -> torch.Tensor:
        """[columns] of one branch."""
        return (self.branch == branch).nonzero()[:, 0]


class Predictor:
    """Finds base classes through the standard branch and registered classes through the prototype branch.

    Args:
        model: in eval mode. classes: names of the model's own classes. prepare: as in training.
        bank: classes registered before; it must come from these weights.
        base: how many of `classes` are base classes (None: all); stage 3 added the rest. mode: as trained.
        views: (zoom, mirrored) of each shot whose embeddings are averaged; one makes registration faster and a single
            shot worse. rescore: look at what was found a second time, which takes longer and is surer.
    Raises:
        CheckpointError: the bank is of other weights.
    """

    def __init__(self, model: DualDetector, classes: Sequence[str], prepare: Preprocessing,
                 bank: PrototypeBank | None = None, *, base: int | None = None, mode: str = "dual",
                 views: Sequence[tuple[float, bool]] = VIEWS, rescore: bool = False) -> None:  # fmt: skip
        self.model, self.classes, self.views, self._rescore = model.eval(), tuple(classes), views, rescore
        self.prepare, self.mode = prepare, mode
        self.base = len(self.classes) if base is None else base
        facts = {"classes": str(len(self.classes)), "image size": f"{prepare.image_size} px"}
        own = PrototypeBank((), (), model_sha256(model), made_by=facts)
        self._bank = bank or own
        self._bank.check_model(own.model_sha256, "bank", own.made_by)
        self._net = fused(model)
        self._album, self._pending = Album(), False
        self._sought: Sought | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names by label: the model's own classes, then the registered ones."""
        own = set(self.classes)
        return (*self.classes, *(n for n in self._bank.names if n not in own))

    @property
    def registered(self) -> tuple[str, ...]:
        """Names of the registered classes."""
        return self._bank.names

    @property
    def made_by(self) -> dict[str, Any]:
        """Which weights look, and how often, as plain values for what is written of it."""
        return {"model_sha256": self._bank.model_sha256, "looks": 2 if self._rescore else 1}

    @property
    def bank(self) -> PrototypeBank:
        """The registered classes, each with the threshold that its support images propose."""
        if self._pending:
            self._look_at_images()
        return self._bank

    def register(self, name: str, records: Sequence[ImageRecord]) -> None:
        """Add every instance in `records` (whatever its label, crowds left out) as a shot of class `name`; one that
        the class has already, by image and box, is left out and told.

        Thresholds of all classes that were registered here are proposed anew before the bank is next used: a class's
        score depends on what else is sought, and other classes' images show where it is not.
        Raises:
            DataError: there is none, or an image cannot be read. UserError: the name is none.
        """
        self.add(name, [(str(r.path), read_rgb(r.path), r.boxes[~r.crowd]) for r in records])

    def add(self, name: str, images: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> None:
        """`register` of (what the image is called, uint8 [H, W, 3] RGB, boxes [m, 4] xyxy px): each box is a shot."""
        name, found = class_name(name), []
        self._bank.check_views(len(self.views))
        for _, pixels, boxes in images:
            image, factor = resize_long(pixels, self.prepare.image_size)
            found.append(Sample(image, boxes * np.float32(factor), np.zeros(len(boxes), np.int64)))
        instances = [(sample, i) for sample in found for i in range(len(sample.boxes))]
        if not instances:
            raise DataError(explain(f"an instance of '{name}'", "none that is not a crowd", "register",
                                    "give an image with a box around one object"))  # fmt: skip
        files = [readable(Path(where).name) for where, _, _ in images]
        names = [file for file, sample in zip(files, found, strict=True) for _ in sample.boxes]
        before, numbers, again = self._enter(name, instances, names, [mark for s in found for mark in marks(s)])
        if again:
            told, verb = f"{len(again)} of {counted(len(instances), 'shot')}", are(len(again))
            log.warning("'%s': %s %s there already and %s not added twice (%s)", name, told, verb, verb,
                        some([names[k] for k in again]))  # fmt: skip
        self._tell_shared(name, before)
        own, places = iter(numbers), [where for where, _, _ in images]
        self._album.add(name, before, places, found, [[next(own) for _ in sample.boxes] for sample in found])
        if len(again) < len(instances):
            self._pending, self._sought = True, None

    def _enter(self, name: str, instances: Sequence[tuple[Sample, int]], sources: Sequence[str],
               found: Sequence[str]) -> tuple[int, list[int], list[int]]:  # fmt: skip
        """Put those of the instances that class `name` has not yet into the bank.

        Args:
            sources, found: the file and the mark of each.
        Returns:
            How many shots the class had; which shot of it each instance is; those instances that it had.
        """
        held = dict(zip(self._bank.names, self._bank.marks, strict=True)).get(name, ())
        before, shots = len(held), {mark: held.index(mark) for mark in held if mark}
        fresh = [k for k, mark in enumerate(found) if mark not in shots and found.index(mark) == k]
        chosen, texts = [instances[k] for k in fresh], [found[k] for k in fresh]
        rows = embed_instances(self._net, chosen, self.prepare.support_size, self.views).cpu()
        equal = self._bank.known(name, rows, [sources[k] for k in fresh], texts)  # to shots without a mark
        added = [i for i in range(len(fresh)) if i not in equal]
        if added:
            own = [fresh[i] for i in added]
            views = self._bank.views if self._bank.names else len(self.views)
            bank = self._bank.add(name, rows[added], [sources[k] for k in own], [found[k] for k in own])
            self._bank = replace(bank, views=views)
        shots |= {texts[i]: number for i, number in equal.items()}
        shots |= {texts[i]: before + number for number, i in enumerate(added)}
        new = {fresh[i] for i in added}
        return before, [shots[mark] for mark in found], [k for k in range(len(found)) if k not in new]

    def _tell_shared(self, name: str, before: int) -> None:
        """Warn of shots of class `name` after its first `before` that another class has, too."""
        own = self._bank.classes[name]
        if both := self._bank.of_another(name, own.kept(range(before, len(own)))):
            log.warning("'%s': the same image and box as in another class: %s; the two will be taken for each other: "
                        "keep each in the class that it shows", name, some(both))  # fmt: skip

    @torch.inference_mode()
    def _look_at_images(self) -> None:
        """Read from the support images at hand what is beside new shots, and a threshold for each of their classes."""
        album, instances = self._album, dict(zip(self._bank.names, self._bank.instances, strict=True))
        columns = [self._bank.names.index(name) for name in album.grown]
        places = [album.places(name, len(rows)) for name, rows in instances.items()]
        looks = Calibrator(self._net, self._vocabulary(), places)
        beside: dict[str, list[tuple[int, torch.Tensor]]] = {}
        for (image, _), (dense, boxes) in zip(album.samples.items(), self._looked(album.samples.values()), strict=True):
            looks.look(image, dense, boxes)
            for shot in [s for s in album.new if s.place.image == image]:
                like = instances[shot.name][shot.number].to(dense.embeddings.device)
                rows = negative_rows(dense, boxes[shot.place.box], boxes[album.others(shot)], like)
                beside.setdefault(shot.name, []).append((shot.number, rows.cpu()))
        single = [c for c in columns if looks.needs_copies(c)]
        self._look_at_copies(looks, single, places)
        proposals = looks.proposals()
        told = {self._bank.names[c]: (proposals[c].threshold, proposals[c].how) for c in columns}
        negatives = {name: (torch.cat([rows for _, rows in found]),
                            torch.cat([torch.full((len(rows),), number) for number, rows in found]))
                     for name, found in beside.items()}  # fmt: skip
        self._bank = self._bank.beside(negatives).proposed(told)
        album.new.clear()
        self._pending, self._sought = False, None

    def _look_at_copies(
        self, looks: Calibrator, single: Sequence[int], places: Sequence[Sequence[Place | None]]
    ) -> None:
        """Altered copies of the only shot of each of the classes `single`."""
        shots = [place for c in single for place in places[c] if place is not None]
        samples, size = self._album.samples, self.prepare.image_size
        altered = (copy for place in shots for copy in copies(samples[str(place.image)], place.box, size))
        for i, (dense, boxes) in enumerate(self._looked(altered)):
            looks.look_at_copy(single[i // COPIES], dense, boxes[0])

    def _looked(self, samples: Iterable[Sample]) -> Iterator[tuple[Dense, torch.Tensor]]:
        for dense, boxes in whole_images(self._net, samples, self.prepare.image_size):
            yield dense, torch.from_numpy(boxes).to(dense.boxes.device)

    def odd_shots(self) -> list[str]:
        """A line for each shot that is far from the others of its class, of classes with at least three."""
        lines = []
        for name, rows in zip(self._bank.names, self._bank.instances, strict=True):
            places = self._album.places(name, len(rows))
            for k, likeness, usual in outliers(rows):
                place = places[k]
                where = f"shot {k + 1}" if place is None else place.image
                lines.append(f"'{name}': {where} is unlike the other {len(rows) - 1} shots (cosine {likeness:.2f}, "
                             f"usually {usual:.2f}): is it that class, and is its box right?")  # fmt: skip
        return lines

    def _vocabulary(self) -> Vocabulary:
        registered = set(self._bank.names)
        own = [i for i, n in enumerate(self.classes) if n not in registered]
        label = {name: i for i, name in enumerate(self.names)}
        device = self._net.head.bias.device
        shots = tuple(class_shots(self._bank, i, device) for i in range(len(self._bank.names)))
        words = own_classes(own, self.base, self.mode, tuned=self.base < len(self.classes))
        return replace(words, prototypes=self._bank.prototypes().to(device),
                       prototype_labels=tuple(label[n] for n in self._bank.names), shots=shots)  # fmt: skip

    def _looked_for(self) -> Sought:
        """Made once for a bank."""
        bank = self.bank
        if self._sought is None:
            words, names = self._vocabulary(), self.names
            limits = torch.full((len(names),), USUAL)
            for label, proposed in zip(words.prototype_labels, bank.thresholds, strict=True):
                limits[label] = USUAL if proposed is None else proposed
            if self._rescore:
                limits *= KEPT
            self._sought = Sought(words, *words.columns(self._net.head.bias.device), limits, names)
        return self._sought

    def frozen(self) -> tuple[Vocabulary, torch.Tensor]:
        """What it looks for, and [labels] the least score of each class: all that a file needs beside the network."""
        sought = self._looked_for()
        return sought.words, sought.limits

    @torch.inference_mode()
    def predict(self, image: Picture, threshold: float | None = None, iou: float = NMS_IOU,
                branch: int | None = None) -> Detections:  # fmt: skip
        """Detections in one image, best first.

        Args:
            image: path, RGB array (`as_rgb`) or PIL image. threshold: least score of every class; None takes the one
                that each registered class proposed, and .25 for the others. iou: overlap above which NMS removes.
            branch: only what STANDARD or PROTOTYPE finds, scored as when both look.
        Raises:
            DataError: the image cannot be read. UserError: it is none.
        """
        pixels = rgb_of(image)
        boxed, factor, padding = self.prepare.fitted(pixels)
        dense = self._net.dense(self.prepare.tensor([boxed]).to(self._net.head.bias.device))
        sought = self._looked_for()
        limit = sought.limits if threshold is None else torch.full_like(sought.limits, threshold)
        last = float(limit.min()) if len(limit) else 0.0
        least = first_threshold(last) if self._rescore else last
        dense = worth_scoring(self._net, dense, sought.words, VOICE * least)
        scores, columns = class_scores(self._net, dense, sought.words), (sought.branch, sought.labels)
        if branch is not None:
            kept = sought.only(branch)
            scores, columns = scores[..., kept], (sought.branch[kept], sought.labels[kept])
        found = select(dense.boxes, scores, *columns, threshold=least, iou=iou)
        if self._rescore:
            found = rescored(self._net, sought.words, found, [boxed], self.prepare.support_size, last)
        return to_original(found[0].above(limit), factor, padding, pixels.shape[:2])


def class_shots(bank: PrototypeBank, index: int, device: torch.device) -> ClassShots:
    """A bank's class as scoring reads it."""
    rows = (bank.instances[index], bank.negatives[index], bank.negative_shots[index])
    return ClassShots(*(t.to(device) for t in rows))
