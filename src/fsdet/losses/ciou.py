# SPDX-License-Identifier: AGPL-3.0-or-later
"""Complete-IoU box loss. Zheng et al. 2020, eq. 10 and 11, https://arxiv.org/abs/1911.08287"""

import math

import torch
from torch import Tensor

from fsdet.boxes import EPS, iou_pairs
from fsdet.errors import ShapeError

SIDE_EPS = 1e-3  # px: bounds the angle's gradient at an empty box


def ciou_loss(pred: Tensor, target: Tensor) -> Tensor:
    """Overlap, centre distance and aspect ratio in one loss.

        L = 1 - IoU + d^2 / c^2 + a* v,   v = 4/pi^2 (atan w_t/h_t - atan w/h)^2,   a = v / (1 - IoU + v),   * detached

    Args:
        pred, target: [P, 4] xyxy px, any float dtype. d: distance of the centres; c: diagonal of the enclosing box.
    Returns:
        [P] float32 in [0, 3). At init, little overlap: about 1.
        |dL/dcoordinate| <= 5 / (shorter side of the target) + 1.3 / (longer side of pred + 1e-3 px). NaN in, NaN out.
    Raises:
        ShapeError: unless both are [P, 4].
    """
    if pred.shape != target.shape or pred.dim() != 2 or pred.shape[-1] != 4:
        raise ShapeError(f"ciou_loss expects two [P, 4], got {list(pred.shape)} and {list(target.shape)}")
    pred, target = pred.float(), target.float()
    iou = iou_pairs(pred, target)
    cover = torch.maximum(pred[:, 2:], target[:, 2:]) - torch.minimum(pred[:, :2], target[:, :2])
    apart = (pred[:, :2] + pred[:, 2:] - target[:, :2] - target[:, 2:]) / 2
    centre = apart.square().sum(-1) / (cover.square().sum(-1) + EPS)
    (w, h), (wt, ht) = ((b[:, 2:] - b[:, :2] + SIDE_EPS).unbind(-1) for b in (pred, target))
    v = (2 / math.pi * (torch.atan2(wt, ht) - torch.atan2(w, h))).square()
    with torch.no_grad():
        share = v / (1 - iou + v + EPS)
    return 1 - iou + centre + share * v
