# SPDX-License-Identifier: AGPL-3.0-or-later
"""VOC 2007's 11-point average precision. Everingham et al. 2010, section 4.2, doi:10.1007/s11263-009-0275-4

As the published Python evaluators compute it: boxes are pixel indices from 1 and a width counts the last pixel (+1), a
detection claims the ground truth it overlaps most or none at all, a hit on a difficult box is neither right nor wrong,
and IoU must exceed the threshold.
"""

from dataclasses import dataclass

import numpy as np

RECALL_STEPS = np.arange(0.0, 1.1, 0.1)  # its .3 is a hair above 3 / 10; kept, since published figures have it
FIRST_PIXEL = np.array([1.0, 1.0, 0.0, 0.0])  # from this package's x1 <= x < x2 to the devkit's first and last pixel
CURVE_STEPS = np.linspace(0.0, 1.0, 101)


@dataclass(frozen=True, eq=False)
class Instances:
    """Boxes of many images laid end to end: image [n], label [n] int64, boxes [n, 4] float64 xyxy px.

    score [n] float64: of detections. crowd [n] bool: of ground truth.
    """

    image: np.ndarray
    label: np.ndarray
    boxes: np.ndarray
    score: np.ndarray
    crowd: np.ndarray

    def __len__(self) -> int:
        return len(self.image)

    def select(self, rows: np.ndarray) -> "Instances":
        """The instances at `rows` (indices or mask)."""
        return Instances(self.image[rows], self.label[rows], self.boxes[rows], self.score[rows], self.crowd[rows])


def pixel_iou(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[n, 4], [m, 4] first and last pixels -> [n, m] IoU; a box from x1 to x2 is x2 - x1 + 1 wide."""
    low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = (high - low + 1).clip(min=0).prod(-1)
    size_a, size_b = (a[:, 2:] - a[:, :2] + 1).prod(-1), (b[:, 2:] - b[:, :2] + 1).prod(-1)
    return inter / (size_a[:, None] + size_b[None, :] - inter)


def best_match(found: Instances, truth: Instances) -> tuple[np.ndarray, np.ndarray]:
    """For each of n detections: IoU with, and row of, the most overlapping box of its image; (0, -1) where none.

    `found` and `truth` hold one class each, sorted by image.
    """
    iou, row = np.zeros(len(found)), np.full(len(found), -1)
    images = np.intersect1d(found.image, truth.image)
    spans = [np.searchsorted(x.image, images, side) for x in (found, truth) for side in ("left", "right")]
    for f0, f1, t0, t1 in zip(*spans, strict=True):
        matrix = pixel_iou(found.boxes[f0:f1] + FIRST_PIXEL, truth.boxes[t0:t1] + FIRST_PIXEL)
        row[f0:f1] = t0 + matrix.argmax(1)
        iou[f0:f1] = matrix.max(1)
    return iou, row


def curve(
    found: Instances, truth: Instances, threshold: float, match: tuple[np.ndarray, np.ndarray], undecided: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision after each counted detection of one class, best score first.

    match: best_match's answer. undecided [n] bool: detections that are not counted as wrong where they hit nothing.
    """
    iou, row = match
    hit = iou > threshold
    ignored = (hit & truth.crowd[row]) if len(truth) else np.zeros(len(found), bool)
    kept = np.flatnonzero(~(ignored | (undecided & ~hit)))
    kept = kept[np.argsort(-found.score[kept], kind="stable")]
    claims = np.where(hit[kept], row[kept], -1)
    first = np.zeros(len(kept), bool)
    first[np.unique(claims, return_index=True)[1]] = True  # a ground truth is found once; later claims are wrong
    right = np.cumsum(first & (claims >= 0))
    return right / (~truth.crowd).sum(), right / np.arange(1, len(kept) + 1)


def envelope(recall: np.ndarray, precision: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Highest precision at any recall >= each of `at`; 0 where that recall is never reached."""
    best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
    return best[np.searchsorted(recall, at, side="left")]


def average_precision(recall: np.ndarray, precision: np.ndarray) -> float:
    """Mean of the envelope at the eleven recalls 0, .1, ..., 1."""
    return float(envelope(recall, precision, RECALL_STEPS).mean())
