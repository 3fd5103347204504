# SPDX-License-Identifier: AGPL-3.0-or-later
"""One class-aware NMS over both branches, with provenance, against a slow definition."""

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
