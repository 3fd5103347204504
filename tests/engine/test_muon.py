# SPDX-License-Identifier: AGPL-3.0-or-later
"""Muon orthogonalises as an SVD does, moves kernels by it, and is torch's SGD for everything else."""

import pytest
import torch
from torch import nn

from engine.toy import ToyTask, optim
from fsdet.engine.muon import Muon, orthogonalise
from fsdet.engine.optimizer import build_optimizer, set_lr


def polar(matrix):
    """U V' of the SVD, in float64: what the iteration approaches."""
    u, _, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u @ v


@pytest.mark.parametrize("rows, columns", [(16, 27), (64, 64), (64, 576), (128, 32), (1, 64)])
def test_is_the_polar_factor_of_the_svd(rows, columns):
    torch.manual_seed(0)
    m = torch.randn(3, rows, columns)
    found, exact = orthogonalise(m).double(), polar(m)
    values = torch.linalg.svdvals(found)
    kept = torch.linalg.svdvals(m / m.norm(dim=(-2, -1), keepdim=True)) >= 0.005
    assert values[kept].min() > 0.85 and values.max() < 1.16
    assert nn.functional.cosine_similarity(found.flatten(1), exact.flatten(1)).min() > 0.98


def test_is_blind_to_the_size_of_a_gradient_and_leaves_nothing_at_nothing():
    torch.manual_seed(0)
    m = torch.randn(1, 8, 12)
    for factor in (1e-3, 1e15):
        torch.testing.assert_close(orthogonalise(m * factor), orthogonalise(m), rtol=1e-3, atol=1e-3)
    assert orthogonalise(torch.zeros(2, 3, 5)).abs().max() == 0
    rank_one = torch.outer(torch.randn(8), torch.randn(12))[None]
    assert torch.linalg.svdvals(orthogonalise(rank_one))[0, 1:].max() < 0.05


def test_agrees_with_torchs_muon_up_to_the_coefficients():
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 3, bias=False)
    twin = nn.Parameter(conv.weight.detach().permute(0, 2, 3, 1).flatten(1).clone())
    ours = Muon([{"params": [conv.weight], "lr": 0.1, "weight_decay": 0.2}])
    theirs = torch.optim.Muon([twin], lr=0.1, weight_decay=0.2, momentum=0.95, nesterov=True, adjust_lr_fn="original")
    for _ in range(4):
        gradient = torch.randn_like(conv.weight)
        conv.weight.grad, twin.grad = gradient, gradient.permute(0, 2, 3, 1).flatten(1)
        before = twin.detach().clone()
        ours.step()
        theirs.step()
        ours_at = conv.weight.detach().permute(0, 2, 3, 1).flatten(1)
        step, other = ours_at - before, twin.detach() - before
        assert nn.functional.cosine_similarity(step.flatten(), other.flatten(), 0) > 0.97
        assert step.norm() == pytest.approx(float(other.norm()), rel=0.25)  # theirs end in .7 to 1.2
        twin.data.copy_(ours_at)


def test_everything_but_kernels_takes_torchs_sgd_step():
    torch.manual_seed(0)
    ours = {"weight": nn.Parameter(torch.randn(4, 3)), "bias": nn.Parameter(torch.randn(4))}
    theirs = [nn.Parameter(p.detach().clone()) for p in ours.values()]
    a = build_optimizer({"head": list(ours.items())}, optim(name="muon", lr=0.05, momentum=0.9, weight_decay=0.1))
    b = torch.optim.SGD([{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:]}], lr=0.05, momentum=0.9,
                        nesterov=True)  # fmt: skip
    for _ in range(4):
        for p, q in zip(ours.values(), theirs, strict=True):
            p.grad = q.grad = torch.randn_like(p)
        a.step()
        b.step()
    for p, q in zip(ours.values(), theirs, strict=True):
        torch.testing.assert_close(p, q)


def test_kernels_have_their_own_rate_and_the_log_names_it():
    optimizer = build_optimizer(
        ToyTask().param_groups(), optim(name="muon", lr=0.1, muon_lr=0.02, lr_scale={"backbone": 0.5})
    )
    rates = set_lr(optimizer, 0.5)
    assert rates["backbone_kernels"] == pytest.approx(0.005)
    assert rates["backbone"] == pytest.approx(0.025)
    assert rates["head"] == pytest.approx(0.05)
    resumed = optimizer.state_dict()
    for group in resumed["param_groups"]:  # as a checkpoint of before Muon has them
        group.pop("orthogonal")
    plain = build_optimizer(ToyTask().param_groups(), optim(name="muon"))
    plain.load_state_dict(resumed)
    assert set(set_lr(plain, 1.0)) == {"backbone", "head"}
    kernels = [p for g in optimizer.param_groups if g["orthogonal"] for p in g["params"]]
    assert kernels and all(p.ndim == 4 for p in kernels)


@pytest.mark.parametrize("shape", [(32, 8, 3, 3), (32, 4, 1, 1)])
def test_a_step_of_a_kernel_has_the_length_its_rate_says_in_any_memory_format(shape):
    """Every output moves by the rate, whether the matrix is wide or tall."""
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    moves = []
    for layout in (torch.contiguous_format, torch.channels_last):
        weight = nn.Parameter(torch.zeros(shape).to(memory_format=layout))
        weight.grad = gradient.to(memory_format=layout)
        Muon([{"params": [weight], "lr": 0.1}]).step()
        moves.append(weight.detach().contiguous())
    torch.testing.assert_close(*moves)
    assert moves[0].norm() == pytest.approx(0.1 * 32**0.5, rel=0.1)


@pytest.mark.parametrize("out, inner, parts", [(256, 32, 2), (192, 32, 2), (320, 16, 4), (131, 32, 1), (256, 8, 1)])
def test_a_large_kernel_moves_in_blocks_of_equally_many_outputs(out, inner, parts):
    """Each block by its own polar factor; one with a short side, or whose outputs cannot be parted, as a whole."""
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.zeros(out, inner, 3, 3)) for _ in range(2)]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    Muon([{"params": weights, "lr": 1.0}]).step()
    for weight in weights:
        moved, gradient = (t.detach().permute(0, 2, 3, 1).flatten(1).chunk(parts) for t in (-weight, weight.grad))
        for move, block in zip(moved, gradient, strict=True):
            exact = max(1, len(block) / block.shape[1]) ** 0.5 * polar(block)
            assert nn.functional.cosine_similarity(move.double().flatten(), exact.flatten(), 0) > 0.98
            assert move.norm() == pytest.approx(float(exact.norm()), rel=0.1)


def test_a_frozen_kernel_stays_and_a_closure_is_refused():
    weight = nn.Parameter(torch.ones(2, 2, 1, 1))
    optimizer = Muon([{"params": [weight], "lr": 0.1, "weight_decay": 0.5}])
    optimizer.step()
    assert (weight == 1).all()
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0)
