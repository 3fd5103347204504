# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which parameters train in an epoch, and which BatchNorm layers keep their statistics."""

from collections.abc import Mapping, Sequence

from torch.nn.modules.batchnorm import _BatchNorm

from fsdet.engine.schedule import frozen_at
from fsdet.errors import ConfigError, did_you_mean, explain
from fsdet.types import Task

Spec = Sequence[str] | Mapping[int, Sequence[str]]


class Freezer:
    """Applies the freeze schedule: requires_grad False, gradient None, BatchNorm of frozen parts in eval.

    A prefix is a task group, or the beginning of parameter names up to a dot.
    Raises:
        ConfigError: a prefix that matches nothing.
    """

    def __init__(self, task: Task, spec: Spec, freeze_norm: bool = False) -> None:
        self.model, self.spec, self.freeze_norm = task.model, spec, freeze_norm
        self.groups = {group: list(members) for group, members in task.param_groups().items()}
        self.trainable = {id(p) for members in self.groups.values() for _, p in members if p.requires_grad}
        self.norms = [(n, m) for n, m in self.model.named_modules() if isinstance(m, _BatchNorm)]
        self.frozen: tuple[str, ...] | None = None
        self._check()

    def apply(self, epoch: int) -> None:
        """Bring the model to the state of `epoch`; free when nothing changed."""
        wanted = frozen_at(epoch, self.spec)
        if wanted == self.frozen:
            return
        self.frozen = wanted
        for group, members in self.groups.items():
            for name, parameter in members:
                frozen = is_frozen(group, name, wanted)
                parameter.requires_grad_(id(parameter) in self.trainable and not frozen)
                if frozen:
                    parameter.grad = None
        self.train_mode()

    def train_mode(self) -> None:
        """`model.train()`, except for BatchNorm that is frozen."""
        self.model.train()
        for name, norm in self.norms:
            own = list(norm.parameters(recurse=False))
            still = bool(own) and not any(p.requires_grad for p in own)
            if self.freeze_norm or still or _matches(name, self.frozen or ()):
                norm.eval()

    def _check(self) -> None:
        spec = self.spec
        wanted = {p for prefixes in spec.values() for p in prefixes} if isinstance(spec, Mapping) else set(spec)
        names = [name for members in self.groups.values() for name, _ in members]
        heads = sorted({".".join(n.split(".")[:depth]) for n in names for depth in (1, 2, 3)} | set(self.groups))
        for prefix in sorted(wanted):
            if prefix not in self.groups and not any(_matches(name, (prefix,)) for name in names):
                raise ConfigError(
                    explain(
                        "a group or a prefix of parameter names",
                        f"{prefix!r}, which matches none.{did_you_mean(prefix, heads)}",
                        "stage.freeze",
                        f"groups are {', '.join(self.groups)}",
                    )
                )


def is_frozen(group: str, name: str, wanted: Sequence[str]) -> bool:
    """Whether parameter `name` of a task group is among the groups and prefixes that are frozen."""
    return group in wanted or _matches(name, wanted)


def _matches(name: str, prefixes: Sequence[str]) -> bool:
    return any(name == p or name.startswith(p.rstrip(".") + ".") for p in prefixes)
