# SPDX-License-Identifier: AGPL-3.0-or-later
"""Small banks of drawn rows."""

import torch

from fsdet.bank import PrototypeBank


def rows(n, seed):
    return torch.nn.functional.normalize(torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def bank(model="m1"):
    return PrototypeBank(("cup", "ключ"), (rows(1, 0), rows(5, 1)), model)


def full():
    """One class with a threshold and negatives of its second shot, one with neither."""
    return PrototypeBank(("cup", "ключ"), (rows(2, 0), rows(5, 1)), "m1", (rows(3, 2), rows(0, 3)),
                         (torch.tensor([0, 1, 1]), torch.zeros(0, dtype=torch.int64)), (0.375, None),
                         ("2 shots by the others", ""))  # fmt: skip
