# SPDX-License-Identifier: AGPL-3.0-or-later
"""How well registration alone finds its own shots again, as copies pasted onto training images.

With K >= 2 each half of the shots looks for the other half; a single shot looks for altered copies of itself. A high
figure says that the embedding carries over to the new classes. No image of a test split is looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fsdet.data.collate import to_tensor
from fsdet.data.paste import Cutout, paste, rectangle, silhouette
from fsdet.data.store import ImageStore
from fsdet.data.transforms import Jitter, Sample, letterbox
from fsdet.detect.postprocess import select
from fsdet.detect.scoring import Vocabulary, class_scores
from fsdet.detect.support import embed_instances
from fsdet.evaluation.scorer import Scorer
from fsdet.models.prototypes import class_prototypes
from fsdet.tasks.loading import Trained
from fsdet.types import Detections, ImageRecord

SCENES, PASTES, BATCH = 64, 3, 16
CHANGE = Jitter(scale=0.25, flip=0.5, hsv=(0.015, 0.4, 0.3))  # of a copy
Pick = tuple[int, int]


@torch.inference_mode()
def rehearse(trained: Trained, canvases: ImageStore, shots: Mapping[int, Sequence[Pick]], store: ImageStore,
             seed: int = 0) -> float:  # fmt: skip
    """AP50 of the new classes, among the base classes, on SCENES training images with copies of the shots on them.

    Args:
        trained: before stage 3. canvases: training images. shots: {class: [(record, box) of `store`, ...]}; classes are
            numbered on from the base classes.
    """
    classes = sorted(shots)
    picks = [(c, pick) for c in classes for pick in shots[c]]
    halves = [i % 2 for c in classes for i in range(len(shots[c]))]
    alone = [len(shots[c]) == 1 for c, _ in picks]
    instances = (store.instance(*pick) for _, pick in picks)
    embeddings = embed_instances(trained.model, instances, trained.spec["support_size"])
    cutouts = [_cutouts(*store.instance(*pick)) for _, pick in picks]
    scenes, found = [], []
    for half in (0, 1):  # the other half of the shots, and single ones, are what it looks with
        hidden = [i for i, h in enumerate(halves) if h == half or alone[i]]
        known = [i for i, h in enumerate(halves) if h != half or alone[i]]
        if hidden and known:
            scenes += (
                drawn := _scenes([cutouts[i] for i in hidden], canvases, trained.spec["image_size"], (seed, 8, half))
            )
            found += _detections(trained, drawn, _words(trained, embeddings[known], [picks[i][0] for i in known]))
    records = [ImageRecord(Path(f"scene {n}"), s.image.shape[:2], s.boxes, s.labels) for n, s in enumerate(scenes)]
    return Scorer(records, max(classes) + 1).score(found).ap50(classes)


def _cutouts(sample: Sample, index: int) -> list[Cutout]:
    outlined = silhouette(sample, index)
    return [rectangle(sample, index), *([outlined] if outlined else [])]


def _scenes(cutouts: Sequence[Sequence[Cutout]], canvases: ImageStore, size: int, key: tuple[int, ...]) -> list[Sample]:
    rng = np.random.default_rng(key)
    scenes = []
    for _ in range(SCENES // 2):
        image = letterbox(canvases.sample(int(rng.integers(len(canvases.records)))).image, size)[0]
        scene = Sample(image, np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
        for i in rng.integers(len(cutouts), size=PASTES):
            scene = paste(rng, scene, cutouts[i][int(rng.integers(len(cutouts[i])))], CHANGE)
        scenes.append(scene)
    return scenes


def _words(trained: Trained, embeddings: torch.Tensor, labels: Sequence[int]) -> Vocabulary:
    """The base classes and the prototypes of these instances."""
    classes = sorted(set(labels))
    way = torch.tensor([classes.index(c) for c in labels], device=embeddings.device)
    own = trained.own(range(len(trained.spec["base"])))
    return replace(own, prototypes=class_prototypes(embeddings, way, len(classes)), prototype_labels=tuple(classes))


def _detections(trained: Trained, scenes: Sequence[Sample], words: Vocabulary) -> list[Detections]:
    device, size = trained.model.head.bias.device, trained.spec["image_size"]
    branch, labels = words.columns(device)
    found: list[Detections] = []
    for start in range(0, len(scenes), BATCH):
        images = to_tensor([s.image for s in scenes[start : start + BATCH]], size)
        dense = trained.model.dense(images.to(device))
        found += select(dense.boxes, class_scores(trained.model, dense, words), branch, labels)
    return found
