# SPDX-License-Identifier: AGPL-3.0-or-later
"""A second look: what was found is seen once more, in a window around its box and larger, and its score follows both.

Qiao et al. 2021 (DeFRCN, arXiv 2108.09017, section 3.3) let a classifier of ImageNet doubt what a detector says of a
box; here the detector doubts itself. Boxes and classes stay as they are.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fsdet.boxes import iou_pairs
from fsdet.data.collate import to_tensor
from fsdet.data.transforms import Sample, support_window
from fsdet.detect.postprocess import COMPANY
from fsdet.detect.scoring import Vocabulary, class_scores
from fsdet.models.detector import DualDetector
from fsdet.types import Detections

ZOOM = 1.6  # times as large as at the first look
LOOKS = 25  # detections of an image that are looked at, the surest ones
LEAST = 0.02  # a lower score is not worth a look, and stays
KEPT = 0.8  # of a threshold for first looks: so much of an object's score two looks leave (docs/notebook.md)
PASS = 64  # windows of a forward pass


def first_threshold(threshold: float) -> float:
    """The score at the first look below which nothing reaches `threshold` after the second."""
    return threshold if threshold <= LEAST else max(LEAST, threshold**2)


def rescored(model: DualDetector, words: Vocabulary, found: Sequence[Detections], images: Sequence[np.ndarray],
             size: int, threshold: float = 0.0) -> list[Detections]:  # fmt: skip
    """Detections above `threshold` by the geometric mean of their score and of what a second look says, best first.

    Args:
        words: what was looked for; each class of `found` is one column. found: of each image, best first, boxes in its
            px. images: uint8 [H, W, 3] as the network saw them. size: side of a window, px.
    """
    looked = [_worth_it(detections) for detections in found]
    seen = _second_looks(model, words, found, looked, images, size).split([len(chosen) for chosen in looked])
    out = []
    for detections, chosen, second in zip(found, looked, seen, strict=True):
        scores = detections.scores.clone()
        scores[chosen] = (scores[chosen] * second).sqrt()
        order = scores.sort(descending=True, stable=True).indices
        order = order[scores[order] > threshold]
        out.append(Detections(detections.boxes[order], scores[order], detections.labels[order],
                              detections.branch[order]))  # fmt: skip
    return out


def _worth_it(found: Detections) -> Tensor:
    """Places of the detections that are looked at: sure enough, and with a box to look into."""
    wide = (found.boxes[:, 2:] - found.boxes[:, :2]).amin(1) >= 1
    return ((found.scores >= LEAST) & wide).nonzero()[:LOOKS, 0]


def _second_looks(model: DualDetector, words: Vocabulary, found: Sequence[Detections], looked: Sequence[Tensor],
                  images: Sequence[np.ndarray], size: int) -> Tensor:  # fmt: skip
    """[sum of n] what the second look says of the class of each detection looked at, image after image."""
    device, windows, boxes, columns = model.head.bias.device, [], [], []
    labels = words.columns(device)[1]
    for detections, chosen, image in zip(found, looked, images, strict=True):
        sample = Sample(image, detections.boxes[chosen].cpu().numpy().astype(np.float32), np.zeros(len(chosen), int))
        for i in range(len(chosen)):
            window, box = support_window(sample, i, size, factor=ZOOM)
            windows.append(window)
            boxes.append(box)
        columns.append((detections.labels[chosen][:, None] == labels).long().argmax(1))
    if not windows:
        return torch.zeros(0, device=device)
    own, column = torch.from_numpy(np.stack(boxes).astype(np.float32)).to(device), torch.cat(columns)
    said = []
    for start in range(0, len(windows), PASS):
        part = slice(start, start + PASS)
        dense = model.dense(to_tensor(windows[part], size).to(device))
        wanted = column[part, None, None].expand(-1, dense.boxes.shape[1], 1)
        said.append(_said(dense.boxes, class_scores(model, dense, words).gather(2, wanted)[..., 0], own[part]))
    return torch.cat(said)


def _said(places: Tensor, scores: Tensor, boxes: Tensor) -> Tensor:
    """[n] what a box's company says of it, as at the first look: the mean of the COMPANY largest scores of places, each
    times IoU with the box. places [n, A, 4], scores [n, A], boxes [n, 4]."""
    around = boxes[:, None].expand_as(places)
    fit = iou_pairs(around.reshape(-1, 4), places.reshape(-1, 4)).view(scores.shape)
    return (fit * scores).topk(min(COMPANY, fit.shape[1]), dim=1).values.sum(1) / COMPANY
