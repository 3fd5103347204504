# SPDX-License-Identifier: AGPL-3.0-or-later
"""triplet_loss mines what a loop over all pairs mines, equals pytorch-metric-learning, and survives every batch."""

import pytest
import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.miners import BatchHardMiner

from fsdet.errors import ConfigError, ShapeError
from fsdet.losses.triplet import triplet_loss, triplet_rows
from losses.definitions import triplet as loop


def batch(n=40, width=8, classes=5, background=0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, width, generator=g),
        torch.randint(classes, (n,), generator=g),
        torch.randn(background, width, generator=g),
    )


@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard"])
@pytest.mark.parametrize("background", [0, 7])
@pytest.mark.parametrize("seed", range(3))
def test_mines_and_costs_what_the_loop_does(mining, background, seed):
    x, labels, back = batch(background=background, seed=seed)
    labels[[2, 9]] = -1
    wide = x.double().requires_grad_()
    want = loop(wide, labels, 0.3, mining, back)
    got = triplet_loss(x.requires_grad_(), labels, 0.3, mining, back)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    (g,), (w,) = torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), wide)
    torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)


def test_batch_hard_equals_pytorch_metric_learning():
    x, labels, _ = batch(60)
    a, p, n = BatchHardMiner(distance=LpDistance(power=2))(x, labels)
    z = torch.nn.functional.normalize(x)
    want = ((z[a] - z[p]).square().sum(-1) - (z[a] - z[n]).square().sum(-1) + 0.3).clamp(min=0)
    torch.testing.assert_close(triplet_loss(x, labels, 0.3), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_are_computed_in_float32(dtype):
    x, labels, back = batch(background=4)
    x = x.to(dtype)
    torch.testing.assert_close(
        triplet_loss(x, labels, background=back).double(),
        loop(x, labels, 0.3, "batch_hard", back),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard"])
def test_identical_rows_cost_the_margin_with_a_finite_gradient(mining):
    x = torch.ones(6, 8, requires_grad=True)
    loss = triplet_loss(x, torch.tensor([0, 0, 0, 1, 1, 1]), 0.3, mining)
    loss.sum().backward()
    torch.testing.assert_close(loss, torch.full((6,), 0.3))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard"])
@pytest.mark.parametrize("labels", [[], [0], [0, 1, 2], [-1, -1], [0, 0, 0]])
def test_no_valid_triplet_is_a_connected_zero(labels, mining):
    x = torch.zeros(len(labels), 8, requires_grad=True)
    total = triplet_loss(x, torch.tensor(labels, dtype=torch.long), mining=mining).sum()
    total.backward()
    assert total == 0 and (x.grad == 0).all()


def test_background_makes_one_class_enough_and_is_no_class_of_its_own():
    x, labels = torch.randn(3, 8), torch.zeros(3, dtype=torch.long)
    assert triplet_rows(labels).tolist() == [] and triplet_rows(labels, 2).tolist() == [0, 1, 2]
    assert triplet_loss(x, labels, background=torch.randn(2, 8)).shape == (3,)
    assert triplet_loss(x[:1], labels[:1], background=torch.randn(2, 8)).shape == (0,)


def test_a_negative_never_carries_the_anchors_label():
    """Class 0 is one tight bundle far from class 1: every margin holds, unless a like is taken for an unlike."""
    x = torch.cat((torch.tensor([[1.0, 0.0]]).repeat(5, 1), torch.tensor([[-1.0, 0.0]]).repeat(5, 1)))
    labels = torch.tensor([0] * 5 + [1] * 5)
    mixed = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    for mining in ("batch_hard", "semi_hard"):
        assert (triplet_loss(x[mixed], labels[mixed], 0.3, mining) == 0).all()


@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard"])
def test_shuffled_rows_cost_what_they_did_each_by_its_own_label(mining):
    x, labels, back = batch(background=3)
    rows, order = triplet_rows(labels, 3), torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    want = dict(zip(rows.tolist(), triplet_loss(x, labels, 0.3, mining, back).tolist(), strict=True))
    mixed = triplet_rows(labels[order], 3)
    got = triplet_loss(x[order], labels[order], 0.3, mining, back).tolist()
    assert dict(zip(order[mixed].tolist(), got, strict=True)) == pytest.approx(want, abs=1e-5)


def test_close_rows_keep_their_exact_distance():
    """1e-3 apart on the unit circle: d = 1e-6, which a difference of large squares would lose."""
    angle = torch.tensor([0.0, 1e-3, 0.5, 0.501])
    x = torch.stack((angle.cos(), angle.sin()), -1)
    labels = torch.tensor([0, 0, 1, 1])
    want = loop(x, labels, 1.0, "batch_hard", x[:0])
    torch.testing.assert_close(triplet_loss(x, labels, 1.0).double(), want, rtol=0, atol=5e-7)


def test_own_gradient_is_at_most_four():
    x, labels, _ = batch(12, classes=3)
    x = (x / x.norm(dim=-1, keepdim=True)).requires_grad_()
    for row, value in zip(triplet_rows(labels), triplet_loss(x, labels, 2.0), strict=True):
        (g,) = torch.autograd.grad(value, x, retain_graph=True)
        assert g[row].norm() <= 4


def test_nan_is_passed_on():
    x, labels, _ = batch(10, classes=2)
    x[4] = torch.nan
    assert triplet_loss(x, labels).isnan().any()


def test_refuses_unknown_mining_and_shapes():
    x, labels, _ = batch()
    with pytest.raises(ConfigError, match="Did you mean 'semi_hard'"):
        triplet_loss(x, labels, mining="semihard")
    with pytest.raises(ShapeError, match="triplet_loss expects"):
        triplet_loss(x, labels[:3])
    with pytest.raises(ShapeError, match="background"):
        triplet_loss(x, labels, background=torch.zeros(2, 9))
