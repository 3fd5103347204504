# SPDX-License-Identifier: AGPL-3.0-or-later
"""Box arithmetic: areas, overlaps, anchor points, and the way between bins, distances and boxes.

Boxes are xyxy; units are px unless a name says strides. Everything is float32 whatever comes in
(`closeness` and `complete_iou`, which losses are made of, leave float64 as it is).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fsdet.errors import ShapeError
from fsdet.floats import widen

EPS = 1e-7  # px^2: keeps 0 / 0 at zero, far below any real area
SIDE_EPS = 1e-3  # px: bounds the gradient of an empty box's aspect ratio


def xywh_to_xyxy(boxes: Tensor) -> Tensor:
    """[..., 4] centre x, centre y, width, height -> corners."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), -1)


def xyxy_to_xywh(boxes: Tensor) -> Tensor:
    """[..., 4] corners -> centre x, centre y, width, height."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) / 2, high - low), -1)


def area(boxes: Tensor) -> Tensor:
    """[..., 4] -> [...] px^2; 0 for boxes whose corners are swapped."""
    width, height = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).unbind(-1)
    return width * height


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """[..., 4] boxes cut at the edges of an image of size (height, width) px."""
    height, width = size
    limit = boxes.new_tensor([width, height, width, height])
    return boxes.clamp(min=0).minimum(limit)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    side = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    inter = side[..., 0] * side[..., 1]
    return inter / (area(a) + area(b) - inter + EPS)


def iou_pairs(a: Tensor, b: Tensor) -> Tensor:
    """IoU of row i of `a` [n, 4] with row i of `b` [n, 4] -> [n] float32 in [0, 1]; two empty boxes give 0."""
    if a.shape != b.shape or a.shape[-1:] != (4,):
        raise ShapeError(f"iou_pairs expects two [n, 4], got {list(a.shape)} and {list(b.shape)}")
    return _iou(a.float(), b.float())


def closeness(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What the IoU family of losses is made of, for row i of `a` [n, 4] and row i of `b` [n, 4].

    Returns:
        [n] float32 each: IoU; squared distance of the centres, px^2; squared diagonal of the enclosing box, px^2.
    """
    if a.shape != b.shape or a.dim() != 2 or a.shape[1] != 4:
        raise ShapeError(f"expected two [n, 4] of boxes, got {list(a.shape)} and {list(b.shape)}")
    # coordinate-major: on slices of [n, 4] the strided passes cost half as much again
    (low, high), (low_b, high_b) = (torch.stack(widen(x).unbind(1)).split(2) for x in (a, b))
    side = (torch.minimum(high, high_b) - torch.maximum(low, low_b)).clamp(min=0)
    (width, height), (width_b, height_b) = (high - low).clamp(min=0), (high_b - low_b).clamp(min=0)
    inter = side[0] * side[1]
    iou = inter / (width * height + (width_b * height_b + EPS) - inter)
    apart = (low + high - (low_b + high_b)).square().sum(0) / 4
    cover = (torch.maximum(high, high_b) - torch.minimum(low, low_b)).square().sum(0)
    return iou, apart, cover


def complete_iou(a: Tensor, b: Tensor) -> Tensor:
    """CIoU of row i of `a` [n, 4] and row i of `b` [n, 4] -> [n] float32 in (-2, 1]. Zheng et al. 2020, eq. 10 and 11.

    IoU less the centres' distance over the enclosing diagonal, squared, and the difference of the aspect ratios.
    """
    a, b = widen(a), widen(b)  # before any difference: one of half-precision pixels is off by px
    iou, apart, cover = closeness(a, b)
    (w, h), (wb, hb) = ((x[:, 2:] - x[:, :2]).T.contiguous() + SIDE_EPS for x in (a, b))
    v = (2 / math.pi * (torch.atan2(wb, hb) - torch.atan2(w, h))).square()
    with torch.no_grad():
        share = v / (1 - iou + v + EPS)
    return iou - apart / (cover + EPS) - share * v


def iou_matrix(a: Tensor, b: Tensor) -> Tensor:
    """IoU of every row of `a` [n, 4] with every row of `b` [m, 4] -> [n, m] float32."""
    if a.shape[-1:] != (4,) or b.shape[-1:] != (4,) or a.dim() != 2 or b.dim() != 2:
        raise ShapeError(f"iou_matrix expects [n, 4] and [m, 4], got {list(a.shape)} and {list(b.shape)}")
    return _iou(a.float()[:, None], b.float()[None])


def anchor_points(
    shapes: Sequence[tuple[int, int]], strides: Sequence[int], device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Cell centres of feature maps of (height, width) cells: points [A, 2] x, y px and the stride [A] px of each.

    Levels follow one another in the order given; within a level rows run first, as in `map.flatten(2)`.
    """
    points, of_point = [], []
    for (height, width), stride in zip(shapes, strides, strict=True):
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) * stride
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) * stride
        points.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2))
        of_point.append(torch.full((height * width,), float(stride), device=device))
    return torch.cat(points), torch.cat(of_point)


def decode(box_logits: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Boxes from bin scores: each side lies at the expectation of its bins, in strides from the anchor point.

    Args:
        box_logits: [..., A, 4, R], any float dtype; sides left, top, right, bottom.
        points, strides: [A, 2] px, [A] px.
    Returns:
        [..., A, 4] float32 xyxy px. Corners never swap. Under half-precision autocast the same expectation
        is off by px, so it runs outside autocast.
    """
    with torch.autocast(box_logits.device.type, enabled=False):
        bins = torch.arange(box_logits.shape[-1], device=box_logits.device, dtype=torch.float32)
        distance = (box_logits.float().softmax(-1) @ bins) * strides[:, None].float()
        low, high = distance.split(2, -1)
        return torch.cat((points.float() - low, points.float() + high), -1)


def encode(points: Tensor, strides: Tensor, boxes: Tensor) -> Tensor:
    """Distances [P, 4] left, top, right, bottom from points [P, 2] px to the sides of boxes [P, 4] px, in strides [P].

    Not clamped: negative where the point is outside, above R - 1 where the level cannot reach.
    """
    boxes, points = boxes.float(), points.float()
    distance = torch.cat((points - boxes[..., :2], boxes[..., 2:] - points), -1)
    return distance / strides.float()[..., None]
