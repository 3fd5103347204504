# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every loss against its definition in float64: at logits up to 1e4, in every dtype, by finite differences, and where
the answer is confidently wrong. One table of cases, so that a new loss is a row here.
"""

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fsdet.losses import bce as bce_file
from fsdet.losses import ciou as ciou_file
from fsdet.losses import cpe as cpe_file
from fsdet.losses import dfl as dfl_file
from fsdet.losses import focal as focal_file
from fsdet.losses import supcon as supcon_file
from fsdet.losses import triplet as triplet_file
from fsdet.losses import wiou as wiou_file
from losses import definitions

BINS = 16
ALL = slice(None)
HALVES = [torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Case:
    """leaf: values up to 1e4, some of them confidently wrong; loss of a leaf; its definition, which may detach at."""

    leaf: Tensor
    loss: Callable[[Tensor], Tensor]
    definition: Callable[..., Tensor]
    kind: str  # logits, rows or boxes


def generator():
    return torch.Generator().manual_seed(0)


def logits(*shape):
    """Ordinary, large and huge values side by side."""
    g = generator()
    z = torch.randn(*shape, generator=g) * 10.0 ** torch.randint(0, 5, shape, generator=g)
    edges = torch.tensor([-1e4, 1e4, -120.0, 120.0, -10.1, 10.1, 0.0, 20.0, -20.0])
    z.view(-1)[: len(edges)] = edges
    return z.clamp(-1e4, 1e4)


def dense():
    z = logits(30, 5)
    soft, hard = torch.rand(30, 5, generator=generator()), torch.randint(2, (30, 5), generator=generator())
    soft[:3], soft[3:6] = 0, 1
    cases = {"bce": Case(z, lambda x: bce_file.bce_loss(x, soft), lambda x: definitions.bce(x, soft), "logits")}
    for gamma, alpha in ((2.0, None), (0.5, 0.25)):
        cases[f"focal {gamma}"] = Case(
            z,
            lambda x, gamma=gamma, alpha=alpha: focal_file.focal_loss(x, hard, gamma, alpha),
            lambda x, gamma=gamma, alpha=alpha: definitions.focal(x, hard, gamma, alpha),
            "logits",
        )
    image, anchor = torch.arange(30) // 10, torch.arange(30) % 10
    column, weight = torch.randint(5, (30,), generator=generator()), torch.rand(30, generator=generator())
    target = torch.zeros(30, 5)
    target[torch.arange(30), column] = weight
    cases["bce at"] = Case(
        z,
        lambda x: bce_file.bce_at(x.reshape(3, 10, 5), image, anchor, column, weight).flatten(),
        lambda x: definitions.bce(x, target),
        "logits",
    )
    distance = (BINS - 1) * torch.rand(12, 4, generator=generator())
    distance[0] = torch.tensor([-1.0, 0.0, BINS - 1.0, 1e4])
    cases["dfl"] = Case(
        logits(12, 4, BINS),
        lambda x: dfl_file.dfl_loss(x, distance),
        lambda x: definitions.dfl(x, distance),
        "logits",
    )
    return cases


def pairwise():
    """Rows of length .01 to 1e4; two rows of one class back to back, and on top of another class."""
    g = generator()
    x = torch.randn(24, 8, generator=g) * 10.0 ** (torch.rand(24, 1, generator=g) * 6 - 2)
    x = x.clamp(-1e4, 1e4)
    labels = torch.randint(4, (24,), generator=g)
    labels[:4], labels[-1] = torch.tensor([0, 0, 1, 1]), -1
    x[1], x[3] = -x[0] * 0.9 + 0.01 * x[2].sign(), x[0] * 1.1 + 0.01 * x[2].sign()
    iou, back = 0.4 + 0.6 * torch.rand(24, generator=g), torch.randn(5, 8, generator=g)
    iou[:4] = 0.9
    cases = {
        "supcon": Case(
            x,
            lambda e: supcon_file.supcon_loss(e, labels, 0.07),
            lambda e: definitions.supcon(e, labels, 0.07),
            "rows",
        )
    }
    for weighting in ("one", "linear", "exp"):
        rest = (0.1, 0.7, weighting)
        cases[f"cpe {weighting}"] = Case(
            x,
            lambda e, rest=rest: cpe_file.cpe_loss(e, iou, labels, back, *rest),
            lambda e, rest=rest: definitions.cpe(e, iou, labels, back, *rest),
            "rows",
        )
    for mining in ("batch_hard", "semi_hard"):
        cases[f"triplet {mining}"] = Case(
            x,
            lambda e, mining=mining: triplet_file.triplet_loss(e, labels, 0.3, mining, back),
            lambda e, mining=mining: definitions.triplet(e, labels, 0.3, mining, back),
            "rows",
        )
    return cases


def boxes():
    """Pixels up to 1e4; the first pairs are far apart, one inside the other, and all but the same."""
    g = generator()
    corner = 9e3 * torch.rand(30, 2, generator=g)
    target = torch.cat((corner, corner + 64 + 400 * torch.rand(30, 2, generator=g)), -1)
    pred = target + 150 * torch.randn(30, 4, generator=g)
    pred = torch.cat((pred[:, :2].minimum(pred[:, 2:]) - 40, pred[:, :2].maximum(pred[:, 2:]) + 40), -1)
    pred[0], target[0] = torch.tensor([0.0, 0.0, 48.0, 64.0]), torch.tensor([9e3, 9.4e3, 9.4e3, 1e4])
    pred[1] = target[1] + torch.tensor([20.0, 20.0, -20.0, -24.0])
    pred[2] = target[2] + torch.tensor([-20.0, -24.0, 30.0, 20.0])
    target = target.half().float()
    cases = {
        f"wiou v{v}": Case(
            pred,
            lambda p, v=v: wiou_file.wiou_loss(p, target, 0.4, v),
            lambda p, at=None, rows=ALL, v=v: definitions.wiou(
                p[rows], target[rows], 0.4, v, at if at is None else at[rows]
            ),
            "boxes",
        )
        for v in (1, 2, 3)
    }
    cases["ciou"] = Case(
        pred,
        lambda p: ciou_file.ciou_loss(p, target),
        lambda p, at=None, rows=ALL: definitions.ciou(p[rows], target[rows], at if at is None else at[rows]),
        "boxes",
    )
    return cases


CASES = {**dense(), **pairwise(), **boxes()}
every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def both(case, leaf):
    """Ours in float32 and the definition in float64: rows and gradient of their sum, at the same values."""
    narrow, wide = leaf.float().requires_grad_(), leaf.double().requires_grad_()
    got, want = case.loss(narrow), case.definition(wide)
    return got, torch.autograd.grad(got.sum(), narrow)[0], want, torch.autograd.grad(want.sum(), wide)[0]


def assert_near(got, want):
    """Each row within 1e-5, absolute or of its largest entry."""
    got, want = got.double().reshape(len(want), -1), want.reshape(len(want), -1)
    excess = (got - want).abs().amax(1) / (1e-5 * (1 + want.abs().amax(1)))
    assert excess.max() <= 1, f"row {excess.argmax()}: {excess.max():.3g} times the tolerance"


@every_loss
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_value_and_gradient_are_the_definitions_within_1e_5_up_to_1e4_in_every_dtype(case, dtype):
    leaf = case.leaf.to(dtype)
    got, slope, want, want_slope = both(case, leaf)
    assert got.dtype == torch.float32 and got.shape == want.shape
    assert_near(got, want)
    assert_near(slope, want_slope)
    torch.testing.assert_close(case.loss(leaf), got, rtol=0, atol=0)


@every_loss
@pytest.mark.parametrize("dtype", HALVES)
def test_the_gradient_of_a_half_leaf_is_the_float32_gradient_rounded(case, dtype):
    leaf = case.leaf.to(dtype).requires_grad_()
    (got,) = torch.autograd.grad(case.loss(leaf).sum(), leaf)
    assert got.dtype == dtype
    assert torch.equal(got, both(case, leaf.detach())[1].to(dtype))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.kind != "boxes"])
def test_gradcheck_in_float64(name):
    case = CASES[name]
    leaf = case.leaf.double() / (1e3 if case.kind == "logits" else case.leaf.abs().amax(1, keepdim=True))
    assert case.loss(leaf).dtype == torch.float64
    assert torch.autograd.gradcheck(case.loss, leaf.requires_grad_(), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.kind == "boxes"])
def test_gradcheck_of_a_box_loss_holds_still_what_its_paper_detaches(name):
    """Central differences of the definition, beta, diagonal and alpha taken where the boxes are."""
    loss, definition, leaf = CASES[name].loss, CASES[name].definition, CASES[name].leaf.double()
    (got,) = torch.autograd.grad(loss(moving := leaf.clone().requires_grad_()).sum(), moving)
    for row, side in ((r, s) for r in range(4) for s in range(4)):
        step = torch.zeros_like(leaf)
        step[row, side] = 1e-3  # px
        up, down = (definition(leaf + s, leaf, rows=[row]) for s in (step, -step))
        assert got[row, side].item() == pytest.approx(((up - down) / 2e-3).item(), rel=1e-4, abs=1e-8)


def apart(angle):
    """Rows on the unit circle and their labels: the first lies on a row of the other class, far from its own."""
    a = torch.tensor([0.0, angle, 1e-3, 0.3])
    return torch.stack((a.cos(), a.sin()), -1), torch.tensor([0, 0, 1, 1])


def wrong():
    """{loss: (leaf, loss, definition)}: one row, whose answer is surely wrong."""
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    far, box = torch.tensor([[0.0, 0.0, 4.0, 4.0]]), torch.tensor([[900.0, 900.0, 930.0, 930.0]])
    bins = torch.zeros(1, 4, BINS)
    bins[..., 5] = -20
    x, labels = apart(3.0)
    cpe = (torch.ones(4), labels, torch.zeros(0, 2), 0.1, 0.5, "linear")
    out = {
        "dfl 20 nats": (bins, lambda z: dfl_file.dfl_loss(z, torch.full((1, 4), 5.0)),
                        lambda z: definitions.dfl(z, torch.full((1, 4), 5.0))),
        "dfl 1e4": (500 * bins, lambda z: dfl_file.dfl_loss(z, torch.full((1, 4), 5.0)),
                    lambda z: definitions.dfl(z, torch.full((1, 4), 5.0))),
        "supcon": (x, lambda e: supcon_file.supcon_loss(e, labels, 0.07)[:1],
                   lambda e: definitions.supcon(e, labels, 0.07)[:1]),
        "cpe": (x, lambda e: cpe_file.cpe_loss(e, *cpe)[:1], lambda e: definitions.cpe(e, *cpe)[:1]),
        "ciou": (far, lambda p: ciou_file.ciou_loss(p, box), lambda p: definitions.ciou(p, box)),
    }  # fmt: skip
    for z, t in ((-120.0, one), (-1e4, one), (1e4, zero)):
        leaf = torch.full((1, 1), z)
        out[f"bce {z:g}"] = leaf, lambda x, t=t: bce_file.bce_loss(x, t), lambda x, t=t: definitions.bce(x, t)
        out[f"focal {z:g}"] = (
            leaf, lambda x, t=t: focal_file.focal_loss(x, t), lambda x, t=t: definitions.focal(x, t, 2.0)
        )  # fmt: skip
    for v in (1, 2, 3):
        out[f"wiou v{v}"] = (
            far, lambda p, v=v: wiou_file.wiou_loss(p, box, 1.0, v), lambda p, v=v: definitions.wiou(p, box, 1.0, v)
        )  # fmt: skip
    for mining in triplet_file.MINING:
        out[f"triplet {mining}"] = (
            x, lambda e, m=mining: triplet_file.triplet_loss(e, labels, 0.3, m)[:1],
            lambda e, m=mining: definitions.triplet(e, labels, 0.3, m, x[:0])[:1],
        )  # fmt: skip
    return out


@pytest.mark.parametrize(("leaf", "loss", "definition"), wrong().values(), ids=wrong())
def test_no_gradient_is_dead_where_the_answer_is_surely_wrong(leaf, loss, definition):
    narrow, wide = leaf.clone().requires_grad_(), leaf.double().requires_grad_()
    (got,), (want,) = (
        torch.autograd.grad(f(x).sum(), x) for f, x in ((loss, narrow), (definition, wide))
    )  # fmt: skip
    assert got[0].norm() >= 0.99 * want[0].norm() > 1e-3
    assert torch.cosine_similarity(got.double().flatten(), want.flatten(), 0) > 0.9999


FUNCTIONS = {
    name: getattr(file, name)
    for file in (bce_file, ciou_file, cpe_file, dfl_file, focal_file, supcon_file, triplet_file, wiou_file)
    for name in dir(file)
    if name.endswith("_loss") and getattr(file, name).__module__ == file.__name__
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_states_value_at_init_gradient_bound_and_what_nan_does(name):
    """The figures themselves are held by the tests of each loss."""
    text = inspect.getdoc(FUNCTIONS[name])
    assert len(FUNCTIONS) == 8
    assert "At init" in text and re.search(r"\|dL(_i)?/d\w+\|[^.]* <=", text) and "NaN in, NaN out" in text


@pytest.mark.parametrize("name", ["supcon", "cpe linear", "triplet batch_hard"])
def test_memory_of_a_pairwise_loss_is_a_few_matrices_of_n_by_n(name):
    """256 rows of 4: what the backward keeps; a tensor of N x N x D, or a matrix a row, would show at once."""
    g, n = generator(), 256
    x, labels = torch.randn(n, 4, generator=g).requires_grad_(), torch.randint(8, (n,), generator=g)
    loss = {
        "supcon": lambda: supcon_file.supcon_loss(x, labels),
        "cpe linear": lambda: cpe_file.cpe_loss(x, torch.ones(n), labels),
        "triplet batch_hard": lambda: triplet_file.triplet_loss(x, labels),
    }[name]
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss().sum().backward()
    assert sum(kept.values()) <= 2 * 4 * n * n
