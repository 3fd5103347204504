# SPDX-License-Identifier: AGPL-3.0-or-later
"""Focal loss for one-hot or binary targets. Lin et al. 2017, eq. 4, https://arxiv.org/abs/1708.02002"""

import torch.nn.functional as F
from torch import Tensor

from fsdet.errors import ShapeError
from fsdet.floats import widen


def focal_loss(logits: Tensor, target: Tensor, gamma: float = 2.0, alpha: float | None = None) -> Tensor:
    """(1 - p_t)^gamma (-log p_t), summed over the columns, in log space: no clamp is needed.

        L = exp(gamma logsigmoid(-s z)) softplus(-s z),   s = +1 where target is 1, -1 where it is 0

    Args:
        logits, target: [..., C]; target is 0 or 1.
        alpha: share of the positives' weight, 1 - alpha for the negatives; None leaves both at 1.
    Returns:
        [...] float32, nats. At init with zero logits: C 2^-gamma ln 2. |dL/dlogit| <= 1.13
        for gamma <= 2, 1.32 for gamma = 5; 1 for a confidently wrong column. NaN in, NaN out.
    Raises:
        ShapeError: unless the shapes are equal.
    """
    if logits.shape != target.shape:
        raise ShapeError(f"focal_loss expects equal shapes, got {list(logits.shape)} and {list(target.shape)}")
    z, t = widen(logits), widen(target)
    right = z * (2 * t - 1)
    loss = (gamma * F.logsigmoid(-right)).exp() * -F.logsigmoid(right)
    if alpha is not None:
        loss = loss * (alpha * t + (1 - alpha) * (1 - t))
    return loss.sum(-1)
