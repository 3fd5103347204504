# SPDX-License-Identifier: AGPL-3.0-or-later
"""Slips of step, schedule and probe that docs/museum.md shows and that no other test of this folder would see."""

import gc
import math
import weakref
from dataclasses import fields, replace
from unittest import mock

import pytest
import torch

from engine.test_step import NAN, bad_gradients, controller, spoiled, step
from engine.toy import ToyTask, trainer
from fsdet.engine import probe
from fsdet.engine.checkpoint import load
from fsdet.engine.schedule import KINDS, lr_factor, total_steps
from fsdet.types import DualOutput, LossReport


def test_the_norm_and_the_decision_are_of_unscaled_gradients():
    """A norm of 1 at a loss scale of 2^14 is beyond every red flag, unless it is unscaled first."""
    plain = step(controller(ToyTask(norm=False)))
    scaled = step(controller(ToyTask(norm=False), "fp16", init_scale=2.0**14))
    assert scaled.committed and scaled.loss_scale == 2.0**14
    assert scaled.grad_l2_preclip == pytest.approx(plain.grad_l2_preclip, rel=1e-2)


def test_the_total_norm_is_the_l2_norm_over_all_gradients_and_no_sum_of_norms():
    parts = []
    report = step(
        controller(ToyTask()), watch=lambda named: parts.extend(float(p.grad.double().norm()) for _, p in named)
    )
    assert report.grad_l2_preclip == pytest.approx(math.hypot(*parts), rel=1e-5)
    assert report.grad_l2_preclip < 0.9 * sum(parts)


def test_gradients_are_unscaled_once_a_window_and_updated_as_often():
    task = ToyTask()
    c = controller(task, "fp16")
    with (
        mock.patch.object(c.scaler, "unscale_", wraps=c.scaler.unscale_) as unscale,
        mock.patch.object(c.scaler, "update", wraps=c.scaler.update) as update,
    ):
        assert c.run([task.batch(i) for i in range(3)], lr_factor=1.0, clip_norm=10.0).committed
    assert unscale.call_count == update.call_count == 1


def test_a_scaler_that_backs_off_again_and_again_is_never_rebuilt():
    task = ToyTask()
    c = controller(task, "fp16", init_scale=2.0**14, min_scale=2.0**-20)
    kept, state = c.scaler, []
    handle = bad_gradients(task, math.inf)
    for _ in range(2):
        step(c)
        state.append(c.scaler.get_scale())
    handle.remove()
    assert c.scaler is kept and state == [2.0**13, 2.0**12] and step(c).loss_scale == 2.0**12


def test_a_probe_leaves_accumulated_gradients_and_the_scaler_alone():
    task = ToyTask()
    c = controller(task, "fp16")
    for p in task.model.parameters():
        p.grad = torch.full_like(p, 3.0)
    before = c.scaler.state_dict()
    probe.measure(task.losses(task.batch(0)))
    assert all((p.grad == 3).all() for p in task.model.parameters()) and c.scaler.state_dict() == before


def test_a_probed_window_is_the_window_without_the_probe():
    """The probe sits between the first micro-batch's forward and its backward; nothing of the window may be lost."""
    ends = []
    for observe in (None, probe.measure):
        task = ToyTask()
        torch.manual_seed(0)
        report = controller(task).run([task.batch(i) for i in range(3)], lr_factor=1.0, clip_norm=10.0, observe=observe)
        ends.append((report.grad_l2_preclip, [p.clone() for p in task.model.parameters()]))
    assert ends[0][0] == ends[1][0] and all(torch.equal(a, b) for a, b in zip(ends[0][1], ends[1][1], strict=True))


def test_nothing_of_the_first_batchs_graph_is_alive_after_its_step():
    seen = []

    def observe(report: LossReport) -> None:
        seen.extend(weakref.ref(t) for t in (report.total, *report.probe_at))
        probe.measure(report)

    c = controller(ToyTask())
    step(c, observe=observe)
    gc.collect()
    assert len(seen) == 2 and all(reference() is None for reference in seen)


def test_a_programming_error_in_a_loss_is_raised_and_no_batch_skipped():
    def broken(batch, report):
        raise TypeError("a slip in a loss")

    with pytest.raises(TypeError, match="a slip in a loss"):
        step(controller(ToyTask(spoil=broken)))


def test_a_loss_that_is_nan_is_told_as_nan_and_replaced_by_no_constant():
    report = step(controller(ToyTask(spoil=spoiled("bbox", NAN))))
    assert math.isnan(report.raw["bbox"]) and math.isnan(report.total) and math.isfinite(report.raw["cls"])


def test_running_statistics_and_means_are_as_before_after_any_number_of_nan_steps():
    task = ToyTask(spoil=spoiled("bbox", NAN))
    c = controller(task)
    kept = {k: v.clone() for m in (task.model, task.objective) for k, v in m.state_dict().items()}
    for i in range(3):
        assert not step(c, i).committed
    now = {k: v for m in (task.model, task.objective) for k, v in m.state_dict().items()}
    assert all(torch.equal(v, kept[k]) for k, v in now.items())


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_moves_the_weights_in_every_schedule(kind):
    task = ToyTask()
    before = [p.clone() for p in task.model.parameters()]
    report = step(controller(task), lr_factor=lr_factor(0, 100, 50, kind))
    assert all(lr > 0 for lr in report.lr.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, task.model.parameters(), strict=True))


def test_the_schedule_of_an_accumulating_run_ends_at_its_last_step_and_not_a_quarter_through():
    steps = total_steps(2, None, 10, 4)
    assert steps == 6  # two windows of 4 and a remainder of 2, twice; counted in batches it would be 20
    assert lr_factor(steps, steps, 0, "cosine", 0.01) == pytest.approx(0.01)


def test_a_run_from_the_weights_of_another_begins_at_its_own_first_step(tmp_path):
    """To resume is to continue a run, which has nothing left to do; to start from its weights is a run of its own."""
    first = trainer(ToyTask(), tmp_path / "one")
    state = load(first.fit().best)
    assert trainer(ToyTask(), tmp_path / "one", resume=True).fit().steps == first.total_steps == 10
    task = ToyTask()
    task.model.load_state_dict(state["model"])
    before = [p.clone() for p in task.model.parameters()]
    second = trainer(task, tmp_path / "two", changes={"epochs": 1})
    assert second.fit().steps == second.total_steps == 5
    assert any(not torch.equal(a, b) for a, b in zip(before, task.model.parameters(), strict=True))


def test_each_group_is_logged_with_its_own_rate():
    c = controller(ToyTask())
    for group in c.optimizer.param_groups:
        group["base_lr"] = group["lr"] = {"backbone": 0.01, "head": 0.05}[group["group"]]
    assert step(c, lr_factor=0.5).lr == pytest.approx({"backbone": 0.005, "head": 0.025})


def test_a_missing_output_is_an_error_and_no_empty_tensor():
    names = [field.name for field in fields(DualOutput)]
    for missing in names:
        with pytest.raises(TypeError, match=missing):
            DualOutput(**{name: torch.zeros(0) for name in names if name != missing})


def test_a_loss_cut_from_the_graph_is_told_by_the_probe():
    task = ToyTask()
    report = task.losses(task.batch(0))
    cut = replace(report, weighted={**report.weighted, "cls": report.weighted["cls"].detach()})
    words = {row.name: probe.verdict(row, None) for row in probe.measure(cut)}
    assert words == {"bbox": probe.OK, "cls": probe.NO_GRADIENT}
