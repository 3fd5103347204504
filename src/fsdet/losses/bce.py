# SPDX-License-Identifier: AGPL-3.0-or-later
"""Binary cross-entropy over all anchors with soft targets, as in YOLOv8; from logits, never from probabilities."""

import torch.nn.functional as F
from torch import Tensor

from fsdet.errors import ShapeError
from fsdet.floats import widen


def bce_loss(logits: Tensor, target: Tensor, pos_weight: float = 1.0) -> Tensor:
    """-w t log s(z) - (1 - t) log(1 - s(z)), summed over the columns.

    Args:
        logits, target: [..., C]; target in [0, 1].
        pos_weight: w, what a positive counts beside a negative.
    Returns:
        [...] float32, nats. At init with logits at the prior p and no positives: -C ln(1 - p) = .01 C for p = .01.
        |dL/dlogit| = |s(z) - t| <= max(1, w), and never 0 for a confidently wrong column. NaN in, NaN out.
    Raises:
        ShapeError: unless the shapes are equal.
    """
    if logits.shape != target.shape:
        raise ShapeError(f"bce_loss expects equal shapes, got {list(logits.shape)} and {list(target.shape)}")
    z = widen(logits)
    weight = None if pos_weight == 1.0 else z.new_tensor(pos_weight)
    return F.binary_cross_entropy_with_logits(z, target.to(z.dtype), reduction="none", pos_weight=weight).sum(-1)


def bce_at(
    logits: Tensor, image: Tensor, anchor: Tensor, column: Tensor, weight: Tensor, known: Tensor | None = None
) -> Tensor:
    """`bce_loss` where the target is 0 but for `weight` at (image, anchor, column): no dense target is built.

    Uses  bce(z, 0) = softplus(z).

    Args:
        logits: [B, A, C]. image, anchor, column, weight: [P]; an (image, anchor) occurs at most once.
        known: [B, C] bool; a False column counts nowhere in that image but at its own positives.
    Returns:
        [B, A] float32, with bce_loss's value at init and gradient bound.
    """
    if logits.dim() != 3 or (known is not None and known.shape != (logits.shape[0], logits.shape[2])):
        raise ShapeError(
            f"bce_at expects logits [B, A, C] and known [B, C], "
            f"got {list(logits.shape)} and {None if known is None else list(known.shape)}"
        )
    z = widen(logits)
    own = F.binary_cross_entropy_with_logits(z[image, anchor, column], weight.to(z.dtype), reduction="none")
    cost = F.softplus(z)
    cost[image, anchor, column] = 0  # not cost - weight z afterwards: at 1e4 that loses every other column's digits
    rows = cost.sum(-1) if known is None else (cost @ known.to(cost.dtype).unsqueeze(-1)).squeeze(-1)
    return rows.index_put((image, anchor), own, accumulate=True)
