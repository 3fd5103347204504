# SPDX-License-Identifier: AGPL-3.0-or-later
"""focal_loss is the definition in float64, alive and finite at every logit."""

import math

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from fsdet.errors import ShapeError
from fsdet.losses.focal import focal_loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_is_the_definition_in_every_dtype(gamma, dtype):
    g = torch.Generator().manual_seed(0)
    z, t = (3 * torch.randn(40, 6, generator=g)).to(dtype), torch.randint(2, (40, 6), generator=g)
    p = torch.where(t == 1, z.double().sigmoid(), 1 - z.double().sigmoid())
    got = focal_loss(z, t, gamma)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), (-((1 - p) ** gamma) * p.log()).sum(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.25, 0.0, 1.0])
def test_alpha_is_torchvisions(alpha):
    g = torch.Generator().manual_seed(0)
    z, t = torch.randn(10, 3, generator=g), torch.randint(2, (10, 3), generator=g).float()
    want = sigmoid_focal_loss(z, t, alpha, 2.0).sum(-1)
    torch.testing.assert_close(focal_loss(z, t, 2.0, alpha), want)


def test_starts_at_two_to_the_minus_gamma_ln_two_a_column():
    assert focal_loss(torch.zeros(1, 3), torch.zeros(1, 3)).item() == pytest.approx(3 * 0.25 * math.log(2))


@pytest.mark.parametrize(
    ("z", "gamma", "want"), [(-10.1, 2.0, -1.0007), (-1e4, 2.0, -1.0), (20.0, 0.5, 0.0), (1e4, 0.5, 0.0)]
)
def test_gradient_is_live_where_wrong_and_finite_where_right(z, gamma, want):
    a = torch.tensor([[z]], requires_grad=True)
    loss = focal_loss(a, torch.ones(1, 1), gamma)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert a.grad.item() == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(("gamma", "bound"), [(0.0, 1.0), (0.5, 1.13), (1.0, 1.13), (2.0, 1.13), (5.0, 1.32)])
def test_gradient_is_bounded_as_promised(gamma, bound):
    z = torch.cat((torch.linspace(-30, 30, 2001), torch.tensor([-1e4, 1e4])))[:, None].requires_grad_()
    focal_loss(z, torch.ones_like(z), gamma).sum().backward()
    assert z.grad.abs().max() <= bound


def test_nan_in_nan_out_and_nothing_in_connected_zero():
    assert focal_loss(torch.tensor([[torch.nan], [0.0]]), torch.ones(2, 1)).isnan().tolist() == [True, False]
    total = focal_loss(torch.zeros(0, 3, requires_grad=True), torch.zeros(0, 3)).sum()
    assert total == 0 and total.requires_grad


def test_refuses_unequal_shapes():
    with pytest.raises(ShapeError):
        focal_loss(torch.zeros(2, 3), torch.zeros(2, 1))
