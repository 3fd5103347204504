# SPDX-License-Identifier: AGPL-3.0-or-later
"""Samples to an Episode of tensors: padded, masked, mapped to the labels of both branches, checked on the host."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fsdet.data.transforms import Sample
from fsdet.errors import DataError, explain
from fsdet.types import BACKGROUND, IGNORED, Episode, Targets


def to_tensor(images: Sequence[np.ndarray], size: int) -> Tensor:
    """uint8 [size, size, 3] images -> [n, 3, size, size] float32 in [0, 1], channels-last in memory."""
    if not len(images):
        return torch.zeros(0, 3, size, size)
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(torch.float32).div_(255)


def targets_of(samples: Sequence[Sample], num_base: int, class_ids: Sequence[int], image_ids: Sequence[str]) -> Targets:
    """Boxes and the labels that each branch sees.

    A class below `num_base` is its own standard label; a class in `class_ids` is the way at its position there.
    A box of a class that a branch does not know is background for that branch when the class of the box is one that
    the branch could tell apart from its own, which is always: it is a labelled object of another class.
    Raises:
        DataError: for a box that is not finite, naming the image.
    """
    rows = max(1, max((len(s.boxes) for s in samples), default=0))
    boxes = np.zeros((len(samples), rows, 4), np.float32)
    base = np.full((len(samples), rows), IGNORED, np.int64)
    ways = np.full((len(samples), rows), IGNORED, np.int64)
    valid = np.zeros((len(samples), rows), bool)
    way_of = {c: i for i, c in enumerate(class_ids)}
    for b, sample in enumerate(samples):
        m = len(sample.boxes)
        if not np.isfinite(sample.boxes).all():
            raise DataError(explain("finite boxes", "NaN or inf", image_ids[b], "run fsdet data check"))
        boxes[b, :m], valid[b, :m] = sample.boxes, True
        base[b, :m] = np.where(sample.labels < num_base, sample.labels, BACKGROUND)
        ways[b, :m] = [way_of.get(int(c), BACKGROUND) for c in sample.labels]
    base_known = np.array([[s.known is None or c in s.known for c in range(num_base)] for s in samples], bool)
    way_known = np.array([[s.known is None or c in s.known for c in class_ids] for s in samples], bool)
    arrays = (boxes, base, ways, valid, base_known.reshape(len(samples), num_base),
              way_known.reshape(len(samples), len(class_ids)))  # fmt: skip
    return Targets(*(torch.from_numpy(a) for a in arrays))


def collate(index: int, samples: Sequence[Sample], image_ids: Sequence[str], num_base: int, size: int,
            windows: Sequence[tuple[np.ndarray, np.ndarray]] = (), window_way: Sequence[int] = (),
            class_ids: Sequence[int] = (), support_size: int = 32) -> Episode:  # fmt: skip
    """Query samples and support windows (image, box) with their way -> one Episode."""
    boxes = np.stack([b for _, b in windows]) if windows else np.zeros((0, 4), np.float32)
    return Episode(
        index, to_tensor([s.image for s in samples], size), targets_of(samples, num_base, class_ids, image_ids),
        to_tensor([w for w, _ in windows], support_size), torch.from_numpy(boxes.astype(np.float32)),
        torch.tensor(list(window_way), dtype=torch.int64), torch.tensor(list(class_ids), dtype=torch.int64),
        tuple(image_ids))  # fmt: skip
