# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the commands need to know of a kind of training beside its Task; a module of tasks/ with these functions is one.

`fsdet.tasks.KINDS` is the table from `task:` of a configuration to them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from fsdet.config import Config
from fsdet.data.sources import DataSet
from fsdet.peers import Peers
from fsdet.types import Task


class BuiltTask(Task, Protocol):
    """A Task that knows the configuration it was made from."""

    config: Config

    def warm(self, threads: int) -> None:
        """Decode what may be held in memory before loader workers fork."""
        ...

    def join(self, peers: Peers) -> None:
        """Make this process's part of each batch from now on. Raises ConfigError where a batch has no equal parts."""
        ...


class Network(Protocol):
    """A model whose parameters are known by part."""

    def groups(self) -> Mapping[str, Sequence[tuple[str, nn.Parameter]]]: ...


class Kind(Protocol):
    """A module of tasks/."""

    def read(self, config: Config) -> DataSet:
        """The data set that data.path names."""
        ...

    def create(self, config: Config, data: DataSet, *, resume: bool) -> tuple[BuiltTask, str | None]:
        """The task, and what was initialised from where; None on a resume, which brings its own weights."""
        ...

    def restored(self, values: Mapping[str, Any]) -> Any:
        """A batch from the plain values of an incident's batch.pt."""
        ...

    def network(self, spec: Mapping[str, Any], where: str) -> nn.Module:
        """The model, untrained, of `describe()["model"]`; it is a Network."""
        ...

    def planned(self, config: Config) -> tuple[Mapping[str, Any], str]:
        """The model spec of a configuration, and in words which model for how many classes of which data."""
        ...

    def told(self, spec: Mapping[str, Any]) -> str:
        """`describe()` in words."""
        ...

    def advice(self, data: DataSet) -> str:
        """What `fsdet check` adds about settings for these data; may be empty."""
        ...

    def inputs(self, config: Config) -> Sequence[tuple[int, int]]:
        """(number, side in px) of the images that a training step looks at; the queries first."""
        ...

    def look(self, model: nn.Module, images: Tensor) -> Any:
        """What is computed to judge or use the model: [B, 3, H, W] RGB in [0, 1]."""
        ...

    def practice(self, model: nn.Module, images: Tensor) -> Tensor:
        """A scalar at the end of a training pass over images whose labels are made up."""
        ...

    def judge(self, model: nn.Module, config: Config, data: DataSet, split: str,
              folder: Path | None) -> Mapping[str, Any]:  # fmt: skip
        """{"metrics": {name: figure}, ...} of a trained model on a split; pictures into `folder`."""
        ...
