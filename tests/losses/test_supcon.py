# SPDX-License-Identifier: AGPL-3.0-or-later
"""supcon_loss is eq. 2 in float64 and pytorch-metric-learning's, and survives every degenerate batch."""

import math

import pytest
import torch
from pytorch_metric_learning.losses import SupConLoss

from fsdet.errors import ShapeError
from fsdet.losses.supcon import rows_with_positive, supcon_loss, unit
from losses.definitions import supcon as eq2


def batch(n=40, width=16, classes=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=g), torch.randint(classes, (n,), generator=g)


@pytest.mark.parametrize("tau", [0.07, 0.1, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_equation_2_in_every_dtype(tau, dtype):
    x, labels = batch()
    labels[[0, 7]] = -1
    labels[3] = 99  # alone: no anchor, but in every denominator
    got = supcon_loss(x.to(dtype), labels, tau)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), eq2(x.to(dtype), labels, tau), rtol=1e-5, atol=1e-5)


def test_gradient_is_that_of_equation_2_in_float64():
    x, labels = batch(20)
    wide = x.double().requires_grad_()
    (want,) = torch.autograd.grad(eq2(wide, labels, 0.1).mean(), wide)
    (got,) = torch.autograd.grad(supcon_loss(x.requires_grad_(), labels).mean(), x)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_mean_equals_pytorch_metric_learning():
    x, labels = batch(64)
    torch.testing.assert_close(
        supcon_loss(x, labels, 0.1).mean(), SupConLoss(temperature=0.1)(x, labels), rtol=1e-5, atol=1e-5
    )


def test_identical_rows_cost_ln_n_minus_1():
    loss = supcon_loss(torch.ones(9, 8), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]))
    torch.testing.assert_close(loss, torch.full((9,), math.log(8)))


def test_labels_of_minus_one_change_nothing():
    x, labels = batch(12)
    more = torch.cat((x, torch.randn(5, 16) * 50)), torch.cat((labels, torch.full((5,), -1)))
    torch.testing.assert_close(supcon_loss(*more), supcon_loss(x, labels))


def test_rows_follow_the_order_that_rows_with_positive_names():
    labels = torch.tensor([4, -1, 2, 4, -1, 3, 2])
    assert rows_with_positive(labels).tolist() == [0, 2, 3, 6]
    assert supcon_loss(torch.randn(7, 4), labels).shape == (4,)


@pytest.mark.parametrize("labels", [[], [0], [0, 1, 2], [-1, -1], [0, 0], [0, 0, 0, 0]])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_degenerate_batches_are_finite_and_connected(labels, value):
    """None, one, all distinct, all ignored, one class; at the zero vector, identical and huge."""
    x = torch.full((len(labels), 8), value, requires_grad=True)
    total = supcon_loss(x, torch.tensor(labels, dtype=torch.long)).sum()
    total.backward()
    assert total.isfinite() and x.grad.isfinite().all()
    if len(set(labels)) != 1 or len(labels) < 2:
        assert total == 0


def test_gradient_is_alive_when_all_cosines_are_high_and_the_class_is_wrong():
    """Row 0 lies on row 2 of the other class; a clamped logit would have no gradient here."""
    angle = torch.tensor([0.0, 0.5, 0.001, 0.3])
    x = torch.stack((angle.cos(), angle.sin()), -1).requires_grad_()
    labels = torch.tensor([0, 0, 1, 1])
    wide = x.detach().double().requires_grad_()
    (want,) = torch.autograd.grad(eq2(wide, labels, 0.1)[0], wide)
    (got,) = torch.autograd.grad(supcon_loss(x, labels)[0], x)
    assert got[0].norm() >= 0.99 * want[0].norm() > 1


def test_own_gradient_is_at_most_two_over_tau():
    x, labels = batch(12, classes=3)
    x = unit(x).requires_grad_()
    for row, value in zip(rows_with_positive(labels), supcon_loss(x, labels, 0.07), strict=True):
        (g,) = torch.autograd.grad(value, x, retain_graph=True)
        assert g[row].norm() <= 2 / 0.07


def test_the_normalisation_is_part_of_the_gradient():
    """Only a row's direction counts, so its gradient is at right angles to it; a detached norm leaves a part along."""
    x, labels = batch(12)
    (got,) = torch.autograd.grad(supcon_loss(x.requires_grad_(), labels).sum(), x)
    along = (got * x).sum(-1) / (got.norm(dim=-1) * x.norm(dim=-1))
    assert got.norm() > 0.1 and along.abs().max() < 1e-3


def test_unit_is_bounded_at_the_zero_vector():
    x = torch.zeros(1, 8, requires_grad=True)
    unit(x).sum().backward()
    assert x.grad.abs().max() <= 1e3 + 1e-2
    torch.testing.assert_close(unit(torch.tensor([[3.0, 4.0]], dtype=torch.float16)), torch.tensor([[0.6, 0.8]]))


def test_nan_is_passed_on_but_not_out_of_an_ignored_row():
    x, labels = batch(10)
    labels[:] = torch.tensor([0, 1] * 5)
    x[4] = torch.nan
    assert supcon_loss(x, labels).isnan().all()
    labels[4] = -1
    assert supcon_loss(x, labels).isfinite().all()


def test_refuses_other_shapes():
    with pytest.raises(ShapeError, match="supcon_loss expects"):
        supcon_loss(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))
