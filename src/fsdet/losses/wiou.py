# SPDX-License-Identifier: AGPL-3.0-or-later
"""Wise-IoU box loss, versions 1 to 3. Tong et al. 2023, https://arxiv.org/abs/2301.10051"""

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from fsdet.boxes import EPS
from fsdet.errors import ShapeError
from fsdet.floats import widen

MEAN_FLOOR = 1e-3  # beta = L / mean stays below 1000


def focusing(beta: Tensor, version: int, *, alpha: float = 1.9, delta: float = 3.0, gamma: float = 0.5) -> Tensor:
    """r(beta): 1 (v1); beta^gamma (v2, monotonic); beta / (delta alpha^(beta - delta)) (v3, fades outliers)."""
    if version == 1:
        return torch.ones_like(beta)
    if version == 2:
        return beta**gamma
    return torch.exp2((delta - beta) * math.log2(alpha) - math.log2(delta)) * beta


class _Attended(torch.autograd.Function):
    """Version 1 and 1 - IoU, with the slope of the former by hand: autograd takes five times as long over the corners.

    pred, target: [P, 4] of one dtype. Where two sides coincide the slope is the mean of those on either hand.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        # in place wherever a value is done with: in a training step every buffer starts outside of the cache
        a, b = torch.stack(pred.unbind(1)), torch.stack(target.unbind(1))  # [4, P]: strided passes cost more
        (low, high), (low_t, high_t), apart = a.split(2), b.split(2), a - b
        side = torch.minimum(high, high_t).sub_(torch.maximum(low, low_t))
        touches = torch.sign(side).add_(1).clamp_(max=1)  # sides that only meet count: they can still grow
        side, extent, extent_t = side.clamp_(min=0), (high - low).clamp_(min=0), (high_t - low_t).clamp_(min=0)
        inter = side[0] * side[1]
        union = (extent_t[0] * extent_t[1]).add_(EPS).addcmul_(extent[0], extent[1]).sub_(inter)
        iou = inter.div_(union)
        shift = (apart[:2] + apart[2:]).div_(2)
        square = shift.square().sum(0)
        cover = torch.maximum(high, high_t).sub_(torch.minimum(low, low_t)).square_().sum(0)
        cover = cover.maximum(square).add_(EPS)  # the exponent never passes 1; a clamp on it would kill its slope
        attention, miss = square.div_(cover).exp_(), 1 - iou
        # d IoU / d high = gain (1 + sign(target - high)) - cost, and alike for low with the other sign
        gain = touches.mul_(side.flip(0)).mul_((1 + iou).div_(2 * union))
        change, pull = gain - extent.flip(0).mul_(iou.div_(union)), shift.mul_(miss / cover)
        ways, slope = apart.sign_(), torch.empty_like(a)
        torch.add(pull, change, out=slope[:2]).addcmul_(gain, ways[:2])
        torch.sub(pull, change, out=slope[2:]).addcmul_(gain, ways[2:])
        ctx.save_for_backward(slope.mul_(attention))
        ctx.mark_non_differentiable(miss)
        return attention * miss, miss

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return (slope * gradient).T, None


def wiou_loss(pred: Tensor, target: Tensor, mean: Tensor | float = 1.0, version: int = 3) -> Tensor:
    """Overlap loss with a distance attention and, from version 2 on, a focus on boxes near the running mean.

        L = r(beta) R (1 - IoU),   R = exp(d^2 / (Wc^2 + Hc^2)*),   beta = (1 - IoU)* / mean,   * detached

    Args:
        pred, target: [P, 4] xyxy px, any float dtype. d is the distance of the centres, Wc, Hc the enclosing box.
            The target gets no gradient.
        mean: running mean of 1 - IoU over training; below 1e-3 it counts as 1e-3.
        version: 1, 2 or 3.
    Returns:
        [P] float32 >= 0. Disjoint boxes: e^(d^2/c^2) r <= e r. At init with mean 1 and little overlap about 1.2 (v3).
        |dL/dcoordinate| <= 3 e r / (shorter side of the target); r <= 1.32 (v3), sqrt beta (v2). NaN in, NaN out.
    Raises:
        ShapeError: unless both are [P, 4].
    """
    if pred.shape != target.shape or pred.dim() != 2 or pred.shape[1] != 4:
        raise ShapeError(f"wiou_loss expects two [P, 4] of boxes, got {list(pred.shape)} and {list(target.shape)}")
    pred = widen(pred)
    loss, miss = _Attended.apply(pred, target.detach().to(pred.dtype))
    if version == 1:
        return loss
    beta = miss / torch.as_tensor(mean, device=miss.device, dtype=miss.dtype).clamp(min=MEAN_FLOOR)
    return focusing(beta, version) * loss
