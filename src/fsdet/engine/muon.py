# SPDX-License-Identifier: AGPL-3.0-or-later
"""Muon: momentum whose every matrix is replaced by the nearest semi-orthogonal one, for convolution kernels.

A direction of a kernel that hears little gradient then learns as fast as the loudest one: on two cores a base
training needs less than half the images (docs/notebook.md).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# a, b, c of x <- (a + b x x' + c (x x')^2) x, one row an iteration: Amsel et al. 2025, arXiv 2505.16932, algorithm 1
COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
BLOCK = 128  # rows at most that are made orthogonal to one another, where a kernel's outputs can be parted evenly
HEADROOM = 1.01  # singular values start below 1 / HEADROOM, so that rounding does not push one out of the polynomial


def orthogonalise(matrices: Tensor) -> Tensor:
    """[n, r, c] float32 -> [n, r, c] with the same singular vectors and singular values near 1; zeros stay zero.

    The iteration runs on the r x r Gram matrix (r <= c) and touches the long side twice: .6 of the plain form's time
    on a YOLO's kernels. Values of at least .005 of the matrix' norm end in .85..1.15; smaller ones end smaller.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * HEADROOM + 1e-7)
    gram, factor, product = x @ x.mT, None, None
    for a, b, c in COEFFICIENTS:
        gram = gram if factor is None else factor @ gram @ factor
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
    x = product @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) and, for the other groups, SGD with Nesterov.

    A group with `orthogonal` True holds kernels [out, in, h, w], each the matrix [out, in h w], in blocks of at most
    BLOCK outputs (Khaled et al. 2025, MuonBP, arXiv 2510.16981, without its whole steps in between); out of a block:
    m <- mu m + (1 - mu) g;  w <- (1 - lr decay) w - lr sqrt(max(1, out / (in h w))) orthogonalise((1 - mu) g + mu m).
    The iteration grows with the third power of a block's side: on yolov8n blocks take .6 of the whole matrices' time,
    and detect as well (docs/notebook.md). The other groups take torch's SGD step with Nesterov momentum and L2 decay.

    Args:
        params: groups with lr, momentum, weight_decay and orthogonal.
    """

    def __init__(self, params: Iterable[dict[str, Any]], lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": 0.0, "orthogonal": True})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient. No closure is evaluated."""
        if closure is not None:
            raise ValueError("Muon.step expects no closure: gradients come from the step controller")
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
            buffers, grads = [self.state[p]["momentum_buffer"] for p in params], [p.grad for p in params]
            (_step_orthogonal if group["orthogonal"] else _step_sgd)(params, grads, buffers, group)


def _step_sgd(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], group: dict[str, Any]) -> None:
    if group["weight_decay"]:
        grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
    torch._foreach_mul_(buffers, group["momentum"])
    torch._foreach_add_(buffers, grads)
    torch._foreach_add_(params, torch._foreach_add(grads, buffers, alpha=group["momentum"]), alpha=-group["lr"])


def _step_orthogonal(params: list[Tensor], grads: list[Tensor], buffers: list[Tensor], group: dict[str, Any]) -> None:
    momentum, lr = group["momentum"], group["lr"]
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    updates = torch._foreach_lerp(grads, buffers, momentum)
    if group["weight_decay"]:
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
    for p, update in zip(params, updates, strict=True):
        matrix = update.permute(0, 2, 3, 1).flatten(1)  # channels last, as the weights lie in memory
        by_shape.setdefault(matrix.shape, []).append((p, matrix))
    for (rows, columns), members in by_shape.items():
        rows //= _blocks(rows, columns)
        stack = torch.stack([m for _, m in members]).float().reshape(-1, rows, columns)
        moves = orthogonalise(stack) * max(1.0, rows / columns) ** 0.5
        for (p, _), move in zip(members, moves.split(len(moves) // len(members)), strict=True):
            out, inner, h, w = p.shape
            p.add_(move.reshape(out, h, w, inner).permute(0, 3, 1, 2), alpha=-lr)


def _blocks(rows: int, columns: int) -> int:
    """Into how many blocks of equally many rows a matrix is parted; 1 where its shorter side is small already.

    A block has more than half of BLOCK rows, or the matrix stays whole: in smaller ones hardly any outputs hear of one
    another.
    """
    if min(rows, columns) <= BLOCK:
        return 1
    parts = range(-(-rows // BLOCK), (2 * rows - 1) // BLOCK + 1)
    return next((n for n in parts if rows % n == 0), 1)
