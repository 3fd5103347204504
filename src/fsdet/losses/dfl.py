# SPDX-License-Identifier: AGPL-3.0-or-later
"""Distribution focal loss. Li et al. 2020, eq. 6, https://arxiv.org/abs/2006.04388"""

import torch
from torch import Tensor

from fsdet.errors import ShapeError
from fsdet.floats import widen


def neighbours(name: str, logits: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the two bins around each distance, and their shares of the target: [P, 4, 2] int64 and float.

    Raises:
        ShapeError: unless the shapes are [P, 4, R >= 2] and [P, 4].
    """
    bins = logits.shape[-1]
    if logits.shape != (*distance.shape, bins) or distance.shape[-1:] != (4,) or bins < 2:
        raise ShapeError(
            f"{name} expects logits [P, 4, R>=2] and distance [P, 4], "
            f"got {list(logits.shape)} and {list(distance.shape)}"
        )
    d = widen(distance.detach()).clamp(0, bins - 1)
    lower = d.long().clamp(0, bins - 2)  # whatever a NaN becomes is a bin; lower + 1 is always one
    share = d - lower
    return torch.stack((lower, lower + 1), -1), torch.stack((1 - share, share), -1)


def dfl_loss(logits: Tensor, distance: Tensor) -> Tensor:
    """Cross-entropy between a side's bins and the two bins around its true distance.

        L = -[(1 - a) log p_i + a log p_{i+1}],   i = floor(d),  a = d - i,  p = softmax(logits)

    Args:
        logits: [P, 4, R] bin scores, any float dtype; sides are left, top, right, bottom.
        distance: [P, 4] anchor-to-side distance in strides; saturates at 0 and at R - 1.
    Returns:
        [P] float32, mean over the four sides, nats. At init (uniform bins): ln R = 2.77 for R = 16.
        |dL/dlogit| <= 1/4 everywhere, so callers have nothing to clamp. NaN in, NaN out.
    Raises:
        ShapeError: unless the shapes are [P, 4, R >= 2] and [P, 4].
    """
    index, share = neighbours("dfl_loss", logits, distance)
    return -(widen(logits).log_softmax(-1).gather(-1, index) * share).sum(-1).mean(-1)
