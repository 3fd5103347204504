# SPDX-License-Identifier: AGPL-3.0-or-later
"""Embeddings of prototypes, shots and objects of the images looked at, in a plane."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fsdet.data.store import ImageStore
from fsdet.detect.support import embed_instances
from fsdet.models.detector import DualDetector
from fsdet.tasks.webpage.exhibit import Places

A_CLASS, IN_ALL = 8, 320  # objects of the images that are embedded
PLAIN = ((1.0, False),)  # one view of each


def plane(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """(points [n, 2], the share of the variance that they keep): principal components of `rows` [n, D], n from 1 up.

    The larger entries of each axis are positive, so that the same rows give the same map.
    """
    centred = rows - rows.mean(0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:2] * np.sign(axes[:2].sum(1, keepdims=True) + 1e-12)
    points = centred @ axes.T
    points = np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    return points, float((sizes[:2] ** 2).sum() / max((sizes**2).sum(), 1e-12))


def places_of(model: DualDetector, store: ImageStore, support_size: int, classes: Sequence[int],
              prototypes: Tensor, shots: Mapping[int, Tensor]) -> Places:  # fmt: skip
    """The map of some classes: prototypes [N, D], shown as they are compared, shots {label: [K, D]}, and
    objects of a store's images."""
    picks = _objects(store, classes)
    objects = embed_instances(model, (store.instance(i, j) for _, i, j in picks), support_size, PLAIN)
    rows, labels, kinds = [model.head.refined(prototypes)], list(classes), ["prototype"] * len(classes)
    for label, found in shots.items():
        rows.append(found)
        labels += [label] * len(found)
        kinds += ["shot"] * len(found)
    every = torch.cat([*(r.to(objects.device) for r in rows), objects]).float().cpu().numpy().astype(np.float64)
    points, share = plane(every)
    return Places(points, [*labels, *(label for label, _, _ in picks)], [*kinds, *["query"] * len(picks)], share)


def _objects(store: ImageStore, classes: Sequence[int]) -> list[tuple[int, int, int]]:
    """(label, record, box) of the first objects of each class that are no crowd."""
    most = max(1, min(A_CLASS, IN_ALL // max(len(classes), 1)))
    left = dict.fromkeys(classes, most)
    picks = []
    for i, record in enumerate(store.records):
        for j in np.flatnonzero(~record.crowd).tolist():
            label = int(record.labels[j])
            if left.get(label):
                left[label] -= 1
                picks.append((label, i, j))
    return picks
