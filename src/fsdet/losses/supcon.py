# SPDX-License-Identifier: AGPL-3.0-or-later
"""Supervised contrastive loss, L_out. Khosla et al. 2020, eq. 2, https://arxiv.org/abs/2004.11362"""

import torch
from torch import Tensor

from fsdet.errors import ShapeError
from fsdet.floats import widen


def unit(x: Tensor) -> Tensor:
    """[..., D] rows of length 1 in float32: x rsqrt(x.x + 1e-6), whose gradient at the zero vector is at most 1e3."""
    x = widen(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def rows_with_positive(labels: Tensor) -> Tensor:
    """Indices [K] of the rows of `labels` [N] that share their label (>= 0) with another row."""
    alike = labels.sort().values  # unique() would wait for a GPU
    count = torch.searchsorted(alike, labels, right=True) - torch.searchsorted(alike, labels)
    return ((count > 1) & (labels >= 0)).nonzero().squeeze(-1)


def check_rows(name: str, embeddings: Tensor, labels: Tensor) -> None:
    """Raise ShapeError unless embeddings are [N, D] and labels [N]."""
    if embeddings.dim() != 2 or labels.shape != embeddings.shape[:1]:
        raise ShapeError(
            f"{name} expects embeddings [N, D] and labels [N], got {list(embeddings.shape)} and {list(labels.shape)}"
        )


def known_rows(name: str, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows [n, D] and labels [n] of the rows that have a label (>= 0); checked."""
    check_rows(name, embeddings, labels)
    kept = (labels >= 0).nonzero().squeeze(-1)
    return unit(embeddings[kept]), labels[kept]


def contrast(z: Tensor, labels: Tensor, rows: Tensor, others: Tensor, tau: float) -> Tensor:
    """-mean_p log softmax of row i over all other rows, for i in `rows`: the term SupCon and CPE share.

    Args:
        z: [N, D] unit rows; labels: [N] >= 0; rows: [K] anchors with a positive; others: [M, D] further negatives.
    Returns:
        [K].
    """
    anchors = z[rows] / tau
    logits = anchors @ torch.cat((z, others)).T
    with torch.no_grad():  # exp(-inf) has gradient 0 anyway, and autograd need not copy the matrix to say so
        logits[torch.arange(len(rows), device=z.device), rows] = -torch.inf
    order = labels.argsort(stable=True)
    alike = labels[order]
    classes = torch.empty_like(labels)  # numbers of classes, with gaps
    classes[order] = torch.searchsorted(alike, alike)
    sums = torch.zeros_like(z).index_add(0, classes, z)
    count = torch.zeros_like(labels).index_add(0, classes, torch.ones_like(labels))
    mine = classes[rows]
    positive = (anchors * (sums[mine] - z[rows])).sum(-1) / (count[mine] - 1)
    return logits.logsumexp(-1) - positive


def supcon_loss(embeddings: Tensor, labels: Tensor, tau: float = 0.1) -> Tensor:
    """Pull rows of one label together, against all other rows.

        L_i = -1/|P(i)| sum_{p in P(i)} log( exp(z_i.z_p / tau) / sum_{a != i} exp(z_i.z_a / tau) ),   z = x / |x|

    Args:
        embeddings: [N, D], any float dtype; normalised here.
        labels: [N] integers; rows labelled -1 take no part at all.
        tau: temperature.
    Returns:
        [K] float32, one value for each row of `rows_with_positive(labels)`; may be empty, and is then connected.
        At init, rows alike: ln(N - 1). |dL_i/dz_i| <= 2 / tau. NaN in, NaN out.
    Raises:
        ShapeError: unless the shapes are [N, D] and [N].
    """
    z, labels = known_rows("supcon_loss", embeddings, labels)
    return contrast(z, labels, rows_with_positive(labels), z[:0], tau)
