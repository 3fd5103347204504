# SPDX-License-Identifier: AGPL-3.0-or-later
"""The probe measures what a full backward per loss would, and leaves no trace."""

from dataclasses import replace

import pytest
import torch

from engine.test_step import controller, spoiled, step
from engine.toy import ToyTask
from fsdet.engine import probe


def test_norms_and_cosines_are_those_of_a_backward_per_loss():
    task = ToyTask(norm=False)
    rows = {r.name: r for r in probe.measure(task.losses(task.batch(0)))}
    gradients = {}
    for name in ("bbox", "cls", "total"):
        report = task.losses(task.batch(0))
        (features,) = report.probe_at
        features.retain_grad()
        (report.total if name == "total" else report.weighted[name]).backward()
        gradients[name] = features.grad.double().flatten()
    for name, row in rows.items():
        g, total = gradients[name], gradients["total"]
        assert row.norm == pytest.approx(float(g.norm()), rel=1e-5)
        assert row.cosine == pytest.approx(float(torch.cosine_similarity(g, total, dim=0)), rel=1e-5)
        assert row.finite and row.rows == 4


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_probed_step_is_the_step_without_the_probe(precision):
    tasks = ToyTask(), ToyTask()
    for task, observe in zip(tasks, (None, probe.measure), strict=True):
        c = controller(task, precision)
        torch.manual_seed(3)
        reports = [step(c, i, observe=observe) for i in range(3)]
        assert all(r.committed for r in reports)
    assert torch.equal(torch.get_rng_state(), torch.get_rng_state())
    for a, b in zip(tasks[0].model.state_dict().values(), tasks[1].model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_measuring_touches_no_gradient_generator_or_statistic():
    task = ToyTask()
    report = task.losses(task.batch(0))
    before, state = {k: v.clone() for k, v in task.model.state_dict().items()}, torch.get_rng_state()
    probe.measure(report)
    assert all(p.grad is None for p in task.model.parameters()) and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in task.model.state_dict().items())
    report.total.backward()


def test_a_loss_that_is_not_finite_or_off_or_disconnected_gets_its_words():
    task = ToyTask()
    report = spoiled("bbox", float("nan"))(None, task.losses(task.batch(0)))
    off = report.weighted["cls"] * 0
    report = replace(report, weighted={**report.weighted, "cls": off, "dfl": torch.tensor(2.0)})
    rows = probe.measure(report)
    assert [probe.verdict(r, 1.0) for r in rows] == ["NOT FINITE", probe.OFF, probe.NO_GRADIENT]
    assert [f.name for f in probe.flags(rows, {})] == ["first_bbox", "first_dfl"]


@pytest.mark.parametrize("raw, words", [(1.0, "ok"), (2.1, "above its expected 1"), (0.4, "below its expected 1")])
def test_a_first_value_far_from_its_expectation_is_told(raw, words):
    row = probe.ProbeRow("dfl", raw, raw, 1.0, 0.5, True, 4)
    assert probe.verdict(row, 1.0).startswith(words) and probe.verdict(row, None) == "ok"
    assert words in probe.table([row], {"dfl": 1.0}) and "dfl" in probe.table([row], {})


def test_a_report_that_names_no_place_has_no_rows():
    task = ToyTask()
    assert probe.measure(replace(task.losses(task.batch(0)), probe_at=())) == []
