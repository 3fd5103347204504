# SPDX-License-Identifier: AGPL-3.0-or-later
"""Task-aligned assignment: which anchors answer for which box, and how much. Feng et al. 2021 (TOOD),
https://arxiv.org/abs/2108.07755, as YOLOv8 uses it. Works on the (box, anchor) pairs that can match, on nothing else.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fsdet.boxes import complete_iou, encode
from fsdet.errors import ShapeError

EPS = 1e-9
PairScore = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Assignment:
    """fg [B, A] bool: anchors that answer for a box; gt_index [B, A] int64: which one (0 where fg is False);
    weight [B, A] float32 in [0, 1]: the soft target (0 where fg is False);
    inside [B, A] bool: the anchor lies in some valid box, so it is no clear background.
    """

    fg: Tensor
    gt_index: Tensor
    weight: Tensor
    inside: Tensor


def assign(
    boxes: Tensor,
    scores: Tensor | PairScore,
    points: Tensor,
    strides: Tensor,
    gt_boxes: Tensor,
    valid: Tensor,
    reg_max: int,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> Assignment:
    """Give each box the `topk` anchors inside it with the largest score^alpha CIoU^beta; no anchor serves two boxes.

    An anchor wanted by several boxes goes to the one its prediction overlaps most, even if that one had enough.
    An anchor farther than reg_max - 1 strides from a side of the box could not predict it and is never given to it.

    Args:
        boxes: [B, A, 4] px, predictions. points, strides: [A, 2], [A] px.
        scores: [B, A, M] score in [0, 1] of each box's own class at each anchor, or a function
            (image [Q], box [Q], anchor [Q]) -> [Q] that computes it for the pairs that matter.
        gt_boxes, valid: [B, M, 4] px, [B, M] bool.
    Returns:
        Assignment; no gradient flows. weight is YOLOv8's target score: the metric over the box's best metric,
        times the box's best overlap.
    Raises:
        ShapeError: unless the shapes fit.
    """
    if boxes.dim() != 3 or boxes.shape[1:] != (len(points), 4) or gt_boxes.shape != (len(boxes), *valid.shape[1:], 4):
        raise ShapeError(
            f"assign expects boxes [B, A, 4], points [A, 2] and gt_boxes [B, M, 4], "
            f"got {list(boxes.shape)}, {list(points.shape)} and {list(gt_boxes.shape)}"
        )
    score_of = scores if callable(scores) else lambda image, box, anchor: scores[image, anchor, box]
    with torch.no_grad():
        return _assign(boxes.float(), score_of, points, strides, gt_boxes.float(), valid, reg_max, topk, (alpha, beta))


def _assign(
    boxes: Tensor,
    score_of: PairScore,
    points: Tensor,
    strides: Tensor,
    gt_boxes: Tensor,
    valid: Tensor,
    reg_max: int,
    topk: int,
    powers: tuple[float, float],
) -> Assignment:
    count_images, count_anchors = boxes.shape[:2]
    image_of, box_of = valid.nonzero(as_tuple=True)
    truth = gt_boxes[image_of, box_of]
    gt, anchor = _inside(points, truth, _least_side(strides)).nonzero(as_tuple=True)
    place = image_of[gt] * count_anchors + anchor  # position in the flattened [B, A]
    inside = torch.zeros(count_images * count_anchors, dtype=torch.bool, device=boxes.device)
    inside[place] = True
    near = (encode(points[anchor], strides[anchor], truth[gt]).amax(-1) <= reg_max - 1).nonzero().squeeze(-1)
    gt, anchor, place = gt[near], anchor[near], place[near]

    overlap = complete_iou(boxes.flatten(0, 1)[place], truth[gt]).clamp(min=0)
    score = score_of(image_of[gt], box_of[gt], anchor).float()
    metric = score.pow(powers[0]) * overlap.pow(powers[1])
    won = _settle(_best(metric, gt, len(truth), topk), gt, place, metric, overlap, inside.numel())
    won = won.nonzero().squeeze(-1)  # once: every index by a mask is a wait for the device
    gt, place, metric, overlap = gt[won], place[won], metric[won], overlap[won]
    peak = metric.new_zeros(2, len(truth))
    peak[0].scatter_reduce_(0, gt, metric, "amax")
    peak[1].scatter_reduce_(0, gt, overlap, "amax")
    fg, weight = torch.zeros_like(inside), boxes.new_zeros(len(inside))
    index = torch.zeros_like(inside, dtype=torch.long)
    fg[place] = True
    index[place] = box_of[gt]
    weight[place] = metric * peak[1][gt] / (peak[0][gt] + EPS)
    return Assignment(*(t.unflatten(0, (count_images, count_anchors)) for t in (fg, index, weight, inside)))


def _least_side(strides: Tensor) -> Tensor:
    """The second finest stride (the only one if there is one): YOLOv8 looks around smaller boxes as if they had it."""
    finest = strides.min()
    second = torch.where(strides > finest, strides, torch.inf).min()
    return torch.where(second.isinf(), finest, second)


def _inside(points: Tensor, truth: Tensor, least: Tensor) -> Tensor:
    """[G, A] bool: the point lies in the box, sides below `least` px being widened to it about the centre."""
    centre, half = (truth[:, :2] + truth[:, 2:]) / 2, (truth[:, 2:] - truth[:, :2]).maximum(least) / 2
    low, high = (centre - half).unsqueeze(-1), (centre + half).unsqueeze(-1)
    x, y = points.unbind(-1)
    return ((x - low[:, 0] > EPS) & (high[:, 0] - x > EPS)) & ((y - low[:, 1] > EPS) & (high[:, 1] - y > EPS))


def _best(metric: Tensor, gt: Tensor, boxes: int, topk: int) -> Tensor:
    """[Q] bool: the pair is among the `topk` largest metrics of its box; pairs come sorted by box."""
    count = gt.new_zeros(boxes).scatter_add_(0, gt, torch.ones_like(gt))
    most = int(count.max()) if gt.numel() else 0
    start = count.cumsum(0) - count
    table = metric.new_full((boxes, most), -1.0)
    table[gt, torch.arange(len(gt), device=gt.device) - start[gt]] = metric
    value, position = table.topk(min(topk, most), dim=1)
    chosen = torch.zeros(len(gt) + 1, dtype=torch.bool, device=gt.device)  # the last takes what is no pair
    chosen[torch.where(value != -1, position + start[:, None], len(gt))] = True
    return chosen[:-1]


def _settle(chosen: Tensor, gt: Tensor, place: Tensor, metric: Tensor, overlap: Tensor, places: int) -> Tensor:
    """[Q] bool: the pair that keeps each chosen anchor. Wanted by several boxes, it goes to the one it overlaps most;
    boxes that want it with a metric of 0, for lack of better, take what nobody else wants.
    """
    firm = chosen & (metric > 0)
    wanted = torch.zeros(places, dtype=torch.long, device=gt.device).scatter_add_(0, place, firm.long())[place]
    best = overlap.new_zeros(places).scatter_reduce_(0, place, overlap, "amax")[place]
    able = torch.where(wanted > 1, overlap == best, torch.where(wanted == 1, firm, chosen))
    claim = torch.where(able, gt, len(gt))
    owner = torch.full((places,), len(gt), device=gt.device).scatter_reduce_(0, place, claim, "amin")
    return able & (owner[place] == gt)
