# SPDX-License-Identifier: AGPL-3.0-or-later
"""Buffers as they were before a forward: BatchNorm statistics, running means.

A skipped optimizer step does not undo the forward, so they are kept before each and put back after a rejection. The
generators are kept as well, so that a rejected step can be run again as it was.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Group:
    """Buffers of one dtype and device: their places, flat views of them, and room for a copy of all."""

    places: list[int]
    views: list[Tensor]
    kept: Tensor

    def sound(self) -> Tensor:
        """[n] bool: an element is finite, or was not when it was kept: a mask may hold inf by design."""
        return torch.cat(self.views).isfinite() | ~self.kept.isfinite()


class Memory:
    """The buffers of some modules. One concatenation a dtype and device; `take` allocates nothing after its first call.

    Buffers are looked up by address each time, so a module may replace its tensor; `restore` puts the old one back.
    """

    def __init__(self, *modules: nn.Module) -> None:
        owners = {id(m): (path, m) for root in modules for path, m in root.named_modules()}.values()
        self._where = [(m, name) for _, m in owners for name in m._buffers]
        self._titles = [
            f"{name} of {path or 'the objective'} ({type(m).__name__})" for path, m in owners for name in m._buffers
        ]
        self._seen: list[Tensor | None] = []
        self._groups: list[Group] = []
        self._random: tuple[Tensor, Tensor | None] | None = None

    @torch.no_grad()
    def take(self) -> None:
        """Keep the values of now, and the state of the generators."""
        self._random = torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        if self._replaced():
            self._seen = self._now()
            self._groups = _grouped(self._seen)
        for group in self._groups:
            torch.cat(group.views, out=group.kept)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the kept tensors and values back."""
        for (module, name), tensor in zip(self._where, self._seen, strict=True):
            module._buffers[name] = tensor
        for group in self._groups:
            torch._foreach_copy_(group.views, group.kept.split([len(v) for v in group.views]))

    def restore_generators(self) -> None:
        """Put the generators back to where they were at `take`."""
        if self._random is not None:
            torch.set_rng_state(self._random[0])
            if self._random[1] is not None:
                torch.cuda.set_rng_state(self._random[1])

    @contextmanager
    def again(self) -> Iterator[None]:
        """Within, buffers and generators are as they were at `take`; afterwards buffers are, and generators as now."""
        self.restore()
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            self.restore_generators()
            try:
                yield
            finally:
                self.restore()

    @torch.no_grad()
    def finite(self) -> list[Tensor]:
        """Bool scalars, still on their devices: no buffer has become NaN or inf since `take`."""
        if self._replaced():
            return [sound.all() for _, sound in self._sound_by_place()]
        return [group.sound().all() for group in self._groups if group.kept.is_floating_point()]

    @torch.no_grad()
    def first_not_finite(self) -> str | None:
        """Name of the first buffer of which `finite` is false, for a report."""
        return next((self._titles[place] for place, sound in self._sound_by_place() if not sound.all()), None)

    def _sound_by_place(self) -> Iterator[tuple[int, Tensor]]:
        """(place, [n] bool) of each floating buffer; one that was replaced since `take` has nothing to go by."""
        known = {}
        for group in self._groups:
            parts = group.sound().split([len(view) for view in group.views])
            known |= dict(zip(group.places, parts, strict=True))
        for place, (tensor, seen) in enumerate(zip(self._now(), self._seen, strict=True)):
            if tensor is not None and tensor.is_floating_point() and tensor.numel():
                yield place, known[place] if tensor is seen else tensor.isfinite()

    def _now(self) -> list[Tensor | None]:
        return [m._buffers.get(name) for m, name in self._where]

    def _replaced(self) -> bool:
        """Whether a module has another tensor in a buffer's place than at the last `take`."""
        now = self._now()
        return len(now) != len(self._seen) or any(a is not b for a, b in zip(now, self._seen, strict=True))


def _grouped(tensors: list[Tensor | None]) -> list[Group]:
    """By dtype and device; a tensor with gaps in its memory goes alone."""
    groups: dict[tuple, list[tuple[int, Tensor]]] = {}
    for place, tensor in enumerate(tensors):
        if tensor is None or not tensor.numel():
            continue
        packed = tensor.is_contiguous() or (
            tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        )
        view = tensor.detach().as_strided((tensor.numel(),), (1,)) if packed else tensor.detach()
        key = (tensor.dtype, tensor.device, 0 if packed else id(tensor))
        groups.setdefault(key, []).append((place, view))
    out = []
    for members in groups.values():
        views = [view for _, view in members]
        out.append(Group([place for place, _ in members], views, torch.cat(views)))
    return out
