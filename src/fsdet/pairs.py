# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which rows the pairwise losses compare: labelled ones balanced over classes, and confident background."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fsdet.peers import Peers


@dataclass(frozen=True, eq=False)
class PairRows:
    """What the pairwise losses see: image [N], -1 of another process; label, iou [N]; embeddings z [N, D], projections
    p [N, Dp]; of the background back_z [K, D], back_p [K, Dp].
    """

    image: Tensor
    label: Tensor
    iou: Tensor
    z: Tensor
    p: Tensor
    back_z: Tensor
    back_p: Tensor


def balanced(label: Tensor, weight: Tensor, rows: int) -> Tensor:
    """At most `rows` indices with a label: the best of each class, then the second best of each, and so on."""
    order = (label >= 0).nonzero().squeeze(-1)
    order = order[weight[order].argsort(descending=True, stable=True)]
    order = order[label[order].argsort(stable=True)]
    alike = label[order]
    rank = torch.arange(len(order), device=label.device) - torch.searchsorted(alike, alike)  # 0: the first of its class
    return order[rank.argsort(stable=True)[:rows]]


def background(score: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Image and anchor of at most `rows` of the highest scores [B, A], best first; one of -inf is never among them."""
    value, place = score.flatten().topk(min(rows, score.numel()))
    place = place[value > -torch.inf]
    return place // score.shape[1], place % score.shape[1]


def pooled(own: PairRows, weight: Tensor, score: Tensor, most: int, peers: Peers) -> PairRows:
    """The rows that one process with the images of all would have chosen; only its own carry gradient.

    Args:
        own: the candidates of this process, background included. weight: [N] that the assigner gave the labelled ones.
        score: [K] confidence of the background ones. most: how many are chosen, at most a quarter of them background.
    """
    facts = torch.stack([v.float() for v in (own.image, own.label, own.iou, weight)], 1)
    rows = torch.cat((own.z.float(), own.p.float(), facts), 1)
    back = torch.cat((own.back_z.float(), own.back_p.float(), score[:, None]), 1)
    (rows, mine), (back, _) = peers.rows(rows, back)
    widths = own.z.shape[1], own.p.shape[1]
    z, p, facts = rows.split((*widths, facts.shape[1]), 1)
    image, label, iou, weight = facts.detach().unbind(1)
    away = torch.ones_like(image, dtype=torch.bool)
    away[mine] = False
    image, label = image.long().masked_fill(away, -1), label.long()
    back = back[back[:, -1].topk(min(most // 4, len(back))).indices]
    back_z, back_p, _ = back.split((*widths, 1), 1)
    keep = balanced(label, weight, most - len(back))
    return PairRows(image[keep], label[keep], iou[keep], z[keep], p[keep], back_z, back_p)
