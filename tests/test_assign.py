# SPDX-License-Identifier: AGPL-3.0-or-later
"""assign() is Ultralytics' TaskAlignedAssigner where that is well defined, and keeps its own promises elsewhere."""

import pytest
import torch
from ultralytics.utils.tal import TaskAlignedAssigner

from fsdet.assign import assign
from fsdet.boxes import anchor_points, decode, encode
from fsdet.errors import ShapeError

STRIDES = (8, 16, 32)


def grid(size):
    return anchor_points([(size // s, size // s) for s in STRIDES], STRIDES)


def scene(seed, images=2, boxes=6, classes=4, size=256, largest=70.0):
    g = torch.Generator().manual_seed(seed)
    points, strides = grid(size)
    logits = 2 * torch.randn(images, len(points), 4, 16, generator=g)
    corner = 0.7 * size * torch.rand(images, boxes, 2, generator=g)
    truth = torch.cat((corner, corner + 4 + largest * torch.rand(images, boxes, 2, generator=g)), -1)
    labels = torch.randint(classes, (images, boxes), generator=g)
    scores = torch.rand(images, len(points), classes, generator=g)
    valid = torch.rand(images, boxes, generator=g) > 0.2
    return decode(logits, points, strides), scores, points, strides, truth, labels, valid


def of_own_class(scores, labels):
    return scores.gather(2, labels[:, None].expand(-1, scores.shape[1], -1))


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_library_on_random_scenes(seed):
    boxes, scores, points, strides, truth, labels, valid = scene(seed)
    library = TaskAlignedAssigner(topk=10, num_classes=4, alpha=0.5, beta=6.0, stride=list(STRIDES))
    mask = valid[..., None].float()
    _, _, target, fg, index = library(scores, boxes, points, labels[..., None], truth, mask)
    got = assign(boxes, of_own_class(scores, labels), points, strides, truth, valid, reg_max=16)
    weight = target.sum(-1)
    real = (weight > 0) | (got.weight > 0)  # the library fills up with arbitrary anchors of metric 0
    assert real.sum() > 20
    torch.testing.assert_close(got.weight, weight, rtol=1e-3, atol=1e-5)
    assert torch.equal(got.fg[real], fg[real])
    assert torch.equal(got.gt_index[real], index[real])


def test_a_function_of_pairs_scores_like_the_dense_tensor():
    boxes, scores, points, strides, truth, labels, valid = scene(3)
    dense = of_own_class(scores, labels)
    a = assign(boxes, dense, points, strides, truth, valid, 16)
    b = assign(boxes, lambda image, box, anchor: dense[image, anchor, box], points, strides, truth, valid, 16)
    assert torch.equal(a.weight, b.weight) and torch.equal(a.gt_index, b.gt_index)


def test_no_anchor_serves_two_identical_boxes_and_both_are_not_lost():
    points, strides = grid(128)
    truth = torch.tensor([[[20.0, 20.0, 90.0, 90.0]] * 2])
    boxes = truth[:, :1].expand(1, len(points), 4)
    scores, valid = torch.rand(1, len(points), 2, generator=torch.Generator().manual_seed(0)), torch.ones(1, 2).bool()
    got = assign(boxes, scores, points, strides, truth, valid, 16)
    assert set(got.gt_index[got.fg].tolist()) == {0, 1}
    assert (got.weight[got.fg] > 0).all()
    same = assign(boxes, scores[..., :1].expand(-1, -1, 2), points, strides, truth, valid, 16)
    assert same.fg.sum() == 10 and (same.gt_index[same.fg] == 0).all()


def test_an_anchor_wanted_by_two_goes_to_the_one_it_overlaps_most():
    points, strides = anchor_points([(1, 1)], (32,))
    truth = torch.tensor([[[0.0, 0.0, 40.0, 40.0], [0.0, 0.0, 32.0, 32.0]]])
    boxes = torch.tensor([[[0.0, 0.0, 33.0, 33.0]]])
    got = assign(boxes, torch.tensor([[[1.0, 0.01]]]), points, strides, truth, torch.ones(1, 2, dtype=torch.bool), 16)
    assert got.gt_index.tolist() == [[1]]


@pytest.mark.parametrize("reg_max", [4, 16])
def test_boxes_that_a_level_cannot_reach_are_not_assigned_there(reg_max):
    points, strides = grid(320)
    truth = torch.tensor([[[10.0, 10.0, 310.0, 300.0]]])
    boxes = truth.expand(1, len(points), 4)
    scores, valid = torch.ones(1, len(points), 1), torch.ones(1, 1, dtype=torch.bool)
    got = assign(boxes, scores, points, strides, truth, valid, reg_max, topk=2000)
    distance = encode(points, strides, truth[0].expand(len(points), 4))
    reachable = (distance.amin(-1) > 0) & (distance.amax(-1) <= reg_max - 1)
    assert torch.equal(got.fg[0], reachable)
    assert not got.fg[0][strides == 8].any()
    assert got.fg.any() == (reg_max == 16)


def test_a_box_smaller_than_a_cell_still_finds_anchors():
    points, strides = grid(64)
    truth = torch.tensor([[[30.0, 30.0, 33.0, 33.0]]])
    got = assign(
        truth.expand(1, len(points), 4),
        torch.ones(1, len(points), 1),
        points,
        strides,
        truth,
        torch.tensor([[True]]),
        16,
    )
    assert got.fg.sum() >= 1
    assert got.weight.max().item() == pytest.approx(1, abs=1e-3)


def test_fewer_anchors_than_topk():
    points, strides = anchor_points([(2, 2)], (16,))
    truth = torch.tensor([[[0.0, 0.0, 32.0, 32.0]]])
    got = assign(truth.expand(1, 4, 4), torch.ones(1, 4, 1), points, strides, truth, torch.tensor([[True]]), 16)
    assert got.fg.tolist() == [[True] * 4]


@pytest.mark.parametrize("boxes", [0, 3])
def test_no_box_at_all_and_only_padding(boxes):
    points, strides = grid(64)
    truth = torch.tensor([0.0, 0.0, 50.0, 50.0]).expand(2, boxes, 4)
    pred, scores = torch.zeros(2, len(points), 4), torch.ones(2, len(points), boxes)
    got = assign(pred, scores, points, strides, truth, torch.zeros(2, boxes, dtype=torch.bool), 16)
    assert not got.fg.any() and not got.inside.any()
    assert got.weight.sum() == 0 and got.gt_index.sum() == 0


def test_many_boxes_keep_every_promise():
    boxes, scores, points, strides, truth, labels, _ = scene(5, boxes=120, largest=40.0)
    valid = torch.ones_like(labels, dtype=torch.bool)
    got = assign(boxes, of_own_class(scores, labels), points, strides, truth, valid, 16)
    assert got.weight.isfinite().all() and ((got.weight >= 0) & (got.weight <= 1)).all()
    assert (got.weight[~got.fg] == 0).all()


def test_at_most_topk_anchors_a_box_and_the_best_are_kept():
    points, strides = grid(128)
    truth = torch.tensor([[[16.0, 16.0, 112.0, 112.0]]])
    scores = torch.rand(1, len(points), 1, generator=torch.Generator().manual_seed(0))
    valid = torch.tensor([[True]])
    got = assign(truth.expand(1, len(points), 4), scores, points, strides, truth, valid, 16, topk=3)
    everyone = assign(truth.expand(1, len(points), 4), scores, points, strides, truth, valid, 16, topk=10_000)
    assert got.fg.sum() == 3
    assert scores[0, got.fg[0], 0].min() >= scores[0, (everyone.fg & ~got.fg)[0], 0].max()


def test_inside_marks_every_anchor_in_a_valid_box_chosen_or_not():
    points, strides = grid(128)
    truth = torch.tensor([[[16.0, 16.0, 112.0, 112.0], [0.0, 0.0, 12.0, 12.0]]])
    boxes, scores = truth[:, :1].expand(1, len(points), 4), torch.ones(1, len(points), 2)
    got = assign(boxes, scores, points, strides, truth, torch.tensor([[True, False]]), 16)
    want = ((points > 16) & (points < 112)).all(-1)
    assert torch.equal(got.inside[0], want)


def test_prediction_without_overlap_leaves_weights_zero_and_finite():
    points, strides = grid(64)
    boxes = torch.full((1, len(points), 4), 1e6)
    truth = torch.tensor([[[4.0, 4.0, 60.0, 60.0]]])
    got = assign(boxes, torch.zeros(1, len(points), 1), points, strides, truth, torch.tensor([[True]]), 16)
    assert got.weight.abs().sum() == 0


def test_a_nan_box_is_not_hidden():
    points, strides = grid(64)
    truth = torch.tensor([[[4.0, 4.0, 60.0, 60.0]]])
    boxes = truth.expand(1, len(points), 4).clone()
    boxes[0, 9] = torch.nan
    got = assign(boxes, torch.ones(1, len(points), 1), points, strides, truth, torch.tensor([[True]]), 16)
    assert got.fg[0, 9] and got.weight.sum().isnan()


def test_no_gradient_flows():
    boxes, scores, points, strides, truth, labels, valid = scene(0)
    dense = of_own_class(scores, labels).requires_grad_()
    assert not assign(boxes.requires_grad_(), dense, points, strides, truth, valid, 16).weight.requires_grad


def test_refuses_boxes_of_another_pyramid():
    points, strides = grid(64)
    with pytest.raises(ShapeError, match="points"):
        assign(
            torch.zeros(1, 5, 4),
            torch.zeros(1, 5, 1),
            points,
            strides,
            torch.zeros(1, 1, 4),
            torch.ones(1, 1).bool(),
            16,
        )
