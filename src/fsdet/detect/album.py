# SPDX-License-Identifier: AGPL-3.0-or-later
"""The support images that a predictor has at hand, and which shot of a bank is where in them."""

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
    """

    def __init__(self) -> None:
        self.samples: dict[str, Sample] = {}
        self.new: list[Shot] = []
        self._shots: dict[str, list[Place | None]] = {}

    def add(self, name: str, before: int, images: Sequence[str], samples: Sequence[Sample]) -> None:
        """The images of more shots of a class that has `before` of them; an image may come again with other boxes.

        Of shots that came from elsewhere (a bank file) there is no image.
        """
        known = self._shots.setdefault(name, [])
        known += [None] * (before - len(known))
        for image, sample in zip(images, samples, strict=True):
            old = self.samples.get(image)
            start = 0 if old is None else len(old.boxes)
            if old is not None:
                sample = replace(sample, boxes=np.concatenate((old.boxes, sample.boxes)),
                                 labels=np.concatenate((old.labels, sample.labels)))  # fmt: skip
            self.samples[image] = sample
            for box in range(start, len(sample.boxes)):
                place = Place(image, box)
                self.new.append(Shot(name, len(known), place))
                known.append(place)

    @property
    def names(self) -> tuple[str, ...]:
        """Classes with an image at hand."""
        return tuple(self._shots)

    def places(self, name: str, count: int) -> list[Place | None]:
        """Where each of a class's `count` shots is; None for those without an image."""
        known = self._shots.get(name, [])
        return [*known, *[None] * (count - len(known))]

    def others(self, shot: Shot) -> list[int]:
        """The other boxes of the shot's class in its image."""
        return [p.box for p in self._shots[shot.name] if p and p.image == shot.place.image and p.box != shot.place.box]
