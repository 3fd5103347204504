# SPDX-License-Identifier: AGPL-3.0-or-later
"""Box arithmetic agrees with torchvision and Ultralytics, and stays exact in half precision and at empty boxes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou
from ultralytics.utils.tal import bbox2dist, dist2bbox, make_anchors

from fsdet import boxes
from fsdet.errors import ShapeError

SHAPES, STRIDES = [(6, 8), (3, 4), (2, 2)], (8, 16, 32)


def random_boxes(n, seed=0, size=300.0):
    g = torch.Generator().manual_seed(seed)
    corner = size * torch.rand(n, 2, generator=g)
    return torch.cat((corner, corner + 1 + size / 2 * torch.rand(n, 2, generator=g)), -1)


def test_anchor_points_are_the_librarys_in_pixels():
    feats = [torch.zeros(1, 1, *s) for s in SHAPES]
    points, strides = make_anchors(feats, torch.tensor(STRIDES), 0.5)
    ours, of_point = boxes.anchor_points(SHAPES, STRIDES)
    torch.testing.assert_close(ours, points * strides)
    torch.testing.assert_close(of_point, strides.squeeze(-1))


def test_anchor_points_refuse_a_level_without_a_stride():
    with pytest.raises(ValueError):
        boxes.anchor_points(SHAPES, (8, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decode_is_the_librarys_expectation_in_every_dtype_and_under_autocast(dtype):
    points, strides = boxes.anchor_points(SHAPES, STRIDES)
    logits = (4 * torch.randn(2, len(points), 4, 16, generator=torch.Generator().manual_seed(1))).to(dtype)
    distance = logits.double().softmax(-1) @ torch.arange(16.0).double()
    want = dist2bbox(distance, points.double() / strides[:, None], xywh=False) * strides[:, None]
    with torch.autocast("cpu", torch.bfloat16):
        got = boxes.decode(logits, points, strides)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-3)


def test_decode_of_uniform_bins_lies_seven_and_a_half_strides_away():
    got = boxes.decode(torch.zeros(1, 1, 4, 16), torch.tensor([[100.0, 60.0]]), torch.tensor([8.0]))
    torch.testing.assert_close(got, torch.tensor([[[40.0, 0.0, 160.0, 120.0]]]))


def test_decode_passes_nan_on():
    logits = torch.zeros(1, 1, 4, 16)
    logits[0, 0, 2, 3] = torch.nan
    got = boxes.decode(logits, torch.zeros(1, 2), torch.ones(1))[0, 0]
    assert got.isnan().tolist() == [False, False, True, False]


def test_encode_is_the_librarys_distance_in_strides_where_it_does_not_saturate():
    points, strides = torch.full((20, 2), 150.0), torch.full((20,), 16.0)
    low = 150 * torch.rand(20, 2, generator=torch.Generator().manual_seed(2))
    truth = torch.cat((low, 300 - low), -1)
    want = bbox2dist(points / 16, truth / 16, 15)
    torch.testing.assert_close(boxes.encode(points, strides, truth), want)


def test_encode_keeps_what_lies_outside_and_beyond():
    got = boxes.encode(torch.tensor([[10.0, 10.0]]), torch.tensor([8.0]), torch.tensor([[18.0, 2.0, 170.0, 10.0]]))
    torch.testing.assert_close(got, torch.tensor([[-1.0, 1.0, 20.0, 0.0]]))


def test_encode_then_decode_returns_the_box():
    point, stride, truth = torch.tensor([[52.0, 44.0]]), torch.tensor([8.0]), torch.tensor([[20.0, 11.0, 90.0, 61.0]])
    distance = boxes.encode(point, stride, truth)
    low = distance.floor().long()
    share = distance - low
    p = torch.zeros(1, 1, 4, 16).scatter(-1, low[None, ..., None], 1 - share[None, ..., None])
    p = p.scatter(-1, low[None, ..., None] + 1, share[None, ..., None])
    torch.testing.assert_close(boxes.decode(p.log(), point, stride)[0], truth, rtol=1e-5, atol=1e-4)


def test_iou_matrix_is_torchvisions_and_pairs_are_its_diagonal():
    a, b = random_boxes(12), random_boxes(12, seed=1)
    torch.testing.assert_close(boxes.iou_matrix(a, b[:7]), box_iou(a, b[:7]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(boxes.iou_pairs(a, b), box_iou(a, b).diagonal(), rtol=1e-5, atol=1e-6)


def test_iou_of_half_precision_pixels_does_not_overflow():
    a = torch.tensor([[0.0, 0.0, 2000.0, 1500.0]])
    assert boxes.iou_pairs(a.half(), a.half()).item() == pytest.approx(1)


def test_iou_of_empty_boxes_and_of_no_boxes_is_zero_and_finite():
    point = torch.tensor([[5.0, 5.0, 5.0, 5.0]])
    assert boxes.iou_pairs(point, point).item() == 0
    assert boxes.iou_matrix(point[:0], point).shape == (0, 1)
    assert boxes.iou_pairs(torch.tensor([[9.0, 9.0, 1.0, 1.0]]), torch.tensor([[0.0, 0.0, 10.0, 10.0]])).item() == 0


def test_closeness_is_overlap_centre_distance_and_enclosing_diagonal():
    a, b = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([[6.0, 0.0, 16.0, 10.0]])
    iou, apart, cover = boxes.closeness(a, b)
    assert iou.item() == pytest.approx(40 / 160)
    assert apart.item() == pytest.approx(36)
    assert cover.item() == pytest.approx(16**2 + 10**2)


def test_clip_cuts_at_width_and_height():
    got = boxes.clip_boxes(torch.tensor([[-5.0, 3.0, 700.0, 500.0]]), (480, 640))
    assert got.tolist() == [[0.0, 3.0, 640.0, 480.0]]


def test_area_of_swapped_corners_is_zero():
    assert boxes.area(torch.tensor([[0.0, 0.0, 4.0, 3.0], [4.0, 3.0, 0.0, 0.0]])).tolist() == [12.0, 0.0]


side = st.floats(0.5, 500, width=32)
coordinate = st.floats(-500, 500, width=32)
box = st.tuples(coordinate, coordinate, side, side)


@settings(max_examples=40, deadline=None)
@given(box, box)
def test_iou_is_symmetric_within_one_and_one_on_itself(a, b):
    a, b = (boxes.xywh_to_xyxy(torch.tensor([x])) for x in (a, b))
    iou = boxes.iou_pairs(a, b)
    assert 0 <= iou.item() <= 1 + 1e-6
    torch.testing.assert_close(iou, boxes.iou_pairs(b, a))
    assert boxes.iou_pairs(a, a).item() == pytest.approx(1, abs=1e-3)


@settings(max_examples=40, deadline=None)
@given(box)
def test_corners_and_centres_are_two_ways_to_say_a_box(b):
    b = torch.tensor([b])
    torch.testing.assert_close(boxes.xyxy_to_xywh(boxes.xywh_to_xyxy(b)), b, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("function", [boxes.iou_pairs, boxes.closeness])
def test_pairs_refuse_unequal_counts(function):
    with pytest.raises(ShapeError, match=r"\[2, 4\]"):
        function(torch.zeros(2, 4), torch.zeros(3, 4))


def test_matrix_refuses_what_is_no_box():
    with pytest.raises(ShapeError):
        boxes.iou_matrix(torch.zeros(2, 4), torch.zeros(2, 5))
