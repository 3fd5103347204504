# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which class is taken for which: the confusion matrix that Ultralytics' validation draws."""

from collections.abc import Sequence

import numpy as np
import torch

from fsdet.boxes import area, iou_matrix
from fsdet.errors import FsdetError, ShapeError, explain
from fsdet.types import Detections, ImageRecord


def confusion_matrix(
    records: Sequence[ImageRecord],
    detections: Sequence[Detections],
    num_classes: int,
    confidence: float = 0.25,
    iou: float = 0.45,
) -> np.ndarray:
    """[C + 1, C + 1] int64 counts, row = predicted, column = true; the last of each is background.

    Detections above `confidence` claim, best first and whatever their class, the free box they overlap most, if by more
    than `iou`. An unclaimed box is a miss (last row), an unused detection a false alarm (last column). Crowd boxes are
    left out, and so is an unused detection that has more than `iou` of its own area on one, or whose class the image
    does not label exhaustively.

    Raises:
        ShapeError: unless there is one Detections per record. FsdetError: a label outside 0..C-1.
    """
    if len(records) != len(detections):
        raise ShapeError(f"confusion_matrix expects detections of {len(records)} images, got {len(detections)}")
    matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for record, found in zip(records, detections, strict=True):
        labels = np.concatenate([record.labels, found.labels.cpu().numpy()])
        if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
            raise FsdetError(
                explain(
                    f"class indices 0..{num_classes - 1}",
                    f"{labels.min()}..{labels.max()}",
                    f"confusion_matrix, {record.path}",
                    "give as many classes as the data has",
                )
            )
        np.add.at(matrix, _pairs(record, found, num_classes, confidence, iou), 1)
    return matrix


def _pairs(
    record: ImageRecord, found: Detections, background: int, confidence: float, iou: float
) -> tuple[np.ndarray, np.ndarray]:
    """(predicted, true) class of every claimed box, missed box and false alarm of one image."""
    order = found.scores.argsort(descending=True, stable=True)
    order = order[found.scores[order] > confidence]
    boxes, predicted = found.boxes[order].cpu().float(), found.labels[order].cpu().numpy()
    true, truth = record.labels[~record.crowd], torch.from_numpy(record.boxes)
    claimed_by = claim(iou_matrix(truth[~record.crowd], boxes).numpy(), iou)
    missed = claimed_by < 0
    unused = np.ones(len(boxes), bool)
    unused[claimed_by[~missed]] = False
    unused &= ~on_crowd(boxes, truth[record.crowd], iou)
    if record.exhaustive is not None:
        unused &= np.isin(predicted, list(record.exhaustive))
    return (
        np.concatenate([predicted[claimed_by[~missed]], np.full(missed.sum(), background), predicted[unused]]),
        np.concatenate([true[~missed], true[missed], np.full(unused.sum(), background)]),
    )


def claim(overlap: np.ndarray, threshold: float) -> np.ndarray:
    """overlap [m, n] of m boxes with n detections, best detection first -> [m] index of the claimant, or -1."""
    overlap, claimed_by = overlap.copy(), np.full(len(overlap), -1)
    for detection in np.flatnonzero((overlap > threshold).any(0)):
        box = overlap[:, detection].argmax()
        if overlap[box, detection] > threshold:
            claimed_by[box] = detection
            overlap[box] = 0
    return claimed_by


def on_crowd(boxes: torch.Tensor, crowd: torch.Tensor, threshold: float) -> np.ndarray:
    """[n] bool: more than `threshold` of a box's own area lies on one crowd box."""
    overlap, own = iou_matrix(boxes, crowd), area(boxes)[:, None]
    shared = overlap * (own + area(crowd)[None]) / (1 + overlap)  # intersection, back from IoU
    return (shared > threshold * own).any(1).numpy()
