# SPDX-License-Identifier: AGPL-3.0-or-later
"""A score threshold for each registered class, proposed from the support images alone."""

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fsdet.boxes import iou_matrix
from fsdet.data.transforms import Jitter, Sample, support_window
from fsdet.detect.postprocess import best_detection
from fsdet.detect.scoring import Vocabulary, class_scores
from fsdet.errors import counted
from fsdet.models.detector import DualDetector
from fsdet.models.heads import Dense

USUAL = 0.25  # a class without a proposal, and the model's own classes
TAIL = 1.5  # standard deviations above the median of what is wrong
LEAST_RECALL, MOST_RECALL = 0.48, 0.6  # of shots, as the others find them
PRIOR_SHOTS = 50  # a class with so many shots counts as much as all classes together
FEW = 8  # images without a class, below which they decide nothing
LEAST = 0.05  # no threshold is lower
TINY = 1e-3  # scores have logits from here to 1 - here, so that one shot that is not found at all is no outlier
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
        words: what is looked for, with `shots`. places: the shots of each prototype, in the order of its instances, and
            None for one without an image, which helps to find the others.
    """

    def __init__(self, model: DualDetector, words: Vocabulary, places: Sequence[Sequence[Place | None]]) -> None:
        self.model, self.words, self.places = model, words, places
        self.positives: list[list[float]] = [[] for _ in places]
        self.negatives: list[list[float]] = [[] for _ in places]
        self.held: dict[Hashable, dict[int, list[int]]] = {}
        for column, shots in enumerate(places):
            for k, place in enumerate(shots):
                if place is not None:
                    self.held.setdefault(place.image, {}).setdefault(column, []).append(k)

    def needs_copies(self, column: int) -> bool:
        """Whether a class has one shot, which no other can find."""
        return len(self.places[column]) == 1 and self.places[column][0] is not None

    def _scores(self, words: Vocabulary, dense: Dense) -> Tensor:
        """[A, N] of the prototypes."""
        first = len(words.standard)
        return class_scores(self.model, dense, words)[0, :, first : first + len(words.prototype_labels)]

    def look(self, image: Hashable, dense: Dense, boxes: Tensor) -> None:
        """One support image: each class's shots in it as found by its other shots, and its best score elsewhere.

        Args:
            dense: of the one image. boxes: [m, 4] px of the network's input.
        """
        every, held = self._scores(self.words, dense), self.held.get(image, {})
        for column, best in enumerate(best_detection(dense.boxes[0], every).tolist()):
            if column not in held:
                self.negatives[column].append(best)
                continue
            shots = held[column]
            if len(shots) < len(self.places[column]):
                score = self._scores(self.words.without(column, shots), dense)[:, column]
            else:
                score = every[:, column]
            outside = torch.ones_like(score, dtype=torch.bool)
            for k in shots:
                outside &= _share_inside(dense.boxes[0], self._box(column, k, boxes)) < INSIDE
            if outside.any():
                self.negatives[column].append(_best(score, dense, outside))
            if len(self.places[column]) > 1:
                for k in shots:
                    others = (
                        score if len(shots) == 1 else self._scores(self.words.without(column, [k]), dense)[:, column]
                    )
                    self.positives[column].append(_best_at(others, dense, self._box(column, k, boxes)))

    def _box(self, column: int, shot: int, boxes: Tensor) -> Tensor:
        place = self.places[column][shot]
        assert place is not None  # held lists those that have an image
        return boxes[place.box]

    def look_at_copy(self, column: int, dense: Dense, box: Tensor) -> None:
        """An altered copy of a class's only shot."""
        self.positives[column].append(_best_at(self._scores(self.words, dense)[:, column], dense, box))

    def proposals(self) -> dict[int, Proposal]:
        """For each prototype that a support image shows, by column, after every support image has been looked at."""
        shown = [c for c, places in enumerate(self.places) if any(place is not None for place in places)]
        every = [p for c in shown if not self.needs_copies(c) for p in self.positives[c]]
        spreads = [_centre_and_spread(n)[1] for n in self.negatives if len(n) >= FEW]
        spread = float(np.median(spreads)) if spreads else None
        return {c: propose(self.positives[c], self.negatives[c], together=None if self.needs_copies(c) else every,
                           spread=spread) for c in shown}  # fmt: skip


