# SPDX-License-Identifier: AGPL-3.0-or-later
"""The processes that train one model together, as losses, tasks and the engine see them.

`Peers` is what there is to say of a process alone, where all of it costs nothing; engine/ranks.py has those that talk.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fsdet.errors import ConfigError, explain


class PeerOutOfMemory(torch.OutOfMemoryError):
    """Another process is out of memory, so that none can take this step."""


class Peers:
    """Process `rank` of `world`. Everything but `part` is a meeting: each process calls it, in the same order."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world

    @property
    def alone(self) -> bool:
        return self.world == 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, judges and tells."""
        return self.rank == 0

    def part(self, count: int, key: str) -> range:
        """The places of this process among `count` images, which the processes share in order of their rank.

        Raises:
            ConfigError: there are not as many for each; `key` names the setting.
        """
        if count % self.world:
            cure = f"the images of a step are shared by all processes: set it to a multiple of {self.world}"
            raise ConfigError(explain(f"a multiple of {self.world} processes", str(count), key, cure))
        each = count // self.world
        return range(self.rank * each, (self.rank + 1) * each)

    def total(self, values: Tensor) -> Tensor:
        """The sum over all processes, detached; alone: `values` as they are."""
        return values

    def rows(self, *blocks: Tensor) -> list[tuple[Tensor, slice]]:
        """Of each block [n, F] that of all processes [N, F], in order of their rank, and where the own rows are in it.

        Only the own rows carry gradient. A loss over all rows that every process computes whole, and whose gradients
        are then summed over the processes, has the gradient that one process with all rows would have: no backward
        has to wait for another. n may differ; F and the dtype may not.
        """
        return [(block, slice(0, len(block))) for block in blocks]

    def tell(self, value: Any) -> list[Any]:
        """What each process says, by rank: plain values that JSON has."""
        return [value]

    def given(self, value: Any, rank: int = 0) -> Any:
        """What process `rank` has: plain values and tensors, on the CPU."""
        return value

    def most(self, number: int) -> int:
        """The largest number of any process."""
        return number

    def add_up(self, gradients: Sequence[Tensor], extra: Tensor) -> Tensor:
        """Sum `gradients` [any shapes, float32] over the processes, in place; returns the sum of `extra` [n]."""
        return extra

    def confess(self) -> None:
        """Tell those who wait at the next meeting that this process is out of memory and does not come."""

    def wait(self, what: str) -> None:
        """Until every process is here; `what`: what they wait for, in words."""


ALONE = Peers()
