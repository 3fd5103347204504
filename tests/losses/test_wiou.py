# SPDX-License-Identifier: AGPL-3.0-or-later
"""wiou_loss is the paper's in float64, its focus has the paper's values, and no input breaks it."""

import math

import pytest
import torch

from fsdet.errors import ShapeError
from fsdet.losses.wiou import focusing, wiou_loss
from losses.definitions import wiou as paper

POINT, UNIT, FAR = [5.0, 5.0, 5.0, 5.0], [0.0, 0.0, 1.0, 1.0], [1e6, 1e6, 1e6 + 9, 1e6 + 7]


def pairs(n=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    corner = 200 + 60 * torch.rand(2, n, 2, generator=g)
    return torch.cat((corner, corner + 8 + 90 * torch.rand(2, n, 2, generator=g)), -1).unbind(0)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_is_the_papers_formula_and_gradient_in_float64(version):
    pred, target = pairs(24)
    wide = pred.double().requires_grad_()
    want = paper(wide, target.double(), 0.4, version)
    got = wiou_loss(pred.requires_grad_(), target, torch.tensor(0.4), version)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    (g,), (w,) = torch.autograd.grad(got.sum(), pred), torch.autograd.grad(want.sum(), wide)
    torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("beta", "r"), [(0.5, 0.8293), (1.0, 1.2033), (1.558, 1.3104), (3.0, 1.0), (5.0, 0.4617)])
def test_focus_of_version_3_has_the_papers_values(beta, r):
    assert focusing(torch.tensor(beta), 3).item() == pytest.approx(r, abs=1e-4)


def test_square_root_is_version_2_not_3():
    assert focusing(torch.tensor(4.0), 2).item() == pytest.approx(2)
    assert focusing(torch.tensor(4.0), 3).item() != pytest.approx(2, abs=0.5)


def test_starts_near_one_point_two_and_disjoint_boxes_cost_at_most_e():
    far = wiou_loss(torch.tensor([FAR]), torch.tensor([UNIT]), 1.0, version=1)
    assert 1 < far.item() <= math.e + 1e-6
    near = wiou_loss(torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.tensor([[9.0, 0.0, 18.0, 9.0]]), 1.0)
    assert near.item() == pytest.approx(1.2033 * math.exp(81 / (18**2 + 9**2)), rel=1e-4)


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("mean", [0.0, 1e-30, 1e-3, 1.0])
@pytest.mark.parametrize("pred", [POINT, UNIT, FAR, [5.0, 0.0, 5.0, 9.0], [9.0, 9.0, 1.0, 1.0]])
def test_degenerate_boxes_and_means_are_finite_in_value_and_gradient(pred, mean, version):
    for target in (POINT, UNIT, FAR):
        p = torch.tensor([pred], requires_grad=True)
        loss = wiou_loss(p, torch.tensor([target]), torch.tensor(mean), version)
        loss.sum().backward()
        assert loss.isfinite().all() and loss.item() >= 0 and p.grad.isfinite().all()


def test_attention_stays_below_e_even_where_corners_are_swapped():
    """Such a pair has an enclosing box smaller than the distance of its centres."""
    loss = wiou_loss(torch.tensor([[90.0, 90.0, 1.0, 1.0]]), torch.tensor([UNIT]), 1.0, version=1)
    assert loss.item() <= math.e + 1e-6


@pytest.mark.parametrize(("version", "r"), [(1, 1.0), (2, math.sqrt(2)), (3, 1.32)])  # of mean .5: beta <= 2
def test_gradient_is_bounded_as_promised(version, r):
    pred, target = pairs(4000, seed=2)
    shrink = 10 ** -(5 * torch.rand(4000, 1, generator=torch.Generator().manual_seed(3)))
    pred = torch.cat((pred[:, :2], pred[:, :2] + (pred[:, 2:] - pred[:, :2]) * shrink), -1).requires_grad_()
    wiou_loss(pred, target, 0.5, version).sum().backward()
    assert (pred.grad.abs().amax(-1) <= 3 * math.e * r / (target[:, 2:] - target[:, :2]).amin(-1)).all()


def test_the_focus_and_the_diagonal_carry_no_gradient():
    """With beta fixed, doubling the mean halves version 2's gradient by sqrt 2 exactly."""
    pred, target = pairs(5)
    grads = [
        torch.autograd.grad(wiou_loss(p := pred.clone().requires_grad_(), target, m, 2).sum(), p)[0] for m in (0.4, 0.8)
    ]
    torch.testing.assert_close(grads[0], grads[1] * math.sqrt(2))


def test_half_precision_pixels_are_computed_in_float32():
    pred, target = (torch.round(8 * b).half() for b in pairs())
    got = wiou_loss(pred, target, 0.5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), paper(pred.double(), target.double(), 0.5, 3), rtol=1e-5, atol=1e-6)


def test_nan_gives_nan_in_its_row_only():
    pred, target = pairs(3)
    pred[1, 2] = torch.nan
    assert wiou_loss(pred, target).isnan().tolist() == [False, True, False]


def test_no_rows_sum_to_a_connected_zero():
    total = wiou_loss(torch.zeros(0, 4, requires_grad=True), torch.zeros(0, 4)).sum()
    assert total == 0 and total.requires_grad


def test_refuses_unequal_shapes():
    with pytest.raises(ShapeError):
        wiou_loss(torch.zeros(2, 4), torch.zeros(1, 4))
