# SPDX-License-Identifier: AGPL-3.0-or-later
"""Buffers come back as they were: values, tensors, layouts, whatever the forward did to them."""

import torch
from torch import nn

from fsdet.engine.memory import Memory


def buffers(seed: int) -> nn.Module:
    module = nn.Module()
    g = torch.Generator().manual_seed(seed)
    module.register_buffer("scalar", torch.randn((), generator=g))
    module.register_buffer("image", torch.randn(2, 3, 4, 5, generator=g).to(memory_format=torch.channels_last))
    module.register_buffer("short", torch.randn(3, generator=g).half())
    module.register_buffer("gaps", torch.randn(4, 6, generator=g)[:, ::2])
    module.register_buffer("count", torch.tensor(7))
    module.register_buffer("mask", torch.tensor([True, False]))
    module.register_buffer("none", None)
    module.register_buffer("empty", torch.zeros(0))
    return module


def test_every_kind_of_buffer_comes_back_in_place():
    module, oracle = nn.ModuleList([buffers(1), nn.BatchNorm1d(2)]), buffers(1)
    memory, tensors = Memory(module), dict(module.named_buffers())
    memory.take()
    for tensor in tensors.values():
        tensor.fill_(0) if tensor.dtype == torch.bool else tensor.mul_(0).add_(9)
    memory.restore()
    for name, tensor in dict(module.named_buffers()).items():
        assert tensor is tensors[name]
    for name, expected in oracle.named_buffers():
        assert torch.equal(tensors[f"0.{name}"], expected), name
    assert tensors["1.running_var"].tolist() == [1.0, 1.0]


def test_the_latest_take_counts_and_replaced_tensors_are_put_back():
    module = nn.BatchNorm1d(2)
    memory = Memory(module, module)
    memory.take()
    module.running_mean.fill_(1.0)
    memory.take()
    module.running_mean = torch.full((3,), 7.0)
    memory.restore()
    assert module.running_mean.tolist() == [1.0, 1.0]
    module.running_mean = torch.full((2,), 5.0)
    memory.take()
    module.running_mean.fill_(float("nan"))
    module.running_var = None
    memory.restore()
    assert module.running_mean.tolist() == [5.0, 5.0] and module.running_var.tolist() == [1.0, 1.0]


def test_a_buffer_that_was_finite_and_is_no_more_is_found_and_named():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(3))
    module.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    module.register_buffer("image", torch.zeros(1, 2, 2, 2).to(memory_format=torch.channels_last))
    memory = Memory(module)
    memory.take()
    assert all(memory.finite()) and memory.first_not_finite() is None
    module[1].running_var[2] = torch.inf
    assert not all(memory.finite()) and memory.first_not_finite() == "running_var of 1 (BatchNorm1d)"
    memory.restore()
    assert all(memory.finite())
    module[0].running_mean = torch.full((2,), torch.nan)
    assert not all(memory.finite()) and memory.first_not_finite() == "running_mean of 0 (BatchNorm1d)"


def test_running_again_starts_from_the_same_buffers_and_draws():
    module = nn.BatchNorm1d(2)
    memory = Memory(module)
    memory.take()
    first = torch.rand(3)
    module.running_mean.fill_(9.0)
    later = torch.get_rng_state()
    with memory.again():
        assert module.running_mean.tolist() == [0.0, 0.0] and torch.equal(torch.rand(3), first)
        module.running_mean.fill_(5.0)
    assert module.running_mean.tolist() == [0.0, 0.0] and torch.equal(torch.get_rng_state(), later)
