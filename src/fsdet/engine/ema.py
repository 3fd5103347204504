# SPDX-License-Identifier: AGPL-3.0-or-later
"""Exponential moving average of a model's weights, in float32."""

import copy
import math

import torch
from torch import Tensor, nn


class Ema:
    """`model` is a frozen deep copy in eval mode whose floating state follows the trained one.

    decay_t = decay * (1 - exp(-count / warmup)): young averages move fast. Integer buffers are copied.
    `count` moves only with committed steps.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.float()
        self.decay, self.warmup, self.count = decay, warmup, 0
        self._pairs: tuple[list[Tensor], list[Tensor], list[tuple]] | None = None

    def decay_at(self, count: int) -> float:
        """Decay of update number `count`, from 1."""
        return self.decay * (1.0 - math.exp(-count / self.warmup)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move towards `model` after a committed step."""
        self.count += 1
        self._pairs = self._pairs or _pair(self.model, model)
        ours, theirs, buffers = self._pairs
        states = [(a._buffers[n], b._buffers[n]) for a, b, n in buffers]
        floats = [(a, b.float()) for a, b in states if a.is_floating_point()]
        ours, theirs = ours + [a for a, _ in floats], [t.float() for t in theirs] + [b for _, b in floats]
        torch._foreach_lerp_(ours, theirs, 1.0 - self.decay_at(self.count))
        for mine, other in states:
            if not mine.is_floating_point():
                mine.copy_(other)

    def state_dict(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def load_state_dict(self, state: dict[str, Tensor], count: int) -> None:
        self.model.load_state_dict(state)
        self.count = count


def _pair(mine: nn.Module, other: nn.Module) -> tuple[list[Tensor], list[Tensor], list[tuple]]:
    """Floating parameters of both sides (tied ones once), and the addresses of their buffers, which may be replaced."""
    theirs = dict(other.named_parameters())
    floats = [(p.data, theirs[n].data) for n, p in mine.named_parameters() if p.is_floating_point()]
    modules = dict(other.named_modules())
    buffers = [
        (m, modules[path], n) for path, m in mine.named_modules() for n, b in m._buffers.items() if b is not None
    ]
    return [a for a, _ in floats], [b for _, b in floats], buffers
