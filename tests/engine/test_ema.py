# SPDX-License-Identifier: AGPL-3.0-or-later
"""The EMA follows weights and floating buffers in float32, copies integers, and counts its updates."""

import math

import torch
from torch import nn

from engine.toy import ToyTask
from fsdet.engine.ema import Ema


def moved(model: nn.Module, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(torch.randn(tensor.shape, generator=g) if tensor.is_floating_point() else 1)


def test_it_is_the_recurrence_in_float64():
    model = ToyTask().model
    ema = Ema(model, 0.9, 5)
    oracle = {k: v.double().clone() for k, v in model.state_dict().items()}
    for count in range(1, 6):
        moved(model, count)
        ema.update(model)
        decay = 0.9 * (1 - math.exp(-count / 5))
        for k, v in model.state_dict().items():
            oracle[k] = decay * oracle[k] + (1 - decay) * v.double() if v.is_floating_point() else v.double()
    assert ema.count == 5
    for k, v in ema.state_dict().items():
        torch.testing.assert_close(v.double(), oracle[k], rtol=1e-5, atol=1e-6)


def test_no_warmup_uses_the_full_decay_at_once():
    assert Ema(nn.Linear(1, 1), 0.99, 0).decay_at(1) == 0.99


def test_half_precision_models_are_averaged_in_float32_and_tied_weights_once():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).bfloat16()
    model[1].weight = model[0].weight
    ema = Ema(model, 0.5, 0)
    with torch.no_grad():
        model[0].weight.zero_()
    before = ema.model[0].weight.clone()
    ema.update(model)
    assert ema.model[0].weight.dtype == torch.float32
    torch.testing.assert_close(ema.model[0].weight, before / 2)


def test_a_replaced_buffer_is_followed():
    model = nn.BatchNorm1d(2)
    ema = Ema(model, 0.5, 0)
    model.running_mean = torch.full((2,), 8.0)
    ema.update(model)
    assert ema.model.running_mean.tolist() == [4.0, 4.0]


def test_the_average_is_a_separate_model_in_eval_mode():
    model = ToyTask().model.train()
    ema = Ema(model, 0.9, 5)
    assert not ema.model.training and model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert not {p.data_ptr() for p in ema.model.parameters()} & {p.data_ptr() for p in model.parameters()}
