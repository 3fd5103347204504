# SPDX-License-Identifier: AGPL-3.0-or-later
"""Groups are task group times decayed or not, built once; every group keeps its own LR."""

from pathlib import Path

import pytest
import torch
from torch import nn

from engine.toy import ToyTask, optim
from fsdet.engine.optimizer import (
    build_optimizer,
    choose_device,
    choose_precision,
    cpu_multiplies_bf16,
    is_decayed,
    set_lr,
)
from fsdet.errors import ConfigError


def test_norms_biases_and_temperatures_do_not_decay():
    model = nn.ModuleDict({"norm": nn.BatchNorm2d(2), "conv": nn.Conv2d(2, 2, 1)})
    model.register_parameter("temperature", nn.Parameter(torch.zeros(1, 1)))
    decayed = {n for n, p in model.named_parameters() if is_decayed(n, p)}
    assert decayed == {"conv.weight"}


def test_groups_carry_name_lr_and_decay_and_cover_each_parameter_once():
    task = ToyTask()
    optimizer = build_optimizer(task.param_groups(), optim(lr=0.1, lr_scale={"head": 5}, weight_decay=0.3))
    rows = {(g["group"], g["weight_decay"]): g["lr"] for g in optimizer.param_groups}
    assert rows == {("backbone", 0.3): 0.1, ("backbone", 0.0): 0.1, ("head", 0.3): 0.5, ("head", 0.0): 0.5}
    ids = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in task.model.parameters())


def test_set_lr_scales_from_the_base_and_reports_each_group():
    optimizer = build_optimizer(ToyTask().param_groups(), optim(lr=0.1, lr_scale={"head": 5}))
    set_lr(optimizer, 0.5)
    assert set_lr(optimizer, 0.1) == pytest.approx({"backbone": 0.01, "head": 0.05})


def test_an_unknown_group_is_told_with_the_nearest_name():
    with pytest.raises(ConfigError, match="Did you mean 'backbone'"):
        build_optimizer(ToyTask().param_groups(), optim(lr_scale={"backbon": 2}))


def test_a_parameter_listed_twice_is_refused():
    named = list(nn.Linear(2, 2).named_parameters())
    with pytest.raises(ValueError, match="twice"):
        build_optimizer({"a": named, "b": named}, optim())


@pytest.mark.parametrize("name, kind", [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_the_fused_kernels_agree_with_the_plain_ones_on_channels_last_weights(name, kind):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    twin = nn.Conv2d(3, 4, 3)
    twin.load_state_dict(conv.state_dict())
    ours = build_optimizer({"all": list(conv.named_parameters())}, optim(name=name, weight_decay=0.1))
    options = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {"betas": (0.9, 0.999)}
    groups = [{"params": [twin.weight], "weight_decay": 0.1}, {"params": [twin.bias], "weight_decay": 0.0}]
    plain = kind(groups, lr=0.05, fused=False, foreach=False, **options)
    x = torch.randn(2, 3, 8, 8)
    for _ in range(3):
        for model, optimizer in ((conv, ours), (twin, plain)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(conv.weight, twin.weight)


@pytest.mark.parametrize(("has", "auto"), [(True, "bf16"), (False, "fp32")])
def test_precision_auto_is_bf16_on_a_cpu_that_multiplies_it_and_names_are_kept(has, auto, monkeypatch):
    monkeypatch.setattr("fsdet.engine.optimizer.cpu_multiplies_bf16", lambda: has)
    cpu = torch.device("cpu")
    assert [choose_precision(n, cpu) for n in ("auto", "fp32", "bf16", "fp16")] == [auto, "fp32", "bf16", "fp16"]


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the kernel lists the CPU's instructions on Linux only")
def test_the_cpu_is_asked_for_bf16_products():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert cpu_multiplies_bf16() == bool(flags & {"avx512_bf16", "amx_tile"})


def test_a_device_that_is_not_there_is_the_users_to_mend():
    with pytest.raises(ConfigError, match=r"run\.device"):
        choose_device("cuda:63")
