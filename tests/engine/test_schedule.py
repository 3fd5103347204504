# SPDX-License-Identifier: AGPL-3.0-or-later
"""Schedules are pure functions of the committed step or the epoch, and the first LR is not zero."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fsdet.engine.schedule import KINDS, clip_norm_at, frozen_at, growth_interval, lr_factor, total_batches, total_steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0, 1, 3, 50])
def test_the_first_lr_is_above_zero_and_none_exceeds_the_base(kind, warmup):
    factors = [lr_factor(s, 20, warmup, kind, 0.0) for s in range(20)]
    assert factors[0] > 0 and max(factors) <= 1 and min(factors) > 0


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 400), st.integers(1, 300), st.integers(0, 100), st.floats(0, 1))
def test_any_step_of_any_schedule_is_between_the_floor_and_one(kind, step, total, warmup, low):
    factor = lr_factor(step, total, warmup, kind, low, restarts=3, drops=2)
    ramp = (step + 1) / warmup if step < warmup else 1.0
    assert min(low, ramp) - 1e-12 <= factor <= 1.0


def test_cosine_is_torchs_after_a_linear_ramp():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16, eta_min=0.1)
    ours = [lr_factor(s, 20, 4, "cosine", 0.1) for s in range(20)]
    assert ours[:4] == [0.25, 0.5, 0.75, 1.0]
    for value in ours[4:]:
        assert value == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        oracle.step()


def test_linear_falls_evenly_to_its_floor():
    assert [lr_factor(s, 4, 0, "linear", 0.2) for s in range(5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_restarts_begin_every_cycle_at_the_base_lr():
    factors = [lr_factor(s, 30, 0, "restarts", 0.0, restarts=3) for s in range(31)]
    assert [s for s, f in enumerate(factors) if f == 1.0] == [0, 10, 20]
    assert factors[30] == 0.0


def test_plateau_halves_with_each_drop_down_to_the_floor():
    assert [lr_factor(9, 20, 0, "plateau", 0.2, drops=d) for d in range(4)] == [1.0, 0.5, 0.25, 0.2]


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="cosine"):
        lr_factor(0, 1, 0, "cosin")


def test_clip_norm_follows_the_latest_epoch_reached():
    spec = {1: 10.0, 31: 5.0, 61: 3.0}
    assert [clip_norm_at(e, spec) for e in (1, 30, 31, 60, 61, 999)] == [10, 10, 5, 5, 3, 3]
    assert clip_norm_at(7, 0.5) == 0.5
    assert clip_norm_at(1, {5: 2.0}) == 2.0


def test_freezing_by_epoch_unfreezes_in_stages():
    spec = {1: ["backbone", "neck"], 3: ["backbone"], 6: []}
    expected = [("backbone", "neck")] * 2 + [("backbone",)] * 3 + [()]
    assert [frozen_at(e, spec) for e in range(1, 7)] == expected
    assert frozen_at(1, {2: ["head"]}) == ()
    assert frozen_at(9, ["head"]) == ("head",)


LENGTHS = [(3, None, 5, 2), (0.5, None, 10, 4), (2.4, None, 5, 3), (1, 7, 5, 2), (0.01, None, 5, 1)]


@pytest.mark.parametrize("epochs, steps, per_epoch, accumulate", LENGTHS)
def test_the_length_counts_optimizer_steps_remainders_included(epochs, steps, per_epoch, accumulate):
    batches, count, at = total_batches(epochs, per_epoch), 0, 0
    while at < batches:  # an epoch's last window is shorter
        at = min(at + accumulate, batches, (at // per_epoch + 1) * per_epoch)
        count += 1
    assert total_steps(epochs, steps, per_epoch, accumulate) == (steps or count)
    assert math.ceil(batches / accumulate) <= count


@pytest.mark.parametrize(
    "steps, asked, interval", [(100, None, 20), (700, None, 70), (9000, None, 200), (100, 2000, 2000)]
)
def test_the_loss_scale_of_a_short_run_can_grow(steps, asked, interval):
    assert growth_interval(steps, asked) == interval
