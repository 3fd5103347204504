# SPDX-License-Identifier: AGPL-3.0-or-later
"""A clamped loss is its live twin where nothing saturates, says which rows do, and does not learn from those."""

import pytest
import torch

from fsdet.errors import ConfigError, ShapeError
from fsdet.losses.clamped import cpe_clamped, dfl_clamped, focal_clamped, supcon_clamped
from fsdet.losses.cpe import cpe_loss
from fsdet.losses.dfl import dfl_loss
from fsdet.losses.focal import focal_loss
from fsdet.losses.supcon import supcon_loss

R = 16


def gradient(rows, leaf):
    return torch.autograd.grad(rows.sum(), leaf, retain_graph=True)[0]


def batch():
    g = torch.Generator().manual_seed(0)
    return torch.randn(12, 8, generator=g).requires_grad_(), torch.randint(3, (12,), generator=g)


def twins():
    """{name: (leaf, live rows, clamped rows, saturated)} where no clamp acts."""
    g = torch.Generator().manual_seed(0)
    z, target = torch.randn(10, 4, R, generator=g).requires_grad_(), 15 * torch.rand(10, 4, generator=g)
    (x, labels), iou, back = batch(), torch.full((12,), 0.9), torch.randn(3, 8, generator=g)
    t = torch.randint(2, (10, 4), generator=g)
    scores = (3 * torch.randn(10, 4, generator=g)).clamp(-9, 9).requires_grad_()
    return {
        "dfl": (z, dfl_loss(z, target), *dfl_clamped(z, target)),
        "focal": (scores, focal_loss(scores, t, 2.0, 0.25), *focal_clamped(scores, t, 2.0, 0.25)),
        "supcon": (x, supcon_loss(x, labels, 0.1), *supcon_clamped(x, labels, 0.1)),
        "cpe": (x, cpe_loss(x, iou, labels, back), *cpe_clamped(x, iou, labels, back)),
    }


@pytest.mark.parametrize("name", ["dfl", "focal", "supcon", "cpe"])
def test_where_nothing_saturates_it_is_the_live_loss(name):
    leaf, live, clamped, saturated = twins()[name]
    assert clamped.dtype == torch.float32 and saturated.dtype == torch.bool and not saturated.any()
    torch.testing.assert_close(clamped, live, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient(clamped, leaf), gradient(live, leaf), rtol=1e-3, atol=1e-5)


def test_dfl_is_dead_below_1e_6_and_the_live_one_is_not():
    logits, distance = torch.zeros(16, 4, R), torch.full((16, 4), 5.0)
    logits[0, :, 5] = -20
    rows, saturated = dfl_clamped(logits.requires_grad_(), distance)
    assert saturated.tolist() == [True] + [False] * 15
    dead, live = gradient(rows, logits), gradient(dfl_loss(logits, distance), logits)
    assert (dead[0] == 0).all() and (dead[1:].abs().amax((1, 2)) > 0.2).all()
    torch.testing.assert_close(live[0, :, 5], torch.full((4,), -0.25), rtol=1e-3, atol=0)


def test_dfl_is_dead_in_every_row_once_its_mean_is_above_15():
    g = torch.Generator().manual_seed(0)
    logits, distance = (2 * torch.randn(64, 4, R, generator=g)).requires_grad_(), 15 * torch.rand(64, 4, generator=g)
    rows, saturated = dfl_clamped(logits, distance)
    assert saturated.all() and (4 * rows).mean().item() == pytest.approx(15, rel=1e-5)
    assert (gradient(rows, logits) == 0).all()
    assert (gradient(dfl_loss(logits, distance), logits).abs().amax((1, 2)) > 0.1).all()


def test_focal_is_dead_beyond_10_and_the_live_one_is_not():
    z, t = torch.tensor([[-10.1], [-9.9]], requires_grad=True), torch.ones(2, 1)
    rows, saturated = focal_clamped(z, t)
    assert saturated.tolist() == [True, False]
    assert gradient(rows, z)[0] == 0 and gradient(rows, z)[1].item() == pytest.approx(-1, abs=0.01)
    assert gradient(focal_loss(z, t), z)[0].item() == pytest.approx(-1.0007, abs=2e-4)


@pytest.mark.parametrize("name", ["supcon", "cpe"])
def test_contrast_is_dead_where_every_cosine_is_above_7_tenths_and_the_live_one_is_not(name):
    angle = torch.tensor([0.0, 0.5, 0.001, 0.3])
    x, labels = torch.stack((angle.cos(), angle.sin()), -1).requires_grad_(), torch.tensor([0, 0, 1, 1])
    ones = torch.ones(4)
    clamped, live = {
        "supcon": (lambda: supcon_clamped(x, labels, 0.07), lambda: supcon_loss(x, labels, 0.07)),
        "cpe": (
            lambda: cpe_clamped(x, ones, labels, None, 0.07, 0.5),
            lambda: cpe_loss(x, ones, labels, None, 0.07, 0.5),
        ),
    }[name]
    rows, saturated = clamped()
    assert saturated.all() and (gradient(rows, x) == 0).all()
    assert gradient(live(), x).norm() > 1


def test_what_no_gradient_was_asked_of_is_not_called_saturated():
    """An unlikely bin without a share of the target, and a row's similarity with itself."""
    logits = torch.zeros(1, 4, R)
    logits[..., 6] = -20
    assert not dfl_clamped(logits, torch.full((1, 4), 5.0))[1].any()
    assert dfl_clamped(logits, torch.full((1, 4), 5.1))[1].all()
    x, labels = torch.eye(4, 8), torch.tensor([0, 0, 1, 1])
    assert not supcon_clamped(x, labels, 0.07)[1].any()  # 1 / .07 with itself, 0 with all others


def test_rows_keep_their_order_and_background_is_no_positive():
    x, labels = batch()
    labels[3] = -1
    rows, saturated = cpe_clamped(x, torch.linspace(0.5, 1, 12), labels, torch.randn(4, 8))
    assert len(rows) == len(saturated) == len(cpe_loss(x, torch.linspace(0.5, 1, 12), labels, torch.randn(4, 8)))


@pytest.mark.parametrize("labels", [[], [0], [0, 1]])
def test_no_rows_are_a_connected_zero(labels):
    x, labels = torch.ones(len(labels), 8, requires_grad=True), torch.tensor(labels, dtype=torch.long)
    for rows, saturated in (supcon_clamped(x, labels), cpe_clamped(x, torch.ones(len(labels)), labels)):
        assert rows.sum() == 0 and rows.requires_grad and len(saturated) == 0
    bins = torch.zeros(0, 4, R, requires_grad=True)
    rows, saturated = dfl_clamped(bins, torch.zeros(0, 4))
    assert rows.sum() == 0 and rows.requires_grad and len(saturated) == 0


def test_refuses_other_shapes_and_words():
    with pytest.raises(ShapeError, match="dfl_clamped expects"):
        dfl_clamped(torch.zeros(2, 4, R), torch.zeros(3, 4))
    with pytest.raises(ShapeError, match="focal_clamped expects"):
        focal_clamped(torch.zeros(2, 3), torch.zeros(2, 1))
    with pytest.raises(ShapeError, match="supcon_clamped expects"):
        supcon_clamped(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ConfigError, match="linear"):
        cpe_clamped(torch.zeros(2, 4), torch.zeros(2), torch.zeros(2, dtype=torch.long), weighting="liner")
