# SPDX-License-Identifier: AGPL-3.0-or-later
"""Triplet loss with batch-hard or semi-hard mining. Hermans et al. 2017, https://arxiv.org/abs/1703.07737,
Schroff et al. 2015, https://arxiv.org/abs/1503.03832"""

import torch
from torch import Tensor

from fsdet.errors import ConfigError, ShapeError, did_you_mean
from fsdet.losses.supcon import check_rows, rows_with_positive, unit

MINING = ("batch_hard", "semi_hard")


def triplet_rows(labels: Tensor, background: int = 0) -> Tensor:
    """Indices [K] of the rows that have a positive and a negative, `background` rows counting as negatives."""
    rows = rows_with_positive(labels)
    if background:
        return rows
    known = labels[labels >= 0]
    return rows[(known[None] != labels[rows, None]).any(-1)]


@torch.no_grad()
def mine(z: Tensor, labels: Tensor, rows: Tensor, others: Tensor, mining: str) -> tuple[Tensor, Tensor]:
    """The farthest positive of each row, and a negative: the nearest one (batch_hard), or the nearest that is farther
    than that positive and, where there is none, the farthest (semi_hard). Indices [K] into z, and into z + others.
    """
    cos = z[rows] @ torch.cat((z, others)).T
    same = labels[rows, None] == torch.cat((labels, labels.new_full((len(others),), -1)))
    least, positive = cos.masked_fill(~same, torch.inf).min(-1)  # a row itself is its nearest like, so never this one
    cos.masked_fill_(same, -torch.inf)
    if mining == "batch_hard":
        return positive, cos.argmax(-1)
    value, negative = cos.masked_fill(cos >= least[:, None], -torch.inf).max(-1)
    none = (value == -torch.inf).nonzero().squeeze(-1)
    negative[none] = cos[none].masked_fill(same[none], torch.inf).argmin(-1)
    return positive, negative


def triplet_loss(
    embeddings: Tensor,
    labels: Tensor,
    margin: float = 0.3,
    mining: str = "batch_hard",
    background: Tensor | None = None,
) -> Tensor:
    """A row is nearer to its farthest like than to an unlike one, by a margin.

        L_i = max(0, d(i, p) - d(i, n) + m),   d(a, b) = |z_a - z_b|^2 = 2 - 2 z_a.z_b,   z = x / |x|

    Args:
        embeddings: [N, D], any float dtype; normalised here.
        labels: [N]; rows labelled -1 take no part.
        background: [M, D] rows that are negatives of every row and anchors of none.
    Returns:
        [K] float32, one value for each row of `triplet_rows(labels, M)`, 0 where the margin holds; may be empty, and
        is then connected. At init, rows alike: m. |dL_i/dz_i| <= 4. NaN in, NaN out.
    Raises:
        ShapeError: unless the shapes fit. ConfigError: unknown mining.
    """
    check_rows("triplet_loss", embeddings, labels)
    background = embeddings[:0] if background is None else background
    if background.shape[1:] != embeddings.shape[1:]:
        raise ShapeError(f"triplet_loss expects background [M, {embeddings.shape[1]}], got {list(background.shape)}")
    if mining not in MINING:
        hint = did_you_mean(mining, MINING)
        raise ConfigError(f"loss.triplet_mining: expected one of {list(MINING)}, got {mining!r}.{hint}")
    kept = (labels >= 0).nonzero().squeeze(-1)
    z, labels, others = unit(embeddings[kept]), labels[kept], unit(background)
    rows = triplet_rows(labels, len(others))
    positive, negative = mine(z, labels, rows, others, mining) if len(rows) else (rows, rows)
    anchor, every = z[rows], torch.cat((z, others))
    return (2 * (anchor * (every[negative] - z[positive])).sum(-1) + margin).clamp(min=0)
