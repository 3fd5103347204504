# SPDX-License-Identifier: AGPL-3.0-or-later
"""Losses as older trainings clamped them, kept for comparison and off unless a configuration asks for them.

Each returns its rows, and which of them a clamp has saturated: those are the rows it does not learn from.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fsdet.errors import ShapeError
from fsdet.floats import widen
from fsdet.losses.cpe import cpe_parts
from fsdet.losses.dfl import neighbours
from fsdet.losses.supcon import known_rows, rows_with_positive

PROBABILITY = 1e-6  # least probability of a bin
TERM = 20.0  # most that a side may cost
MEAN = 15.0  # most that all rows may cost on average, the four sides summed
LOGIT = 10.0  # largest logit of focal and of contrast, either sign


def dfl_clamped(logits: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    """`dfl_loss` through p >= 1e-6, sides <= 20 and, the four sides summed, a mean over the rows <= 15.

    Returns:
        [P] float32, mean over the four sides, and [P] bool: a clamp took part of the row's gradient, or all of it.
        At init ln R, as dfl_loss. |dL/dlogit| <= 1/4, and 0 where the true bin is less likely than 1e-6 or where
        the mean is above 15 (3.75 a side, which uniform bins with a little noise reach).
    """
    index, share = neighbours("dfl_clamped", logits, distance)
    p = widen(logits).softmax(-1).gather(-1, index)
    sides = -(p.clamp(min=PROBABILITY).log() * share).sum(-1)
    saturated = (((p < PROBABILITY) & (share > 0)).any(-1) | (sides > TERM)).any(-1)
    rows = sides.clamp(max=TERM).sum(-1)
    mean = rows.detach().mean()
    over = mean > MEAN
    return torch.where(over, rows.detach() * (MEAN / mean), rows) / 4, saturated | over


def focal_clamped(
    logits: Tensor, target: Tensor, gamma: float = 2.0, alpha: float | None = None
) -> tuple[Tensor, Tensor]:
    """`focal_loss` of logits clamped to +-10.

    Returns:
        [...] float32 and [...] bool: a column of the row is beyond +-10. At init C 2^-gamma ln 2, as focal_loss;
        |dL/dlogit| as there, and 0 beyond +-10.
    """
    if logits.shape != target.shape:
        raise ShapeError(f"focal_clamped expects equal shapes, got {list(logits.shape)} and {list(target.shape)}")
    z, t = widen(logits), widen(target)
    s = z.clamp(-LOGIT, LOGIT).sigmoid()
    p = s * t + (1 - s) * (1 - t)
    loss = (1 - p) ** gamma * -p.log()
    if alpha is not None:
        loss = loss * (alpha * t + (1 - alpha) * (1 - t))
    return loss.sum(-1), (z.abs() > LOGIT).any(-1)


def supcon_clamped(embeddings: Tensor, labels: Tensor, tau: float = 0.1) -> tuple[Tensor, Tensor]:
    """`supcon_loss` of similarities clamped to +-10 (at tau .07: every cosine beyond .7), rows in its order.

    Returns:
        [K] float32 and [K] bool: some similarity of the row is clamped. Identical rows: ln(N - 1), as supcon_loss.
        |dL_i/dz_i| <= 2 / tau, and 0 where every similarity of the row is clamped.
    """
    z, labels = known_rows("supcon_clamped", embeddings, labels)
    return _contrast(z, labels, rows_with_positive(labels), z[:0], tau)


def cpe_clamped(
    embeddings: Tensor,
    iou: Tensor,
    labels: Tensor,
    background: Tensor | None = None,
    tau: float = 0.2,
    phi: float = 0.7,
    weighting: str = "linear",
) -> tuple[Tensor, Tensor]:
    """`cpe_loss` of similarities clamped to +-10 (they reach it where tau < .1), rows in its order.

    Returns:
        [K] float32 and [K] bool: some similarity of the row is clamped. Identical rows: g(u) ln(N + M - 1).
        |dL_i/dz_i| <= 2 g(u) / tau, and 0 where every similarity of the row is clamped.
    """
    weight, *parts = cpe_parts("cpe_clamped", embeddings, iou, labels, background, phi, weighting)
    rows, saturated = _contrast(*parts, tau)
    return weight * rows, saturated


def _contrast(z: Tensor, labels: Tensor, rows: Tensor, others: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """The term of supcon.contrast with every similarity clamped."""
    logits = z[rows] @ torch.cat((z, others)).T / tau
    own = F.one_hot(rows, len(z) + len(others)).bool() if len(rows) else torch.zeros_like(logits, dtype=torch.bool)
    beyond = ((logits.abs() > LOGIT) & ~own).any(-1)
    logits = logits.clamp(-LOGIT, LOGIT)
    positive = (labels[rows, None] == torch.cat((labels, labels.new_full((len(others),), -1)))) & ~own
    mean = (logits * positive).sum(-1) / positive.sum(-1)
    return logits.masked_fill(own, -torch.inf).logsumexp(-1) - mean, beyond
