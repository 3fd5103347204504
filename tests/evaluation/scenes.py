# SPDX-License-Identifier: AGPL-3.0-or-later
"""Random images with annotations and imperfect detections of them, for the evaluation tests."""

from pathlib import Path

import numpy as np
import torch

from fsdet.types import Detections, ImageRecord


def boxes(rng: np.random.Generator, n: int, span: float = 200) -> np.ndarray:
    corner = rng.uniform(0, span, (n, 2))
    return np.concatenate([corner, corner + rng.uniform(5, 90, (n, 2))], 1).astype(np.float32)


def record(index: int, xyxy, labels, crowd=None, exhaustive=None) -> ImageRecord:
    xyxy = np.asarray(xyxy, np.float32).reshape(-1, 4)
    return ImageRecord(Path(f"{index}.jpg"), (320, 320), xyxy, np.asarray(labels), crowd, exhaustive)


def found(xyxy, scores, labels) -> Detections:
    xyxy = torch.as_tensor(np.asarray(xyxy, np.float32)).reshape(-1, 4)
    branch = torch.zeros(len(xyxy), dtype=torch.uint8)
    return Detections(xyxy, torch.tensor(scores).reshape(-1).float(), torch.tensor(labels).reshape(-1).long(), branch)


def scene(rng: np.random.Generator, images: int, classes: int, noise: int = 12, levels: int = 0):
    """Records and detections: jittered copies of most boxes with some wrong labels, plus `noise` false alarms an image.

    levels > 0 rounds scores to so many values, so that ties abound. A fifth of the boxes is crowd.
    """
    records, detections = [], []
    for i in range(images):
        n = int(rng.integers(0, 7))
        truth, labels, crowd = boxes(rng, n), rng.integers(0, classes, n), rng.random(n) < 0.2
        records.append(record(i, truth, labels, crowd))
        copies = np.repeat(truth, rng.integers(0, 3, n), 0) if n else truth
        owners = labels[[int(np.flatnonzero((truth == c).all(1))[0]) for c in copies]] if len(copies) else labels[:0]
        wrong = rng.random(len(owners)) < 0.15
        owners = np.where(wrong, rng.integers(0, classes, len(owners)), owners)
        extra = int(rng.integers(0, noise + 1))
        all_boxes = np.concatenate([copies + rng.normal(0, 4, copies.shape), boxes(rng, extra)])
        all_labels = np.concatenate([owners, rng.integers(0, classes, extra)])
        scores = rng.random(len(all_boxes)).astype(np.float32)
        detections.append(found(all_boxes, np.round(scores * levels) / levels if levels else scores, all_labels))
    return records, detections
