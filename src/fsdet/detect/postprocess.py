# SPDX-License-Identifier: AGPL-3.0-or-later
"""From dense logits to detections: scores of both branches in one class list, one NMS, boxes by vote, provenance."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from fsdet.boxes import clip_boxes
from fsdet.types import Detections

STANDARD, PROTOTYPE = 0, 1
NMS_IOU = 0.5  # above it a second box is the same object: .04 nAP50 over .7 (docs/notebook.md)
CANDIDATES = 600  # boxes an image that enter NMS; of them `limit` come out
VOTE_IOU = 0.65  # a box overlaps a detection by so much, and NMS_IOU at least,
VOICE = 0.5  # and scores at least so much of what the detection does: then it has a say in where the object ends


def select(boxes: Tensor, scores: Tensor, branch: Tensor, labels: Tensor, *, threshold: float = 0.001,
           iou: float = NMS_IOU, limit: int = 100) -> list[Detections]:  # fmt: skip
    """The best boxes of each image after class-aware non-maximum suppression over both branches at once, each where
    those of its class that it suppressed say together: their mean by score (box voting: Gidaris & Komodakis 2015, arXiv
    1505.01749, section 4). A box is the same under every threshold.

    Args:
        boxes: [B, A, 4] px. scores: [B, A, T] in [0, 1], T columns of either branch.
        branch, labels: [T] where a column comes from, and the class it stands for.
        threshold: a lower score is no detection; voters are heard down to VOICE of it.
        iou: overlap above which the lower score of a class goes.
        limit: detections an image at most.
    """
    batch, points, columns = scores.shape
    if not columns or not batch:
        return [_empty(boxes) for _ in range(batch)]
    value, flat = scores.flatten(1).topk(min(CANDIDATES, points * columns), dim=1)
    column = flat % columns
    chosen = boxes.gather(1, (flat // columns).unsqueeze(-1).expand(-1, -1, 4))
    label = labels[column]
    out = []
    for b in range(batch):
        n = int((value[b] > VOICE * threshold).sum())  # sorted: the first n
        keep = batched_nms(chosen[b, :n], value[b, :n], label[b, :n], iou)
        keep = keep[value[b, keep] > threshold][:limit]
        voted = _voted(chosen[b, :n], value[b, :n], label[b, :n], keep, max(iou, VOTE_IOU))
        out.append(Detections(voted, value[b, keep], label[b, keep], branch[column[b, keep]]))
    return out


def _voted(boxes: Tensor, scores: Tensor, labels: Tensor, keep: Tensor, iou: float) -> Tensor:
    """[kept, 4] means of `boxes` by score, each over those with its label that overlap it and have a say."""
    near = box_iou(boxes[keep], boxes) >= iou
    near[torch.arange(len(keep), device=keep.device), keep] = True  # an empty box does not even overlap itself
    heard = near & (labels[keep][:, None] == labels) & (scores >= VOICE * scores[keep][:, None])
    weights = torch.where(heard, scores, 0.0)
    return (weights / weights.sum(1, keepdim=True)) @ boxes


def _empty(boxes: Tensor) -> Detections:
    long = torch.zeros(0, dtype=torch.int64, device=boxes.device)
    return Detections(boxes.new_zeros(0, 4), boxes.new_zeros(0), long, long.to(torch.uint8))


def to_original(found: Detections, factor: float, padding: tuple[float, float], size: tuple[int, int]) -> Detections:
    """Undo a letterbox: px of the network's input -> px of the original image of `size` (height, width), clipped."""
    shift = found.boxes.new_tensor([*padding, *padding])
    return Detections(clip_boxes((found.boxes - shift) / factor, size), found.scores, found.labels, found.branch)
