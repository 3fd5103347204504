# SPDX-License-Identifier: AGPL-3.0-or-later
"""From support instances to unit prototypes.

A plain average over the instance's region scored nAP50 0.000 after base training: most cells inside a box are trained
as background, so their average points where background points. Asking the detector for its own answer works: the
embeddings of the points whose decoded boxes best overlap the support box, weighted by IoU^2.
"""

import torch
from torch import Tensor

from fsdet.boxes import iou_matrix
from fsdet.models.heads import Dense, unit

TOP = 10  # points an instance is read from; the assigner gives each training box as many


def pool_instances(dense: Dense, boxes: Tensor, how: str = "anchors") -> Tensor:
    """One unit embedding per support image.

    Args:
        dense: the head's answer to S support images, A points each.
        boxes: [S, 4] xyxy px, the instance in each of them.
        how: "anchors" (the points whose decoded boxes fit, see above), "roi" (points in the box, Gaussian by distance
            from its centre, on the level that fits its size), "both" (their mean).
    Returns:
        [S, D] float32 unit rows. Weights carry no gradient, embeddings do.
    """
    with torch.no_grad():
        weights = []
        if how in ("anchors", "both"):
            weights.append(_fit_weights(dense, boxes))
        if how in ("roi", "both"):
            weights.append(_roi_weights(dense, boxes))
        weight = torch.stack(weights).mean(0)
    return unit((weight.unsqueeze(1) @ dense.embeddings.float()).squeeze(1))


def _fit_weights(dense: Dense, boxes: Tensor) -> Tensor:
    """[S, A] weights, rows sum to 1: IoU^2 of the TOP best decoded boxes; the nearest point where none overlaps."""
    if not len(boxes):
        return dense.embeddings.new_zeros(dense.embeddings.shape[:2])
    iou = torch.stack([iou_matrix(b[None], p)[0] for b, p in zip(boxes, dense.boxes, strict=True)])
    value, index = iou.topk(min(TOP, iou.shape[1]), dim=1)
    weight = torch.zeros_like(iou).scatter_(1, index, value.square())
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    nearest = torch.cdist(centre, dense.points).argmin(1, keepdim=True)
    weight = weight.scatter_add(1, nearest, torch.full_like(value[:, :1], 1e-6))
    return weight / weight.sum(1, keepdim=True)


def _roi_weights(dense: Dense, boxes: Tensor) -> Tensor:
    """[S, A] weights, rows sum to 1: Gaussian of half the box's size at its centre, on the level fitting its size."""
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    wanted = size.prod(1).sqrt().unsqueeze(1) / 4  # a box is some four cells wide on its level
    level = (dense.strides.unique().unsqueeze(0).log2() - wanted.log2()).abs().argmin(1)
    fits = dense.strides.unsqueeze(0) == dense.strides.unique()[level].unsqueeze(1)
    offset = (dense.points.unsqueeze(0) - centre.unsqueeze(1)) / (size / 2).unsqueeze(1)
    weight = torch.exp(-2 * offset.square().sum(-1)) * fits + 1e-12
    return weight / weight.sum(1, keepdim=True)


def class_prototypes(instances: Tensor, way: Tensor, ways: int) -> Tensor:
    """Mean of each way's unit embeddings, renormalised: [S, D], way [S] in 0..N-1 -> [N, D]; K may differ by way."""
    total = instances.new_zeros(ways, instances.shape[-1]).index_add(0, way, instances)
    count = way.new_zeros(ways).index_add(0, way, torch.ones_like(way))  # bincount would wait for the device
    return unit(total / count.clamp(min=1).unsqueeze(1))