def _best(score: Tensor, dense: Dense, there: Tensor) -> float:
    """The best detection among the places `there` [A], of which score [A] is; 0 where there is none."""
    return float(best_detection(dense.boxes[0, there], score[there, None]))


def _best_at(score: Tensor, dense: Dense, box: Tensor) -> float:
    """The best detection among places that are the object; 0 where no box fits it."""
    return _best(score, dense, iou_matrix(box[None], dense.boxes[0])[0] >= FOUND_IOU)


def _share_inside(boxes: Tensor, outer: Tensor) -> Tensor:
    """[A] share of each box's area that lies in `outer` [4]."""
    side = (torch.minimum(boxes[:, 2:], outer[2:]) - torch.maximum(boxes[:, :2], outer[:2])).clamp(min=0)
    return side.prod(1) / (boxes[:, 2:] - boxes[:, :2]).prod(1).clamp(min=1e-6)


def propose(positives: Sequence[float], negatives: Sequence[float], *, together: Sequence[float] | None = None,
            spread: float | None = None) -> Proposal:  # fmt: skip
    """The upper end of a class's wrong scores, but between what 60 and what 48 per cent of shots score for the others.

    The upper end is TAIL standard deviations above the median of logits; the deviation is the distance to the upper
    quartile over .6745, so that a quarter of the images may show the class unlabelled (robust as in Rousseeuw & Croux
    1993), and half of it is the other classes'. What shots score for the others is a leave-one-out quantile, which
    foretells recall (Barber et al. 2021); a class's own is drawn towards that of all classes together, as five shots
    tell little of a quantile (shrinkage, Efron & Morris 1975). A class with one shot has altered copies of it, which
    are found too easily: they only say what is too high. With fewer than FEW wrong scores the upper end is .25.

    Args:
        positives: of each shot, or of each copy of a single one. negatives: the best score in each image elsewhere.
        together: the positives of all classes with several shots, these among them; None: `positives` are copies.
        spread: the median of all classes' spreads of wrong scores.
    """
    limit = USUAL
    if len(negatives) >= FEW:
        centre, own = _centre_and_spread(negatives)
        limit = _share(centre + TAIL * (own if spread is None else (own + spread) / 2))
    if together is None:
        low, high = 0.0, float(np.median(positives)) if len(positives) else 1.0
        told = f"{len(positives)} copies of its shot"
    else:
        low, high = (_shrunk(positives, together, 1 - recall) for recall in (MOST_RECALL, LEAST_RECALL))
        told = f"{counted(len(positives), 'shot')} by the others"
    threshold = max(min(max(limit, low), high), LEAST)
    few = "" if len(negatives) >= FEW else f": under {FEW}, so {USUAL}{_moved(threshold)}"
    return Proposal(threshold, f"{told}, {counted(len(negatives), 'image')} without it{few}")


def _moved(threshold: float) -> str:
    """Where a threshold went that was to be .25, in words; nothing where it stayed."""
    if f"{threshold:.3f}" == f"{USUAL:.3f}":
        return ""
    why = "the least there is" if threshold == LEAST else "which its shots reach"
    return f", {'lowered' if threshold < USUAL else 'raised'} to {threshold:.3f}, {why}"


def _shrunk(positives: Sequence[float], together: Sequence[float], share: float) -> float:
    """A class's quantile of its positives, drawn in logits towards that of all classes."""
    own, every = (float(np.quantile(_logits(scores), share)) for scores in (positives, together))
    return _share(every + (own - every) * len(positives) / (len(positives) + PRIOR_SHOTS))


def _logits(scores: Sequence[float]) -> np.ndarray:
    share = np.clip(np.asarray(scores, np.float64), TINY, 1 - TINY)
    return np.log(share / (1 - share))


def _share(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def _centre_and_spread(scores: Sequence[float]) -> tuple[float, float]:
    """Median and robust upper spread of logits."""
    centre, upper = np.quantile(_logits(scores), (0.5, 0.75))
    return float(centre), float(upper - centre) / 0.6745


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
