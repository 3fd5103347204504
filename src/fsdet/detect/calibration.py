# SPDX-License-Identifier: AGPL-3.0-or-later
"""A score threshold for each registered class, proposed from the support images alone."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fsdet.boxes import iou_matrix
from fsdet.data.transforms import Jitter, Sample, support_window
from fsdet.detect.scoring import Vocabulary, class_scores
from fsdet.models.detector import DualDetector
from fsdet.models.heads import Dense

USUAL = 0.25  # a class without a proposal, and the model's own classes
FOUND_IOU = 0.5  # overlap at which a place is the shot
INSIDE = 0.5  # share of a place's box that lies in the object's: above it, it is no place without the object
COPIES = 8  # of a single shot
FAR = 0.25  # of cosine, below the median
COPY = Jitter(scale=0.5, flip=0.5, hsv=(0.015, 0.7, 0.4))


@dataclass(frozen=True, eq=False)
class Place:
    """A shot in its image: any name of the image, and which of the image's boxes it is."""

    image: Hashable
    box: int


@dataclass(frozen=True)
class Proposal:
    """threshold: in [0, 1]. how: what it was read from, in words."""

    threshold: float
    how: str


def copies(sample: Sample, index: int, size: int) -> list[Sample]:
    """COPIES images of size x size px around an instance, always the same: moved, zoomed, mirrored, recoloured."""
    out = []
    for number in range(COPIES):
        image, box = support_window(sample, index, size, np.random.default_rng(number), COPY)
        out.append(Sample(image, box[None], sample.labels[index : index + 1]))
    return out


class Calibrator:
    """Collects what the support images say of each class's scores, one image at a time.

    Args:
        words: what is looked for, with `shots`. places: the shots of each prototype, in the order of its instances.
    """

    def __init__(self, model: DualDetector, words: Vocabulary, places: Sequence[Sequence[Place]]) -> None:
        self.model, self.words, self.places = model, words, places
        self.positives: list[list[float]] = [[] for _ in places]
        self.negatives: list[list[float]] = [[] for _ in places]
        self.held: dict[Hashable, dict[int, list[int]]] = {}
        for column, shots in enumerate(places):
            for k, place in enumerate(shots):
                self.held.setdefault(place.image, {}).setdefault(column, []).append(k)

    def needs_copies(self, column: int) -> bool:
        """Whether a class has one shot, which no other can find."""
        return len(self.places[column]) == 1

    def _scores(self, words: Vocabulary, dense: Dense) -> Tensor:
        """[A, N] of the prototypes."""
        first = len(words.standard)
        return class_scores(self.model, dense, words)[0, :, first : first + len(words.prototype_labels)]

    def look(self, image: Hashable, dense: Dense, boxes: Tensor) -> None:
        """One support image: each class's shots in it as found by its other shots, and its best score elsewhere.

        Args:
            dense: of the one image. boxes: [m, 4] px of the network's input.
        """
        every = self._scores(self.words, dense)
        held = self.held.get(image, {})
        for column in range(len(self.places)):
            shots, score = held.get(column, []), every[:, column]
            outside = torch.ones_like(score, dtype=torch.bool)
            for k in shots:
                outside &= _share_inside(dense.boxes[0], boxes[self.places[column][k].box]) < INSIDE
            if shots and len(shots) < len(self.places[column]):
                score = self._scores(self.words.without(column, shots), dense)[:, column]
            if outside.any():
                self.negatives[column].append(float(score[outside].max()))
            if len(self.places[column]) > 1:
                for k in shots:
                    others = self._scores(self.words.without(column, [k]), dense)[:, column]
                    self.positives[column].append(_best_at(others, dense, boxes[self.places[column][k].box]))

    def look_at_copy(self, column: int, dense: Dense, box: Tensor) -> None:
        """An altered copy of a class's only shot."""
        self.positives[column].append(_best_at(self._scores(self.words, dense)[:, column], dense, box))

    def proposals(self) -> list[Proposal]:
        """One for each prototype, after every support image has been looked at."""
        return [propose(p, n, copied=self.needs_copies(c))
                for c, (p, n) in enumerate(zip(self.positives, self.negatives, strict=True))]  # fmt: skip


def _best_at(score: Tensor, dense: Dense, box: Tensor) -> float:
    """The best score among places that are the object; 0 where no box fits it."""
    there = iou_matrix(box[None], dense.boxes[0])[0] >= FOUND_IOU
    return float(score[there].max()) if there.any() else 0.0


def _share_inside(boxes: Tensor, outer: Tensor) -> Tensor:
    """[A] share of each box's area that lies in `outer` [4]."""
    side = (torch.minimum(boxes[:, 2:], outer[2:]) - torch.maximum(boxes[:, :2], outer[:2])).clamp(min=0)
    return side.prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=1e-6)


def propose(positives: Sequence[float], negatives: Sequence[float], *, copied: bool) -> Proposal:
    """PLACEHOLDER"""
    return Proposal(USUAL, "")


def outliers(instances: Tensor) -> list[tuple[int, float, float]]:
    """Shots far from the others of their class: [(shot, its cosine to the others' mean, the median of those cosines)].

    Far is below the median by more than FAR and by more than three times 1.4826 x the median absolute deviation, which
    is a standard deviation where the shots are normal (Rousseeuw & Croux 1993).
    Args:
        instances: [K, D] unit rows; fewer than three have no outlier.
    """
    if len(instances) < 3:
        return []
    rows = instances.float()
    others = torch.nn.functional.normalize(rows.sum(0) - rows, dim=-1)
    likeness = (rows * others).sum(-1)
    median = likeness.quantile(0.5)
    spread = 1.4826 * (likeness - median).abs().quantile(0.5)
    far = likeness < median - torch.clamp(3 * spread, min=FAR)
    return [(k, float(likeness[k]), float(median)) for k in far.nonzero()[:, 0].tolist()]
