# SPDX-License-Identifier: AGPL-3.0-or-later
"""Operations and memory of networks small enough to count by hand."""

import pytest
import torch
from torch import nn

from fsdet.engine.footprint import PASSING, flops, line_through, memory, saved_bytes


def test_a_convolution_counts_two_operations_a_product():
    layer = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    assert flops(lambda: layer(torch.zeros(1, 3, 16, 16))) == 2 * 16 * 16 * 8 * 3 * 9


def test_what_autograd_keeps_is_each_storage_once_and_no_weight():
    first, second = nn.Linear(10, 20), nn.Linear(20, 5)
    x = torch.randn(7, 10)
    inputs, hidden, squared = 7 * 10, 7 * 20, 7 * 5

    def run():
        return second(first(x).relu()).square().sum()

    assert saved_bytes(run, nn.ModuleList([first, second])) == 4 * (inputs + hidden + squared)
    first.requires_grad_(False)
    assert saved_bytes(run, nn.ModuleList([first, second])) == 4 * (hidden + squared), "a frozen layer keeps nothing"


def test_a_line_finds_what_is_fixed_and_what_goes_by_pixels():
    line = line_through((64, 128), (1000 + 3 * 64**2, 1000 + 3 * 128**2))
    assert line.at(256) == pytest.approx(1000 + 3 * 256**2)
    assert line_through((64, 128), (1000, 900)).at(256) == 1000, "never less for more pixels"


@pytest.mark.parametrize(("optimizer", "slots"), [("sgd", 1), ("adamw", 2), ("muon", 1)])
def test_memory_counts_frozen_weights_once_and_trained_ones_with_all_that_they_need(optimizer, slots):
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.Linear(10, 4, bias=False))
    model[0].requires_grad_(False)
    found = memory(model, 1000, 30, optimizer=optimizer, ema=True)
    assert (found.weights, found.ema, found.gradients, found.optimizer) == (560, 560, 160, slots * 160)
    assert found.total == 560 + 560 + 160 + slots * 160 + 1000 + 1000 * PASSING + 30
    assert memory(model, 1000, 30, optimizer=optimizer, ema=False).ema == 0
