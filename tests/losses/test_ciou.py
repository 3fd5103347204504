# SPDX-License-Identifier: AGPL-3.0-or-later
"""ciou_loss is torchvision's and Ultralytics' on real boxes, and finite with a bounded gradient on unreal ones."""

import math

import pytest
import torch
from torchvision.ops import complete_box_iou_loss
from ultralytics.utils.metrics import bbox_iou

from fsdet.errors import ShapeError
from fsdet.losses.ciou import ciou_loss

POINT, UNIT = [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 1.0, 1.0]
FAR = [1e6, 1e6, 1e6 + 9, 1e6 + 7]


def pairs(n=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner = 200 + 60 * torch.rand(2, n, 2, generator=g)
    return torch.cat((corner, corner + 8 + 90 * torch.rand(2, n, 2, generator=g)), -1).unbind(0)


def test_equals_torchvision_and_the_library():
    pred, target = pairs()
    got = ciou_loss(pred, target)
    torch.testing.assert_close(got, complete_box_iou_loss(pred, target), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got, 1 - bbox_iou(pred, target, xywh=False, CIoU=True).squeeze(-1), rtol=1e-4, atol=1e-5)


def test_gradient_is_torchvisions_in_float64():
    pred, target = pairs(seed=1)
    wide = pred.double().requires_grad_()
    (want,) = torch.autograd.grad(complete_box_iou_loss(wide, target.double()).sum(), wide)
    (got,) = torch.autograd.grad(ciou_loss(pred.requires_grad_(), target).sum(), pred)
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-6)


def test_worked_example():
    """IoU 50/150; centres 5 apart, enclosing 15 x 10; equal shapes, so no angle: 2/3 + 25/325."""
    loss = ciou_loss(torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([[5.0, 0.0, 15.0, 10.0]]))
    assert loss.item() == pytest.approx(2 / 3 + 25 / 325, rel=1e-5)


def test_the_angle_term_alone():
    """Same centre, 20 x 10 against 10 x 20: IoU 1/3, v = 4/pi^2 (atan 2 - atan .5)^2."""
    v = 4 / math.pi**2 * (math.atan(2) - math.atan(0.5)) ** 2
    loss = ciou_loss(torch.tensor([[-10.0, -5.0, 10.0, 5.0]]), torch.tensor([[-5.0, -10.0, 5.0, 10.0]]))
    assert loss.item() == pytest.approx(2 / 3 + v * v / (2 / 3 + v), rel=1e-3)


def test_starts_near_one_where_little_overlaps():
    """Boxes of 15 strides of 8 px about the anchor, as uniform bins decode to, against objects of 20 px in them."""
    pred, target = torch.tensor([[0.0, 0.0, 120.0, 120.0]]), torch.tensor([[50.0, 55.0, 70.0, 75.0]])
    assert ciou_loss(pred, target).item() == pytest.approx(1 - 1 / 36, abs=0.01)


def test_a_perfect_box_costs_nothing():
    pred, _ = pairs()
    torch.testing.assert_close(ciou_loss(pred, pred), torch.zeros(len(pred)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("pred", [POINT, UNIT, FAR, [5.0, 0.0, 5.0, 9.0], [9.0, 9.0, 1.0, 1.0], [-1e4, -1e4, 1e4, 1e4]])
@pytest.mark.parametrize("target", [POINT, UNIT, FAR, [0.0, 5.0, 9.0, 5.0]])
def test_degenerate_boxes_are_finite_in_value_and_gradient(pred, target):
    p = torch.tensor([pred], requires_grad=True)
    loss = ciou_loss(p, torch.tensor([target]))
    loss.sum().backward()
    swapped = pred[0] > pred[2]  # no box at all: finite is all that can be asked
    assert loss.isfinite().all() and (swapped or 0 <= loss.item() < 3)
    assert p.grad.isfinite().all()


def test_gradient_is_bounded_as_promised():
    g = torch.Generator().manual_seed(3)
    pred, target = pairs(4000, seed=2)
    pred = torch.cat(
        (pred[:, :2], pred[:, :2] + (pred[:, 2:] - pred[:, :2]) * 10 ** -(5 * torch.rand(4000, 1, generator=g))), -1
    )
    pred.requires_grad_()
    ciou_loss(pred, target).sum().backward()
    size, side = (pred[:, 2:] - pred[:, :2]).detach(), (target[:, 2:] - target[:, :2]).amin(-1)
    bound = 5 / side + 1.3 / (size.amax(-1) + 1e-3)
    assert (pred.grad.abs().amax(-1) <= bound).all()


def test_the_angle_of_a_vanishing_box_has_a_bounded_gradient():
    pred = torch.tensor([[50.0, 50.0, 50.00001, 50.0]], requires_grad=True)
    ciou_loss(pred, torch.tensor([[46.0, 0.0, 54.0, 200.0]])).sum().backward()
    assert 1 < pred.grad.abs().max() <= 5 / 8 + 1.3e3


def test_half_precision_pixels_are_computed_in_float32():
    pred, target = (8 * b for b in pairs())
    pred, target = pred.half(), target.half()
    got = ciou_loss(pred, target)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, complete_box_iou_loss(pred.float(), target.float()), rtol=1e-4, atol=1e-5)


def test_nan_gives_nan_in_its_row_only():
    pred, target = pairs(3)
    pred[1, 2] = torch.nan
    assert ciou_loss(pred, target).isnan().tolist() == [False, True, False]


def test_no_rows_sum_to_a_connected_zero():
    total = ciou_loss(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 4)).sum()
    assert total == 0 and total.requires_grad


def test_refuses_unequal_shapes():
    with pytest.raises(ShapeError):
        ciou_loss(torch.zeros(2, 4), torch.zeros(1, 4))
