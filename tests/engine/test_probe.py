# SPDX-License-Identifier: AGPL-3.0-or-later
"""The probe measures what a full backward per loss would, and leaves no trace."""

import json
from dataclasses import replace

import pytest
import torch

from engine.test_step import controller, everything, nan_pixel, spoiled, step
from engine.toy import ToyTask, trainer
from fsdet.engine import probe
from fsdet.types import LossReport


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


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_probed_step_is_the_step_without_the_probe(precision):
    """Weights, statistics, EMA, momentum, loss scale and generator are the same to the last bit."""
    ends = []
    for observe in (None, probe.measure):
        c = controller(ToyTask(), precision, growth_interval=2)
        torch.manual_seed(3)
        assert all(step(c, i, observe=observe).committed for i in range(3))
        ends.append([*everything(c), torch.get_rng_state(), torch.tensor(c.scaler.get_scale())])
    assert len(ends[0]) == len(ends[1]) and all(map(torch.equal, *ends))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_measuring_touches_no_gradient_generator_statistic_or_scaler(precision):
    """Half a window's gradients are there already and stay as they are; the backward after it still works."""
    task = ToyTask()
    c = controller(task, precision)
    task.losses(task.batch(1)).total.backward()
    report = task.losses(task.batch(0))

    def now():
        scaler = [torch.tensor(float(v)) for v in c.scaler.state_dict().values()]
        return [*everything(c), *(p.grad.clone() for p in task.model.parameters()), torch.get_rng_state(), *scaler]

    before = now()
    assert len(probe.measure(report)) == 2 and probe.conflicts(report) is not None
    assert all(map(torch.equal, before, now())) and len(before) == len(now())
    report.total.backward()


def test_the_first_batch_is_probed_whatever_becomes_of_it(tmp_path):
    """A rejected first batch has its table, and a batch that could not be made leaves it to the next."""
    task = ToyTask(spoil=lambda b, r: spoiled("bbox", float("nan"))(b, r) if b.index == 1 else r,
                   tamper=lambda b: nan_pixel(b) if b.index == 0 else b)  # fmt: skip
    trainer(task, tmp_path / "r").fit()
    told = [json.loads(line) for line in (tmp_path / "r/metrics.jsonl").read_text().splitlines()]
    table = [(r["batch"], r["name"], r["finite"]) for r in told if r["kind"] == "probe"]
    assert table == [(2, "bbox", False), (2, "cls", True)]
    assert "not finite: bbox" in (tmp_path / "r/training_debug.log").read_text()


def row(name="dfl", raw=1.0, weighted=1.0, norm=1.0, cosine=0.5, finite=True, rows=4.0) -> probe.ProbeRow:
    return probe.ProbeRow(name, raw, weighted, norm, cosine, finite, rows)


@pytest.mark.parametrize(
    "rows, said",
    [
        ([row("bbox"), row("cls")], "all 2 losses are finite and have a gradient"),
        ([row("bbox", finite=False), row("cls")], "not finite: bbox"),
        ([row("bbox", norm=95.0), row("cls", norm=5.0)], "bbox_loss rules: 95% of the summed gradient norms"),
        ([row("bbox", norm=99.5), row("cls", norm=0.5)], "drowned, below 1% of the summed gradient norms: cls"),
        ([row("bbox"), row("cpe", norm=0.0, rows=0.0)], "cpe_loss is silent: no row of this batch"),
        ([row("bbox"), row("cpe", weighted=0.0, norm=0.0)], "cpe_loss is silent: it is exactly 0"),
        ([row("bbox"), row("dfl", norm=0.0)], "dfl_loss is silent: it has a value and no gradient"),
        ([row("bbox"), row("cls", cosine=-0.3)], "cls_loss pulls against the sum of all (cosine -0.30)"),
        ([], "no loss has a gradient here"),
    ],
)
def test_the_table_is_put_into_words(rows, said):
    text = "\n".join(probe.words(rows))
    assert said in text and ("all 2" in text) == ("all 2" in said)
    assert said in probe.tell(rows, {})


def test_losses_that_pull_apart_are_a_pair_with_the_cosine_of_their_gradients():
    """Three losses of one tensor whose gradients are written down: a and b are opposed, c stands at right angles."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    at = x * 1.0
    weighted = {"a": at[0], "b": 0.5 * at[1] - at[0], "c": at[1], "nan": at[0] * float("nan"), "off": at.sum() * 0}
    report = LossReport(sum(weighted.values()), weighted, weighted, {}, 0, torch.ones(()), probe_at=(at,))
    assert probe.conflicts(report) == {("a", "b"): pytest.approx(-1 / 1.25**0.5)}
    assert "a_loss and b_loss pull apart (cosine -0.89)" in "\n".join(probe.words([row()], probe.conflicts(report)))
    assert probe.conflicts(replace(report, probe_at=())) == {}


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
