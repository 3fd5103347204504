# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a network costs: operations of a pass, and the memory that a training step takes, measured on small passes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

GIB = 2**30
SLOTS = {"sgd": 1, "muon": 1}  # tensors of the optimizer a parameter; others keep two
PASSING = 0.25  # of the activations: gradients, and the buffers of a convolution, that live beside them for a moment


@dataclass(frozen=True)
class Memory:
    """Bytes of a training step. fixed: weights, gradients, optimizer, EMA. activations: kept for the backward pass.

    passing: what comes and goes beside them. batch: the images.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int
    activations: int
    passing: int
    batch: int

    @property
    def total(self) -> int:
        return (self.weights + self.gradients + self.optimizer + self.ema + self.activations + self.passing
                + self.batch)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """Bytes that one image leaves for the backward pass: fixed + by_pixel * pixels."""

    fixed: float
    by_pixel: float

    def at(self, side: int) -> float:
        """Of a square image with this side, px."""
        return self.fixed + self.by_pixel * side * side


def flops(run: Callable[[], Any]) -> int:
    """Floating-point operations of `run`, two a multiply-add: convolutions and products, which are nearly all."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def saved_bytes(run: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of the scalar that `run` returns; weights not counted.

    A storage that several operations keep counts once.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}  # by storage; held, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def line_through(sides: tuple[int, int], bytes_: tuple[int, int]) -> Line:
    """The line through the bytes of one image at two sides, px; never a negative part."""
    (small, large), (low, high) = sides, bytes_
    by_pixel = max(0.0, (high - low) / (large**2 - small**2))
    return Line(max(0.0, low - by_pixel * small**2), by_pixel)


def memory(model: nn.Module, activations: float, batch: int, *, optimizer: str, ema: bool) -> Memory:
    """Of a training step of `model` on the device it is on, given the bytes of activations and of the batch."""
    whole = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return Memory(whole, trained, trained * SLOTS.get(optimizer, 2), whole if ema else 0, round(activations),
                  round(PASSING * activations), batch)  # fmt: skip
