# SPDX-License-Identifier: AGPL-3.0-or-later
"""cpe_loss is FSCE's equation in float64, with background in every denominator and nowhere else."""

import math

import pytest
import torch

from fsdet.errors import ConfigError, ShapeError
from fsdet.losses.cpe import cpe_loss, cpe_rows
from fsdet.losses.supcon import supcon_loss
from losses.definitions import cpe as fsce


def batch(n=24, width=8, background=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, b = torch.randn(n, width, generator=g), torch.randn(background, width, generator=g)
    return x, 0.4 + 0.6 * torch.rand(n, generator=g), torch.randint(4, (n,), generator=g), b


@pytest.mark.parametrize("weighting", ["one", "linear", "exp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_is_the_papers_formula_and_gradient(weighting, dtype):
    x, iou, labels, background = batch()
    labels[5] = -1
    x, background = x.to(dtype), background.to(dtype)
    wide = x.double().requires_grad_()
    want = fsce(wide, iou, labels, background, 0.2, 0.7, weighting)
    narrow = x.float().requires_grad_()
    got = cpe_loss(narrow, iou, labels, background, 0.2, 0.7, weighting)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(cpe_loss(x, iou, labels, background, 0.2, 0.7, weighting), got)
    (g,), (w,) = torch.autograd.grad(got.sum(), narrow), torch.autograd.grad(want.sum(), wide)
    torch.testing.assert_close(g.double(), w, rtol=1e-4, atol=1e-5)


def test_without_weighting_threshold_and_background_it_is_supcon():
    x, iou, labels, _ = batch()
    torch.testing.assert_close(cpe_loss(x, iou, labels, None, 0.2, 0.0, "one"), supcon_loss(x, labels, 0.2))


def test_background_is_in_every_denominator_and_never_an_anchor():
    x, iou, labels, background = batch()
    without, within = cpe_loss(x, iou, labels), cpe_loss(x, iou, labels, background)
    assert len(within) == len(without) and (within > without).all()


def test_proposals_below_phi_are_no_anchors_but_stay_positives_and_negatives():
    x, labels = torch.randn(4, 8), torch.tensor([0, 0, 1, 1])
    iou = torch.tensor([0.9, 0.1, 0.69, 0.71])
    assert cpe_rows(labels, iou, 0.7).tolist() == [0, 3]
    assert cpe_loss(x, iou, labels, phi=0.7).shape == (2,)


def test_identical_rows_cost_g_ln_of_all_the_others():
    loss = cpe_loss(torch.ones(4, 8), torch.full((4,), 0.8), torch.zeros(4, dtype=torch.long), torch.ones(3, 8))
    torch.testing.assert_close(loss, torch.full((4,), 0.8 * math.log(6)))


def test_overlap_carries_no_gradient():
    x, iou, labels, background = batch()
    iou.requires_grad_()
    assert not cpe_loss(x, iou, labels, background).requires_grad
    assert cpe_loss(x.requires_grad_(), iou, labels, background).requires_grad


@pytest.mark.parametrize("labels", [[], [0], [0, 1, 2], [-1, -1], [0, 0]])
@pytest.mark.parametrize("overlap", [0.0, 1.0])
@pytest.mark.parametrize("background", [0, 3])
def test_degenerate_batches_are_finite_and_connected(labels, overlap, background):
    n = len(labels)
    x = torch.zeros(n, 8, requires_grad=True)
    rows = cpe_loss(x, torch.full((n,), overlap), torch.tensor(labels, dtype=torch.long), torch.zeros(background, 8))
    rows.sum().backward()
    assert rows.isfinite().all() and x.grad.isfinite().all()
    assert len(rows) == (2 if labels == [0, 0] and overlap == 1 else 0)


def test_own_gradient_is_at_most_two_g_over_tau():
    x, iou, labels, background = batch()
    x = (x / x.norm(dim=-1, keepdim=True)).requires_grad_()
    rows = cpe_rows(labels, iou, 0.7)
    for row, value in zip(rows, cpe_loss(x, iou, labels, background), strict=True):
        (g,) = torch.autograd.grad(value, x, retain_graph=True)
        assert g[row].norm() <= 2 * iou[row] / 0.2


def test_nan_is_passed_on():
    x, iou, labels, background = batch()
    background[0, 0] = torch.nan
    assert cpe_loss(x, iou, labels, background).isnan().all()


def test_refuses_unknown_weightings_and_shapes():
    x, iou, labels, _ = batch()
    with pytest.raises(ConfigError, match="Did you mean 'linear'"):
        cpe_loss(x, iou, labels, weighting="liner")
    with pytest.raises(ShapeError, match="cpe_loss expects"):
        cpe_loss(x, iou[:3], labels)
    with pytest.raises(ShapeError, match="background"):
        cpe_loss(x, iou, labels, torch.zeros(2, 9))
