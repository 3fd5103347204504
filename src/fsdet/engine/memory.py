# SPDX-License-Identifier: AGPL-3.0-or-later
"""Buffers as they were before a forward: BatchNorm statistics, running means.

A skipped optimizer step does not undo the forward, so they are kept before each and put back after a rejection.
"""

import torch
from torch import Tensor, nn


class Memory:
    """The buffers of some modules. One concatenation a dtype and device; no allocation after the first `take`.

    Buffers are looked up by address each time, so a module may replace its tensor; `restore` puts the old one back.
    """

    def __init__(self, *modules: nn.Module) -> None:
        owners = {id(m): m for root in modules for m in root.modules()}.values()
        self._where = [(m, name) for m in owners for name in m._buffers]
        self._seen: list[Tensor | None] = []
        self._groups: list[tuple[list[Tensor], Tensor]] = []

    @torch.no_grad()
    def take(self) -> None:
        """Keep the values of now."""
        now = [m._buffers.get(name) for m, name in self._where]
        if len(now) != len(self._seen) or any(a is not b for a, b in zip(now, self._seen, strict=True)):
            self._seen, self._groups = now, _grouped(now)
        for views, kept in self._groups:
            torch.cat(views, out=kept)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the kept tensors and values back."""
        for (module, name), tensor in zip(self._where, self._seen, strict=True):
            module._buffers[name] = tensor
        for views, kept in self._groups:
            torch._foreach_copy_(views, kept.split([len(v) for v in views]))


def _grouped(tensors: list[Tensor | None]) -> list[tuple[list[Tensor], Tensor]]:
    """[(flat views, room for all of them)] by dtype and device; a tensor with gaps in its memory goes alone."""
    groups: dict[tuple, list[Tensor]] = {}
    for tensor in tensors:
        if tensor is None or not tensor.numel():
            continue
        packed = tensor.is_contiguous() or (
            tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        )
        view = tensor.detach().as_strided((tensor.numel(),), (1,)) if packed else tensor.detach()
        groups.setdefault((tensor.dtype, tensor.device, 0 if packed else id(tensor)), []).append(view)
    return [(views, torch.cat(views)) for views in groups.values()]
