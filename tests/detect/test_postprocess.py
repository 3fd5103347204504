# SPDX-License-Identifier: AGPL-3.0-or-later
"""One class-aware NMS over both branches, with provenance, against a slow definition."""

import pytest
import torch

from fsdet.boxes import iou_matrix
from fsdet.detect import postprocess
from fsdet.detect.postprocess import best_detection, select, to_original
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


def slow_select(at, score, label, threshold, iou):
    """[(row, score, box)] of one image by the definition, best first; rows in any order."""
    found = []
    for i in slow_nms(at, score, label, iou):
        company = [j for j in range(len(at)) if j == i or (label[j] == label[i] and score[j] >= 0.25 * score[i]
                   and iou_matrix(at[i : i + 1], at[j : j + 1]).item() >= max(0.65, iou))]  # fmt: skip
        voices = sum(score[j] for j in company)
        found.append((i, min(voices, 4 * score[i]) / 4, sum(score[j] * at[j] for j in company) / voices))
    return sorted((row for row in found if row[1] > threshold), key=lambda row: -row[1])


@pytest.mark.parametrize("iou", [0.5, 0.8])
@pytest.mark.parametrize("dense", [False, True])
def test_equals_the_definition_over_both_branches(iou, dense):
    boxes, scores = crowded() if dense else scene()
    columns = scores.shape[2]
    branch, labels = torch.tensor([0, 0, 0, 1, 1], dtype=torch.uint8)[:columns], torch.tensor([0, 1, 2, 1, 3])[:columns]
    for b, found in enumerate(select(boxes, scores, branch, labels, threshold=0.1, iou=iou, limit=1000)):
        point, column = (scores[b] >= 0).nonzero(as_tuple=True)
        at, score, label = boxes[b, point], scores[b, point, column], labels[column]
        rows, wanted, places = zip(*slow_select(at, score, label, 0.1, iou), strict=True)
        torch.testing.assert_close(found.scores, torch.stack(wanted))
        torch.testing.assert_close(found.boxes, torch.stack(places))
        assert found.labels.tolist() == label[list(rows)].tolist()
        assert found.branch.tolist() == branch[column][list(rows)].tolist()
        assert not dense or (found.boxes - at[list(rows)]).abs().max() > 0.2, "nothing has moved"


def crowded(seed=0, points=80, columns=4):
    """Boxes near a few objects, as a dense head gives them."""
    g = torch.Generator().manual_seed(seed)
    centre, side = 20 + 60 * torch.rand(4, 2, generator=g), 15 + 15 * torch.rand(4, 2, generator=g)
    which = torch.randint(4, (points,), generator=g)
    corner = centre[which] - side[which] / 2 + torch.randn(points, 2, generator=g)
    boxes = torch.cat((corner, corner + side[which] + torch.randn(points, 2, generator=g)), -1)[None]
    return boxes, torch.rand(1, points, columns, generator=g) ** 2


