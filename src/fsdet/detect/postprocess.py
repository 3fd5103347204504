# SPDX-License-Identifier: AGPL-3.0-or-later
"""From dense logits to detections: scores of both branches in one class list, one class-aware NMS, provenance."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from fsdet.boxes import clip_boxes
from fsdet.types import Detections

STANDARD, PROTOTYPE = 0, 1
NMS_IOU = 0.5  # above it a second box is the same object: .04 nAP50 over .7 (docs/notebook.md)
CANDIDATES = 600  # boxes an image that enter NMS; of them `limit` come out


def select(boxes: Tensor, scores: Tensor, branch: Tensor, labels: Tensor, *, threshold: float = 0.001,
           iou: float = NMS_IOU, limit: int = 100) -> list[Detections]:  # fmt: skip
    """The best boxes of each image after class-aware non-maximum suppression over both branches at once.

    Args:
        boxes: [B, A, 4] px. scores: [B, A, T] in [0, 1], T columns of either branch.
        branch, labels: [T] where a column comes from, and the class it stands for.
        threshold: a lower score is no detection. iou: overlap above which the lower score of a class goes.
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
        n = int((value[b] > threshold).sum())  # sorted: the first n
        keep = batched_nms(chosen[b, :n], value[b, :n], label[b, :n], iou)[:limit]
        out.append(Detections(chosen[b, keep], value[b, keep], label[b, keep], branch[column[b, keep]]))
    return out


def _empty(boxes: Tensor) -> Detections:
    long = torch.zeros(0, dtype=torch.int64, device=boxes.device)
    return Detections(boxes.new_zeros(0, 4), boxes.new_zeros(0), long, long.to(torch.uint8))


def to_original(found: Detections, factor: float, padding: tuple[float, float], size: tuple[int, int]) -> Detections:
    """Undo a letterbox: px of the network's input -> px of the original image of `size` (height, width), clipped."""
    shift = found.boxes.new_tensor([*padding, *padding])
    return Detections(clip_boxes((found.boxes - shift) / factor, size), found.scores, found.labels, found.branch)
