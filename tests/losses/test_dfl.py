# SPDX-License-Identifier: AGPL-3.0-or-later
"""dfl_loss is eq. 6 in every dtype, starts at ln R, and its gradient is bounded and never dead."""

import math

import pytest
import torch
from ultralytics.utils.loss import DFLoss

from fsdet.errors import ShapeError
from fsdet.losses.dfl import dfl_loss
from losses.definitions import dfl as eq6

R = 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_equation_6_in_every_dtype(dtype):
    g = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(32, 4, R, generator=g)).to(dtype)
    distance = (R - 1) * torch.rand(32, 4, generator=g)
    got = dfl_loss(logits, distance)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), eq6(logits, distance), rtol=1e-5, atol=1e-6)


def test_gradient_is_that_of_equation_6_in_float64():
    g = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(8, 4, R, generator=g)).requires_grad_()
    distance = (R - 1) * torch.rand(8, 4, generator=g)
    wide = logits.detach().double().requires_grad_()
    (got,) = torch.autograd.grad(dfl_loss(logits, distance).sum(), logits)
    (want,) = torch.autograd.grad(eq6(wide, distance).sum(), wide)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_equals_the_library_below_its_saturation():
    g = torch.Generator().manual_seed(2)
    logits, distance = torch.randn(50, 4, R, generator=g), (R - 1.02) * torch.rand(50, 4, generator=g)
    want = DFLoss(R)(logits.reshape(-1, R), distance.clone()).reshape(-1)
    torch.testing.assert_close(dfl_loss(logits, distance), want)


def test_starts_at_ln_r():
    distance = 15 * torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(dfl_loss(torch.zeros(5, 4, R), distance), torch.full((5,), math.log(R)))


@pytest.mark.parametrize("d", [-1.0, 0.0, 7.5, R - 1, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_gradient_is_bounded_on_the_worst_logits(d, dtype):
    logits = torch.full((1, 4, R), -6e4, dtype=dtype)
    logits[..., [0, -1]] = 6e4
    dfl_loss(logits.requires_grad_(), torch.full((1, 4), d)).sum().backward()
    assert logits.grad.isfinite().all() and logits.grad.abs().max() <= 0.25


def test_gradient_is_alive_on_a_bin_twenty_nats_below_the_others():
    logits = torch.zeros(1, 4, R)
    logits[..., 5] = -20
    dfl_loss(logits.requires_grad_(), torch.full((1, 4), 5.0)).sum().backward()
    torch.testing.assert_close(logits.grad[..., 5], torch.full((1, 4), -0.25), rtol=1e-3, atol=0)


def test_a_distance_between_bins_is_not_truncated_to_one():
    logits = torch.randn(1, 4, R, generator=torch.Generator().manual_seed(3))
    a, b = (dfl_loss(logits, torch.full((1, 4), d)) for d in (6.0, 7.0))
    torch.testing.assert_close(dfl_loss(logits, torch.full((1, 4), 6.25)), 0.75 * a + 0.25 * b)


@pytest.mark.parametrize("bins", [16, 17])
def test_the_last_bin_is_a_target_of_its_own(bins):
    logits = torch.zeros(1, 4, bins)
    logits[..., -1] = 50
    assert dfl_loss(logits, torch.full((1, 4), bins - 1.0)).item() == pytest.approx(0, abs=1e-6)
    assert dfl_loss(logits, torch.full((1, 4), 99.0)).item() == pytest.approx(0, abs=1e-6)


def test_half_precision_distance_that_rounds_to_the_number_of_bins_saturates():
    distance = torch.full((1, 4), 15.9999).half()
    assert distance[0, 0] == 16
    want = dfl_loss(torch.zeros(1, 4, R), torch.full((1, 4), 15.0))
    torch.testing.assert_close(dfl_loss(torch.zeros(1, 4, R), distance), want)


def test_nan_logits_give_nan_in_their_row_only():
    logits = torch.zeros(2, 4, R)
    logits[0, 1, 3] = torch.nan
    assert dfl_loss(logits, torch.full((2, 4), 3.5)).isnan().tolist() == [True, False]


def test_no_rows_sum_to_a_connected_zero():
    logits = torch.zeros(0, 4, R, requires_grad=True)
    total = dfl_loss(logits, torch.zeros(0, 4)).sum()
    assert total == 0 and total.requires_grad


@pytest.mark.parametrize("shapes", [((2, 4, R), (3, 4)), ((2, 3, R), (2, 3)), ((2, 4, 1), (2, 4)), ((2, 64), (2, 4))])
def test_refuses_other_shapes(shapes):
    with pytest.raises(ShapeError, match="dfl_loss expects"):
        dfl_loss(*map(torch.zeros, shapes))
