# SPDX-License-Identifier: AGPL-3.0-or-later
"""bce_loss is the definition in float64; bce_at is bce_loss on the dense target it never builds."""

import math

import pytest
import torch

from fsdet.errors import ShapeError
from fsdet.losses.bce import bce_at, bce_loss
from losses import definitions


def sparse_case(known_share=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(3, 20, 5, generator=g)).to(dtype)
    place = torch.randperm(60, generator=g)[:12]
    image, anchor, column = place // 20, place % 20, torch.randint(5, (12,), generator=g)
    weight = torch.rand(12, generator=g)
    known = torch.rand(3, 5, generator=g) < known_share
    return logits, image, anchor, column, weight, known


def dense(logits, image, anchor, column, weight, known):
    """Every cell written out: a dense target, and a mask that spares unknown columns except at their positives."""
    target = torch.zeros(logits.shape)
    target[image, anchor, column] = weight
    mask = known[:, None].expand(logits.shape).clone()
    mask[image, anchor, column] = True
    z = logits.double()
    s = z.sigmoid()
    return (-(target * s.log() + (1 - target) * (1 - s).log()) * mask).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_the_definition_in_every_dtype(dtype):
    g = torch.Generator().manual_seed(0)
    z, t = (4 * torch.randn(40, 6, generator=g)).to(dtype), torch.rand(40, 6, generator=g)
    got = bce_loss(z, t)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), definitions.bce(z, t), rtol=1e-5, atol=1e-6)


def test_pos_weight_counts_positives_so_many_times():
    z, t = torch.randn(40, 6, dtype=torch.float64), torch.rand(40, 6, dtype=torch.float64)
    s = z.sigmoid()
    want = -(3 * t * s.log() + (1 - t) * (1 - s).log()).sum(-1)
    torch.testing.assert_close(bce_loss(z, t, 3.0).double(), want, rtol=1e-5, atol=1e-6)
    assert torch.equal(bce_loss(z, t, 1.0), bce_loss(z, t))


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sparse_is_dense_also_where_classes_are_unknown(share, dtype):
    case = sparse_case(share, dtype)
    torch.testing.assert_close(bce_at(*case).double(), dense(*case), rtol=1e-5, atol=1e-5)


def test_sparse_gradient_is_dense_gradient():
    logits, *rest = sparse_case(0.5)
    narrow, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    (got,) = torch.autograd.grad(bce_at(narrow, *rest).sum(), narrow)
    (want,) = torch.autograd.grad(dense(wide, *rest).sum(), wide)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_without_known_every_column_counts():
    logits, image, anchor, column, weight, known = sparse_case()
    a = bce_at(logits, image, anchor, column, weight)
    torch.testing.assert_close(a, bce_at(logits, image, anchor, column, weight, torch.ones_like(known)))


def test_starts_at_the_prior():
    prior = torch.full((2, 80), -math.log(99))
    torch.testing.assert_close(bce_loss(prior, torch.zeros(2, 80)), torch.full((2,), -80 * math.log(0.99)))
    none = torch.zeros(0, dtype=torch.long)
    rows = bce_at(prior[None], none, none, none, torch.zeros(0))
    torch.testing.assert_close(rows, torch.full((1, 2), -80 * math.log(0.99)))


@pytest.mark.parametrize("z", [-1e4, -120.0, 120.0, 1e4])
@pytest.mark.parametrize("t", [0.0, 1.0])
def test_gradient_is_live_and_bounded_on_confident_logits(z, t):
    """s(z) - t: -1 where a positive is denied, +1 where background is claimed, 0 where it is right."""
    want = float(z > 0) - t
    a = torch.full((1, 1), z, requires_grad=True)
    bce_loss(a, torch.full((1, 1), t)).sum().backward()
    b, zero = torch.full((1, 1, 1), z, requires_grad=True), torch.zeros(1, dtype=torch.long)
    rows = bce_at(b, zero, zero, zero, torch.full((1,), t))
    rows.sum().backward()
    assert a.grad.item() == pytest.approx(want) and b.grad.item() == pytest.approx(want)
    assert rows.item() == pytest.approx(abs(z) if want else 0, abs=1e-6)


def test_background_anchors_count():
    logits, *_ = sparse_case()
    none = torch.zeros(0, dtype=torch.long)
    assert (bce_at(logits, none, none, none, torch.zeros(0)) > 0).all()


def test_no_columns_and_no_anchors_are_connected_zeros():
    none = torch.zeros(0, dtype=torch.long)
    for shape in ((2, 5, 0), (2, 0, 3)):
        logits = torch.zeros(shape, requires_grad=True)
        known = torch.ones(2, shape[2], dtype=torch.bool)
        total = bce_at(logits, none, none, none, torch.zeros(0), known).sum()
        total.backward()
        assert total == 0 and logits.grad.shape == shape


def test_nan_is_passed_on():
    logits, *rest = sparse_case()
    logits[1, 3, 2] = torch.nan
    assert bce_at(logits, *rest).isnan().nonzero().tolist() == [[1, 3]]
    assert bce_loss(torch.tensor([[torch.nan], [0.0]]), torch.zeros(2, 1)).isnan().tolist() == [True, False]


def test_refuses_other_shapes():
    with pytest.raises(ShapeError):
        bce_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ShapeError):
        bce_at(torch.zeros(2, 3, 4), *[torch.zeros(0, dtype=torch.long)] * 3, torch.zeros(0), torch.ones(2, 5).bool())
