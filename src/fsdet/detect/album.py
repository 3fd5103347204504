# SPDX-License-Identifier: AGPL-3.0-or-later
"""The support images that a predictor has at hand, and which shot of a bank is where in them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from fsdet.data.transforms import Sample
from fsdet.detect.calibration import Place


@dataclass(frozen=True, eq=False)
class Shot:
    """A shot in an image at hand. name: its class. number: which of the class's shots."""

    name: str
    number: int
    place: Place


class Album:
    """Support images by what they are called, with every box that a class has in them.

    samples: {image: Sample at network scale}. new: shots whose image has not been looked at for what is beside them.
    grown: classes that got a shot here.
    """

    def __init__(self) -> None:
        self.samples: dict[str, Sample] = {}
        self.grown: dict[str, None] = {}
        self.new: list[Shot] = []
        self._shots: dict[str, list[Place | None]] = {}

    def add(self, name: str, before: int, images: Sequence[str], samples: Sequence[Sample],
            numbers: Sequence[Sequence[int]]) -> None:  # fmt: skip
        """Images of a class that had `before` shots; an image may come again with other boxes.

        Args:
            numbers: of each image, which shot of the class each box is: new ones count on from `before`; an older one
                whose image was not at hand (it came from a bank file) has it from now on.
        """
        known = self._shots.setdefault(name, [])
        known += [None] * (before - len(known))
        for image, sample, own in zip(images, samples, numbers, strict=True):
            old, boxes = self.samples.get(image), []
            for box, number in enumerate(own):
                if number < len(known) and known[number] is not None:
                    continue
                place = Place(image, (0 if old is None else len(old.boxes)) + len(boxes))
                boxes.append(box)
                if number < len(known):
                    known[number] = place
                    continue
                known.append(place)
                self.new.append(Shot(name, number, place))
                self.grown[name] = None
            if boxes:
                self.samples[image] = _joined(old, sample, boxes)

    def places(self, name: str, count: int) -> list[Place | None]:
        """Where each of a class's `count` shots is; None for those without an image."""
        known = self._shots.get(name, [])
        return [*known, *[None] * (count - len(known))]

    def others(self, shot: Shot) -> list[int]:
        """The other boxes of the shot's class in its image."""
        return [p.box for p in self._shots[shot.name] if p and p.image == shot.place.image and p.box != shot.place.box]


def marks(sample: Sample) -> list[str]:
    """For each box a text that is the same for the same pixels and box (whole px), and for nothing else."""
    picture = hashlib.blake2b(repr(sample.image.shape).encode(), digest_size=8)
    picture.update(np.ascontiguousarray(sample.image))
    rows = np.rint(sample.boxes).astype(np.int64).tolist()
    return [f"{picture.hexdigest()}:{','.join(map(str, row))}" for row in rows]


def _joined(old: Sample | None, sample: Sample, boxes: Sequence[int]) -> Sample:
    """The sample with these boxes alone, after those that its image had."""
    chosen = replace(sample, boxes=sample.boxes[boxes], labels=sample.labels[boxes])
    if old is None:
        return chosen
    return replace(chosen, boxes=np.concatenate((old.boxes, chosen.boxes)),
                   labels=np.concatenate((old.labels, chosen.labels)))  # fmt: skip
