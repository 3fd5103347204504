# SPDX-License-Identifier: AGPL-3.0-or-later
"""From dense logits to detections: scores of both branches in one class list, one NMS, boxes by vote, provenance."""

import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from fsdet.boxes import clip_boxes, iou_pairs
from fsdet.types import Detections

STANDARD, PROTOTYPE = 0, 1
NMS_IOU = 0.5  # above it a second box is the same object: .04 nAP50 over .7 (docs/notebook.md)
CANDIDATES = 600  # boxes an image that enter NMS; of them `limit` come out
VOTE_IOU = 0.65  # a box overlaps a detection by so much, and NMS_IOU at least,
VOICE = 0.25  # and scores at least so much of what the detection does: then it has a say in where and how sure it is
COMPANY = 4  # boxes as sure as itself, itself among them, that a detection needs for its whole score
WITNESSES = 32  # of a class that are looked at for its best detection


def select(boxes: Tensor, scores: Tensor, branch: Tensor, labels: Tensor, *, threshold: float = 0.001,
           iou: float = NMS_IOU, limit: int = 100, company: bool = True) -> list[Detections]:  # fmt: skip
    """The best boxes of each image after class-aware non-maximum suppression over both branches at once.

    A dense head says an object by many boxes, and what is none by one or two: a box scores what `in_company` leaves it,
    and is the mean, by score, of those of its class that overlap it by VOTE_IOU (box voting: Gidaris & Komodakis 2015,
    arXiv 1505.01749, section 4). Both are the same under every threshold.

    Args:
        boxes: [B, A, 4] px. scores: [B, A, T] in [0, 1], T columns of either branch.
        branch, labels: [T] where a column comes from, and the class it stands for.
        threshold: a lower score is no detection; voters are heard down to VOICE of it.
        iou: overlap above which the lower score of a class goes.
        limit: detections an image at most.
        company: False leaves each box and score as the head said it, as Ultralytics does.
    """
    batch, _, columns = scores.shape
    if not columns or not batch:
        return [_empty(boxes) for _ in range(batch)]
    out = []
    for b in range(batch):
        score, place, column = _surest(scores[b], VOICE * threshold)
        at, own = boxes[b, place], labels[column]
        m = int((score > threshold).sum())  # sorted: the first ones
        keep = batched_nms(at[:m], score[:m], own[:m], iou)  # company never raises a score
        found = at[keep], score[keep], keep
        if company:
            found = _judged(at, score, own, keep, max(iou, VOTE_IOU), limit)
        where, sure, kept = (part[found[1] > threshold][:limit] for part in found)
        out.append(Detections(where, sure, own[kept], branch[column[kept]]))
    return out


def _surest(scores: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of [A, T] scores the CANDIDATES largest above `least`, falling, and each one's place and column.

    What is too small goes before the sort: of hundreds of thousands of scores an image seldom has a thousand above it.
    """
    flat = scores.flatten()
    above = (flat > least).nonzero()[:, 0]
    value, order = flat[above].topk(min(CANDIDATES, len(above)))
    chosen = above[order]
    return value, chosen // scores.shape[1], chosen % scores.shape[1]


def _judged(boxes: Tensor, scores: Tensor, labels: Tensor, keep: Tensor, iou: float,
            limit: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of the boxes `keep` the `limit` best: [k, 4] where their company is, [k] scores `in_company`, which they were."""
    near = (box_iou(boxes[keep], boxes) >= iou) & (labels[keep][:, None] == labels)
    near[torch.arange(len(keep), device=keep.device), keep] = True  # an empty box does not even overlap itself
    voices = torch.where(near & (scores >= VOICE * scores[keep][:, None]), scores, 0.0)
    sure, order = in_company(scores[keep], voices.sum(1)).sort(descending=True, stable=True)
    order = order[:limit]
    return _mean_box(boxes, voices[order]), sure[:limit], keep[order]


def _mean_box(boxes: Tensor, weights: Tensor) -> Tensor:
    """[k, 4] means of boxes [n, 4] by weights [k, n]. No product of matrices: autocast would round it to whole px, and
    one box that is not finite would be in every mean."""
    weights = (weights / weights.sum(1, keepdim=True))[..., None]
    return torch.where(weights > 0, weights * boxes, 0.0).sum(1)


def in_company(score: Tensor, voices: Tensor) -> Tensor:
    """The score of a detection whose boxes score `voices` together, its own `score` among them.

    The mean over COMPANY boxes, those that are not there score nothing; never above its own.
    """
    return torch.minimum(voices, COMPANY * score) / COMPANY


def best_detection(boxes: Tensor, scores: Tensor) -> Tensor:
    """[N] the score that the best detection of each column has among places: boxes [A, 4] px, scores [A, N]; 0 of none.

    As `select` would have it, by the WITNESSES best places of a column.
    """
    if not len(boxes):
        return scores.new_zeros(scores.shape[1])
    value, place = scores.T.topk(min(WITNESSES, len(boxes)), dim=1)
    at = boxes[place]
    shape = (*value.shape, value.shape[1])
    one, other = (x.expand(*shape, 4).reshape(-1, 4) for x in (at[:, :, None], at[:, None]))
    near = (iou_pairs(one, other).view(shape) >= VOTE_IOU) | torch.eye(shape[1], dtype=torch.bool, device=at.device)
    heard = near & (value[:, None] >= VOICE * value[:, :, None])
    return in_company(value, torch.where(heard, value[:, None], 0.0).sum(-1)).amax(1)


def _empty(boxes: Tensor) -> Detections:
    long = torch.zeros(0, dtype=torch.int64, device=boxes.device)
    return Detections(boxes.new_zeros(0, 4), boxes.new_zeros(0), long, long.to(torch.uint8))


def to_original(found: Detections, factor: float, padding: tuple[float, float], size: tuple[int, int]) -> Detections:
    """Undo a letterbox: px of the network's input -> px of the original image of `size` (height, width), clipped."""
    shift = found.boxes.new_tensor([*padding, *padding])
    return Detections(clip_boxes((found.boxes - shift) / factor, size), found.scores, found.labels, found.branch)
