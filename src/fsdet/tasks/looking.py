# SPDX-License-Identifier: AGPL-3.0-or-later
"""A detector looks at a store of images: batch by batch, several vocabularies over one forward pass."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fsdet.data.preprocessing import Preprocessing
from fsdet.data.store import ImageStore
from fsdet.detect.postprocess import select, to_original
from fsdet.detect.rescore import first_threshold, rescored
from fsdet.detect.scoring import Vocabulary, class_scores
from fsdet.models.detector import DualDetector
from fsdet.models.heads import Dense
from fsdet.types import Detections, ImageRecord

BATCH = 16


@dataclass(frozen=True, eq=False)
class Looked:
    """Some images of a store as the network saw them, and what its head says of them.

    images: uint8 [S, S, 3]. placed: (factor, padding) of each, which `to_original` undoes. side: of a window around an
    instance, px.
    """

    records: list[ImageRecord]
    images: list[np.ndarray]
    placed: list[tuple[float, tuple[float, float]]]
    dense: Dense
    side: int


def dense_batches(model: DualDetector, store: ImageStore, prepare: Preprocessing) -> Iterator[Looked]:
    """The head's answer to every image of a store, letterboxed, in order."""
    device = model.head.bias.device
    for start in range(0, len(store.records), BATCH):
        records, images, placed = store.records[start : start + BATCH], [], []
        for i, record in enumerate(records, start):
            sample = store.sample(i)
            image, factor, padding = prepare.fitted(sample.image)
            images.append(image)
            placed.append((factor * sample.image.shape[1] / record.size[1], padding))
        dense = model.dense(prepare.tensor(images).to(device))
        yield Looked(records, images, placed, dense, prepare.support_size)


def detect_batch(model: DualDetector, seen: Looked, words: Vocabulary, threshold: float = 0.001) -> list[Detections]:
    """Detections of some images, in px of the original ones."""
    branch, labels = words.columns(seen.dense.boxes.device)
    least = first_threshold(threshold) if words.scoring.rescore else threshold
    found = select(seen.dense.boxes, class_scores(model, seen.dense, words), branch, labels, threshold=least)
    if words.scoring.rescore:
        found = rescored(model, words, found, seen.images, seen.side, threshold)
    return [to_original(d, *place, r.size) for d, place, r in zip(found, seen.placed, seen.records, strict=True)]
