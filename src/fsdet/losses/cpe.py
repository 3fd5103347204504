# SPDX-License-Identifier: AGPL-3.0-or-later
"""Contrastive proposal encoding loss. Sun et al. 2021 (FSCE), eq. 3 to 5, https://arxiv.org/abs/2103.05950"""

import torch
from torch import Tensor

from fsdet.errors import ConfigError, ShapeError, did_you_mean
from fsdet.floats import widen
from fsdet.losses.supcon import contrast, known_rows, rows_with_positive, unit

WEIGHTINGS = {"one": torch.ones_like, "linear": torch.clone, "exp": torch.expm1}


def cpe_rows(labels: Tensor, iou: Tensor, phi: float) -> Tensor:
    """Indices [K] of the anchors of CPE: rows that have a positive and overlap their box by at least phi."""
    rows = rows_with_positive(labels)
    return rows[iou[rows] >= phi]


def cpe_parts(
    name: str, embeddings: Tensor, iou: Tensor, labels: Tensor, background: Tensor | None, phi: float, weighting: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """f(u) [K], then what `contrast` takes: unit rows, their labels, the anchors [K] and unit background; checked."""
    background = embeddings[:0] if background is None else background
    if iou.shape != labels.shape or background.shape[1:] != embeddings.shape[1:]:
        raise ShapeError(
            f"{name} expects iou {list(labels.shape)} and background [M, {embeddings.shape[1]}], "
            f"got {list(iou.shape)} and {list(background.shape)}"
        )
    if weighting not in WEIGHTINGS:
        hint = did_you_mean(weighting, WEIGHTINGS)
        raise ConfigError(f"loss.cpe_weighting: expected one of {list(WEIGHTINGS)}, got {weighting!r}.{hint}")
    u = widen(iou[labels >= 0].detach())
    z, labels = known_rows(name, embeddings, labels)
    rows = cpe_rows(labels, u, phi)
    return WEIGHTINGS[weighting](u[rows]), z, labels, rows, unit(background)


def cpe_loss(
    embeddings: Tensor,
    iou: Tensor,
    labels: Tensor,
    background: Tensor | None = None,
    tau: float = 0.2,
    phi: float = 0.7,
    weighting: str = "linear",
) -> Tensor:
    """SupCon over box proposals, each weighted by how well it lies on its object.

        L_i = f(u_i) SupCon_i,   f(u) = 1{u >= phi} g(u),   g = 1 | u | e^u - 1

    Args:
        embeddings: [N, D] projected rows, any float dtype; normalised here.
        iou: [N] overlap u of each proposal's decoded box with its ground truth; detached here.
        labels: [N]; rows labelled -1 take no part.
        background: [M, D] projected background proposals: in every denominator, never an anchor.
    Returns:
        [K] float32, one value for each row of `cpe_rows(labels, iou, phi)`. At init, rows alike: g(u) ln(N + M - 1).
        |dL_i/dz_i| <= 2 g(u) / tau. NaN in, NaN out.
    Raises:
        ShapeError: unless the shapes fit. ConfigError: unknown weighting.
    """
    weight, *parts = cpe_parts("cpe_loss", embeddings, iou, labels, background, phi, weighting)
    return weight * contrast(*parts, tau)
