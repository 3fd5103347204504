# SPDX-License-Identifier: AGPL-3.0-or-later
"""How often losses choose rows by value, as each such choice makes the host wait for a GPU; counted without one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from test_objective import ALL, make_output, make_targets, run

SHAPED_BY_VALUES = ("nonzero", "_local_scalar_dense", "masked_select", "unique", "repeat_interleave.Tensor", "bincount")
KNOWN = {"bbox": 6, "supcon": 11, "all": 22}  # a choice that is added for a good reason raises it here


class Waits(TorchDispatchMode):
    """Operators whose result has a shape, or is a number, that only the device knows."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = str(operator)
        by_mask = name.startswith(("aten.index.", "aten.index_put")) and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or any(part in name for part in SHAPED_BY_VALUES):
            self.seen.append(name)
        return operator(*args, **(kwargs or {}))


def waits_of(act) -> list[str]:
    with Waits() as counted:
        act()
    return counted.seen


BY_VALUE = [lambda x: x[x > 0], lambda x: x.max().item(), lambda x: x.unique(), lambda x: x.nonzero(),
            lambda x: x.masked_select(x > 0), lambda x: bool(x.any())]  # fmt: skip


@pytest.mark.parametrize("one", BY_VALUE)
def test_what_waits_is_counted(one):
    x = torch.tensor([1.0, -1.0, 2.0])
    assert len(waits_of(lambda: one(x))) == 1
    assert waits_of(lambda: torch.where(x > 0, x, 0.0).cumsum(0).topk(2).values[torch.tensor([0])]) == []


@pytest.mark.parametrize("weights", KNOWN)
def test_a_step_of_losses_waits_no_oftener_than_is_known(weights):
    """Forward and backward; nothing sorts out classes by `unique`, which waits more than once."""
    chosen = ALL if weights == "all" else {weights: 1.0}

    def act() -> None:
        run(make_output(), make_targets(), chosen).total.backward()

    seen = waits_of(act)
    assert len(seen) <= KNOWN[weights], seen
    assert not any("unique" in name for name in seen)
