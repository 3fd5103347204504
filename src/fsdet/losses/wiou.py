# SPDX-License-Identifier: AGPL-3.0-or-later
"""Wise-IoU box loss, versions 1 to 3. Tong et al. 2023, https://arxiv.org/abs/2301.10051"""

import math

import torch
from torch import Tensor

from fsdet.boxes import EPS, closeness

MEAN_FLOOR = 1e-3  # beta = L / mean stays below 1000


def focusing(beta: Tensor, version: int, *, alpha: float = 1.9, delta: float = 3.0, gamma: float = 0.5) -> Tensor:
    """r(beta): 1 (v1); beta^gamma (v2, monotonic); beta / (delta alpha^(beta - delta)) (v3, fades outliers)."""
    if version == 1:
        return torch.ones_like(beta)
    if version == 2:
        return beta**gamma
    return beta / delta * torch.exp2((delta - beta) * math.log2(alpha))


def wiou_loss(pred: Tensor, target: Tensor, mean: Tensor | float = 1.0, version: int = 3) -> Tensor:
    """Overlap loss with a distance attention and, from version 2 on, a focus on boxes near the running mean.

        L = r(beta) R (1 - IoU),   R = exp(d^2 / (Wc^2 + Hc^2)*),   beta = (1 - IoU)* / mean,   * detached

    Args:
        pred, target: [P, 4] xyxy px, any float dtype. d is the distance of the centres, Wc, Hc the enclosing box.
        mean: running mean of 1 - IoU over training; below 1e-3 it counts as 1e-3.
        version: 1, 2 or 3.
    Returns:
        [P] float32 >= 0. Disjoint boxes: e^(d^2/c^2) r <= e r. At init with mean 1 and little overlap about 1.2 (v3).
        |dL/dcoordinate| <= 3 e r / (shorter side of the target); r <= 1.32 (v3). NaN in, NaN out.
    Raises:
        ShapeError: unless both are [P, 4].
    """
    iou, apart, cover = closeness(pred, target)
    loss = 1 - iou
    with torch.no_grad():
        beta = loss / torch.as_tensor(mean, device=loss.device, dtype=torch.float32).clamp(min=MEAN_FLOOR)
        weight = focusing(beta, version)
    reach = (apart / (cover.detach() + EPS)).clamp(max=1)  # 1 is its mathematical maximum
    return weight * reach.exp() * loss
