# SPDX-License-Identifier: AGPL-3.0-or-later
"""One class-aware NMS over both branches, with provenance, against a slow definition."""

import pytest
import torch

from fsdet.boxes import iou_matrix
from fsdet.detect.postprocess import select, to_original
from fsdet.types import Detections


def slow_nms(boxes, scores, labels, iou):
    kept = []
    for i in scores.argsort(descending=True).tolist():
        same = [j for j in kept if labels[j] == labels[i]]
        if all(iou_matrix(boxes[i : i + 1], boxes[j : j + 1]).item() <= iou for j in same):
            kept.append(i)
    return kept


def scene(points=60, columns=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner = 60 * torch.rand(2, points, 2, generator=g)
    boxes = torch.cat((corner, corner + 10 + 20 * torch.rand(2, points, 2, generator=g)), -1)
    return boxes, torch.rand(2, points, columns, generator=g)


def test_equals_the_definition_over_both_branches():
    boxes, scores = scene()
    branch, labels = torch.tensor([0, 0, 0, 1, 1], dtype=torch.uint8), torch.tensor([0, 1, 2, 3, 1])
    found = select(boxes, scores, branch, labels, threshold=0.3, iou=0.5, limit=1000)
    for b, d in enumerate(found):
        point, column = (scores[b] > 0.3).nonzero(as_tuple=True)
        keep = slow_nms(boxes[b, point], scores[b, point, column], labels[column], 0.5)
        torch.testing.assert_close(d.scores, scores[b, point, column][keep])
        assert d.labels.tolist() == labels[column][keep].tolist()
        assert d.branch.tolist() == branch[column][keep].tolist()


def crowded(seed=0, points=80, columns=4):
    """Boxes near a few objects, as a dense head gives them."""
    g = torch.Generator().manual_seed(seed)
    centre, side = 20 + 60 * torch.rand(4, 2, generator=g), 15 + 15 * torch.rand(4, 2, generator=g)
    which = torch.randint(4, (points,), generator=g)
    corner = centre[which] - side[which] / 2 + torch.randn(points, 2, generator=g)
    boxes = torch.cat((corner, corner + side[which] + torch.randn(points, 2, generator=g)), -1)[None]
    return boxes, torch.rand(1, points, columns, generator=g) ** 2


@pytest.mark.parametrize("iou", [0.5, 0.8])
def test_a_box_is_where_those_of_its_class_that_overlap_it_say_by_their_scores(iou):
    boxes, scores = crowded()
    branch, labels = torch.zeros(4, dtype=torch.uint8), torch.tensor([0, 1, 2, 1])
    [found] = select(boxes, scores, branch, labels, threshold=0.2, iou=iou, limit=1000)
    rows = [(boxes[0, p], scores[0, p, c], labels[c]) for p in range(80) for c in range(4)]
    at, score, label = (torch.stack(part) for part in zip(*rows, strict=True))
    keep = [i for i in slow_nms(at, score, label, iou) if score[i] > 0.2]
    wanted = []
    for i in keep:
        voters = [j for j in range(len(rows)) if label[j] == label[i] and score[j] >= 0.5 * score[i]
                  and iou_matrix(at[i : i + 1], at[j : j + 1]).item() >= max(0.65, iou)]  # fmt: skip
        wanted.append(sum(score[j] * at[j] for j in voters) / sum(score[j] for j in voters))
    assert found.labels.tolist() == label[keep].tolist()
    torch.testing.assert_close(found.boxes, torch.stack(wanted))
    assert (found.boxes - at[keep]).abs().max() > 0.2, "nothing has moved"


def test_a_box_does_not_depend_on_the_threshold_it_is_asked_for_with():
    boxes, scores = crowded(1)
    branch, labels = torch.zeros(4, dtype=torch.uint8), torch.arange(4)
    [everything] = select(boxes, scores, branch, labels, limit=1000)
    [sure] = select(boxes, scores, branch, labels, threshold=float(everything.scores.median()), limit=1000)
    assert 0 < len(sure) < len(everything)
    for part in ("boxes", "scores", "labels"):
        torch.testing.assert_close(getattr(sure, part), getattr(everything, part)[: len(sure)])


def test_boxes_without_area_stay_where_they_are():
    boxes = torch.tensor([[[3.0, 4, 3, 4], [3, 4, 3, 9], [50, 50, 60, 60]]])
    found = select(
        boxes, torch.tensor([[[0.9], [0.8], [0.7]]]), torch.zeros(1, dtype=torch.uint8), torch.zeros(1).long()
    )
    assert torch.equal(found[0].boxes, boxes[0])


def test_a_class_known_to_both_branches_is_reported_once_by_the_surer():
    boxes = torch.tensor([[[0.0, 0, 10, 10]]])
    found = select(boxes, torch.tensor([[[0.6, 0.9]]]), torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([4, 4]))[
        0
    ]
    assert len(found) == 1 and found.branch.item() == 1 and abs(found.scores.item() - 0.9) < 1e-6


def test_limit_threshold_and_nothing_to_look_for():
    boxes, scores = scene()
    branch, labels = torch.zeros(5, dtype=torch.uint8), torch.arange(5)
    assert all(len(d) == 7 for d in select(boxes, scores, branch, labels, iou=1.0, limit=7))
    assert all(len(d) == 0 for d in select(boxes, scores, branch, labels, threshold=1.0))
    assert all(len(d) == 0 for d in select(boxes, scores[..., :0], branch[:0], labels[:0]))


def test_back_to_the_original_image():
    one = torch.ones(1)
    found = Detections(torch.tensor([[10.0, 18, 200, 30]]), one, one.long(), one.to(torch.uint8))
    moved = to_original(found, 0.5, (0.0, 16.0), (100, 200))
    assert moved.boxes.tolist() == [[20.0, 4.0, 200.0, 28.0]]