def test_a_box_alone_has_a_quarter_of_its_score_and_one_in_company_all_of_it():
    at = torch.tensor([[0.0, 0, 20, 20], [50, 50, 70, 70]])
    boxes = torch.cat((at[:1].repeat(6, 1), at[1:]))[None]
    scores = torch.tensor([0.6, 0.6, 0.6, 0.6, 0.6, 0.05, 0.8])[None, :, None]
    [found] = select(boxes, scores, torch.zeros(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    torch.testing.assert_close(found.scores, torch.tensor([0.6, 0.2]))
    torch.testing.assert_close(found.boxes, at)
    none = torch.zeros(1, dtype=torch.int64)
    [plain] = select(boxes, scores, none.to(torch.uint8), none, company=False)
    torch.testing.assert_close(plain.scores, torch.tensor([0.8, 0.6]))
    assert torch.equal(plain.boxes, at.flip(0))


def test_the_best_detection_of_a_column_is_that_of_select():
    boxes, scores = crowded(2)
    found = select(boxes, scores, torch.zeros(4, dtype=torch.uint8), torch.arange(4), limit=1000)[0]
    best = best_detection(boxes[0], scores[0])
    told = [float(found.scores[found.labels == c].max()) for c in range(4)]
    assert best.tolist() == pytest.approx(told, rel=0.1), "by the sharpest place of an object or by one beside it"
    assert (best >= torch.tensor(told) - 1e-6).all()
    assert best_detection(boxes[0, :0], scores[0, :0]).tolist() == [0.0] * 4
    empty = torch.tensor([[3.0, 4, 3, 4]])
    assert best_detection(empty, torch.tensor([[0.8]])).tolist() == pytest.approx([0.2])


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


def test_boxes_keep_their_digits_under_autocast_and_one_that_is_not_finite_stays_alone():
    boxes, scores = crowded(3)
    branch, labels = torch.zeros(4, dtype=torch.uint8), torch.arange(4)
    [plain] = select(boxes, scores, branch, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [found] = select(boxes, scores, branch, labels)
    assert torch.equal(found.boxes, plain.boxes) and found.boxes.dtype == torch.float32
    bad = torch.cat((boxes, torch.full((1, 1, 4), torch.inf)), 1)
    [found] = select(bad, torch.cat((scores, torch.full((1, 1, 4), 0.9)), 1), branch, labels)
    assert int((~found.boxes.isfinite()).any(1).sum()) <= 4, "its own detection of each class"


def test_a_class_known_to_both_branches_is_reported_once_by_the_surer():
    boxes = torch.tensor([[[0.0, 0, 10, 10]]])
    found = select(boxes, torch.tensor([[[0.6, 0.9]]]), torch.tensor([0, 1], dtype=torch.uint8), torch.tensor([4, 4]))[
        0
    ]
    assert len(found) == 1 and found.branch.item() == 1 and abs(found.scores.item() - (0.6 + 0.9) / 4) < 1e-6


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


@pytest.mark.parametrize("several", [1, 400])
def test_places_and_columns_are_told_apart_among_what_is_sure_enough(several, monkeypatch):
    """By counting: each score is of its own place and column, and the CANDIDATES best of more than that are taken."""
    monkeypatch.setattr(postprocess, "CANDIDATES", 300)
    at = torch.arange(several * 3)
    boxes = torch.stack((30 * at, 30 * at, 30 * at + 20, 30 * at + 20), -1).float()[None]  # none near another
    scores = torch.zeros(1, len(at), 4)
    sure = torch.linspace(0.9, 0.3, several)
    scores[0, at[2::3], at[:several] % 4] = sure
    scores[0, 0, 0] = torch.nan  # says nothing, and hides nobody
    branch, labels = torch.tensor([0, 0, 1, 1], dtype=torch.uint8), torch.tensor([0, 1, 1, 2])
    [found] = select(boxes, scores, branch, labels, limit=1000, company=False)
    n = min(several, 300)
    torch.testing.assert_close(found.scores, sure[:n])
    assert torch.equal(found.boxes, boxes[0, 2::3][:n])
    column = at[:n] % 4
    assert torch.equal(found.labels, labels[column]) and torch.equal(found.branch, branch[column])


def test_equal_scores_are_chosen_the_same_where_the_places_below_the_threshold_are_gone():
    """As a predictor drops them and an exported file does not: which of many ties are candidates is the order's."""
    boxes, _ = crowded(4, points=400)
    scores = torch.full((1, 400, 5), 0.25)
    scores[0, ::3] = 0.001
    sure = (scores[0].amax(-1) > 0.1).nonzero()[:, 0]
    branch, labels = torch.zeros(5, dtype=torch.uint8), torch.arange(5)
    [whole] = select(boxes, scores, branch, labels, threshold=0.1)
    [cut] = select(boxes[:, sure], scores[:, sure], branch, labels, threshold=0.1)
    for part in ("boxes", "scores", "labels"):
        assert len(whole) and torch.equal(getattr(whole, part), getattr(cut, part))
