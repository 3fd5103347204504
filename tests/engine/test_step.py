# SPDX-License-Identifier: AGPL-3.0-or-later
"""A step has one order and one outcome, and a rejected one leaves no trace."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.toy import ToyTask, optim
from fsdet.config import Guard
from fsdet.engine.ema import Ema
from fsdet.engine.optimizer import build_optimizer
from fsdet.engine.step import StepController
from fsdet.types import OUTCOMES

NAN, INF = float("nan"), float("inf")


def controller(task: ToyTask, precision: str = "fp32", **guard) -> StepController:
    optimizer = build_optimizer(task.param_groups(), optim(lr=0.05, momentum=0.9))
    ema = Ema(task.model, 0.9, 5)
    task.model.train()
    return StepController(
        task, optimizer, device=torch.device("cpu"), precision=precision, guard=Guard(**guard), ema=ema
    )


def everything(c: StepController) -> list[torch.Tensor]:
    """All that a rejected step must leave as it was."""
    task = c.task
    momentum = [v for slots in c.optimizer.state.values() for v in slots.values() if isinstance(v, torch.Tensor)]
    live = [*task.model.state_dict().values(), *task.objective.state_dict().values(), *c.ema.state_dict().values()]
    return [t.clone() for t in (*live, *momentum)]


def step(c: StepController, index: int = 0, **options):
    return c.run([c.task.batch(index)], **{"lr_factor": 1.0, "clip_norm": 10.0, **options})


def nan_pixel(batch):
    batch.pixels[0, 0, 0, 0] = NAN
    return batch


def spoiled(name: str, value: float):
    """A report one of whose losses is `value` for the second row."""

    def spoil(batch, report):
        rows = report.row_values[name].clone()
        rows[1] = value
        bad = report.weighted[name] * value
        weighted = {**report.weighted, name: bad}
        return replace(report, total=sum(weighted.values()), weighted=weighted, raw={**report.raw, name: bad},
                       row_values={name: rows})  # fmt: skip

    return spoil


def bad_gradients(task: ToyTask, value: float, name: str = "head.weight"):
    parameter = dict(task.model.named_parameters())[name]
    return parameter.register_hook(lambda g: g * value)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_healthy_step_is_committed_in_every_precision(precision):
    c = controller(ToyTask(), precision)
    before = everything(c)
    report = step(c)
    assert report.outcome == "committed" and report.step == c.step == c.ema.count == c.task.objective.committed == 1
    assert report.loss_scale == (8192.0 if precision == "fp16" else 1.0)
    assert report.grad_l2_preclip < 100, "the norm is of unscaled gradients"
    assert any(not torch.equal(a, b) for a, b in zip(before, everything(c), strict=False))


def test_the_numbers_are_those_of_a_plain_step():
    task, twin = ToyTask(), ToyTask()
    report = step(controller(task), clip_norm=0.5)
    twin.model.train()
    torch.manual_seed(0)
    task_rng = torch.get_rng_state()
    torch.set_rng_state(task_rng)
    assert report.grad_l2_preclip > 0.5 and report.grad_l2_postclip == pytest.approx(0.5)
    assert report.clip_ratio == pytest.approx(report.grad_l2_preclip / report.grad_l2_postclip)
    assert report.total == pytest.approx(sum(report.weighted.values()))
    assert report.weighted["bbox"] == pytest.approx(2 * report.raw["bbox"])
    assert report.lr == {"backbone": 0.05, "head": 0.05}


@pytest.mark.parametrize("clip", [0.0, 0.05, 10.0])
def test_it_equals_clip_grad_norm_and_sgd(clip):
    task, twin = ToyTask(norm=False), ToyTask(norm=False)
    c, plain = controller(task), torch.optim.SGD(twin.model.parameters(), lr=0.05, momentum=0.9, nesterov=True,
                                                 weight_decay=0.0)  # fmt: skip
    for group in c.optimizer.param_groups:
        group["weight_decay"] = 0.0
    for i in range(3):
        assert step(c, i, clip_norm=clip).committed
        plain.zero_grad()
        twin.losses(twin.batch(i)).total.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.model.parameters(), clip or math.inf)
        plain.step()
    assert norm.isfinite()
    for ours, theirs in zip(task.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_bad_loss_is_rejected_and_named_with_its_images(precision, value):
    c = controller(ToyTask(spoil=spoiled("bbox", value)), precision)
    before = everything(c)
    report = step(c)
    assert report.outcome == "bad_loss" and report.step == 0
    assert "bbox_loss" in report.culprit and "image_0_1" in report.culprit and "image_0_0" not in report.culprit
    assert all(torch.equal(a, b) for a, b in zip(before, everything(c), strict=True))


def test_a_nan_pixel_is_rejected_before_the_forward():
    task = ToyTask(tamper=nan_pixel)
    c = controller(task)
    task.losses = None  # a forward would raise
    report = step(c)
    assert report.outcome == "bad_input" and "image_0_0" in report.culprit
    assert report.image_ids == tuple(f"image_0_{i}" for i in range(4))


def test_an_activation_overflow_is_rejected_and_batchnorm_is_restored():
    task = ToyTask()
    c = controller(task)
    handle = task.model.backbone[0].register_forward_hook(lambda m, i, out: out * 1e38 * 10)
    before = everything(c)
    report = step(c)
    handle.remove()
    assert report.outcome == "bad_loss" and "backbone.0" in report.culprit
    assert all(torch.equal(a, b) for a, b in zip(before, everything(c), strict=True))
    assert step(c, 1).committed and all(t.isfinite().all() for t in everything(c))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_bad_gradient_is_rejected_and_its_parameter_named(precision, value):
    task = ToyTask()
    c = controller(task, precision)
    before, handle = everything(c), bad_gradients(task, value)
    report = step(c)
    handle.remove()
    assert report.outcome == "bad_grad" and report.culprit.startswith("head.weight")
    assert "Grad stats: min=" in report.culprit
    assert all(torch.equal(a, b) for a, b in zip(before, everything(c), strict=True))
    assert all(p.grad is None for p in task.model.parameters()) and step(c).committed


def test_finite_gradients_whose_norm_overflows_are_rejected():
    task = ToyTask()
    c = controller(task)
    handle = task.model.head.weight.register_hook(lambda g: torch.full_like(g, 1e20))
    report = step(c)
    handle.remove()
    assert report.outcome == "bad_grad" and "norm overflows" in report.culprit


def test_fp16_overflow_backs_off_once_and_keeps_the_scaler():
    task = ToyTask()
    c = controller(task, "fp16", init_scale=2.0**14)
    scaler, handle = c.scaler, bad_gradients(task, INF)
    before = everything(c)
    report = step(c)
    handle.remove()
    assert report.outcome == "amp_backoff" and report.loss_scale == 2.0**14
    assert all(torch.equal(a, b) for a, b in zip(before, everything(c), strict=True))
    after = step(c)
    assert after.committed and after.loss_scale == 2.0**13 and c.scaler is scaler


def test_an_fp16_gradient_that_is_bad_in_float32_too_is_no_matter_of_scale():
    task = ToyTask()
    c = controller(task, "fp16")
    handle = bad_gradients(task, NAN)
    outcomes = [step(c) for _ in range(4)]
    handle.remove()
    assert [r.outcome for r in outcomes][:3] == ["amp_backoff", "amp_backoff", "bad_grad"]
    assert "float32 too" in outcomes[2].culprit
    assert c.scaler.get_scale() == 8192 * 0.5**4, "every unscale is followed by an update"


def test_an_overflow_of_fp16_alone_becomes_bad_grad_below_the_lowest_scale():
    task = ToyTask(spoil=only_in_half)
    c = controller(task, "fp16", init_scale=4.0)
    assert [step(c).outcome for _ in range(5)] == ["amp_backoff"] * 4 + ["bad_grad"]


def only_in_half(batch, report):
    """A gradient that overflows in autocast only."""
    if not torch.is_autocast_enabled("cpu"):
        return report
    term = report.total * 0
    term.register_hook(lambda g: g * INF)
    return replace(report, total=report.total + term)


def test_growth_follows_committed_steps():
    c = controller(ToyTask(), "fp16", growth_interval=2, init_scale=16.0)
    assert [step(c, i).loss_scale for i in range(5)] == [16, 16, 32, 32, 64]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_in_which_everything_is_frozen_is_no_grad(precision):
    task = ToyTask()
    c = controller(task, precision)
    task.model.requires_grad_(False)
    before = everything(c)
    report = step(c)
    assert report.outcome == "no_grad" and report.step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, everything(c), strict=True))
    task.model.requires_grad_(True)
    assert step(c).committed


def test_a_frozen_part_does_not_move_by_decay_or_momentum():
    task = ToyTask()
    c = controller(task)
    step(c)
    task.model.backbone.requires_grad_(False)
    before = [p.clone() for p in task.model.backbone.parameters()]
    step(c, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, task.model.backbone.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("split", [(2, 2, 2, 2), (3, 5), (1, 4, 3)])
def test_accumulation_equals_the_big_batch(split, precision):
    """Dense losses and no BatchNorm; micro-batches of unequal normaliser, as a remainder window has them."""
    big, small = ToyTask(norm=False, rows=8), ToyTask(norm=False, rows=8)
    whole = big.batch(0)
    parts = [replace(whole, pixels=x, answer=y) for x, y in zip(whole.pixels.split(split), whole.answer.split(split),
                                                                strict=True)]  # fmt: skip
    one = controller(big, precision)
    many = controller(small, precision)
    a = one.run([whole], lr_factor=1.0, clip_norm=10.0)
    b = many.run(parts, lr_factor=1.0, clip_norm=10.0)
    rtol = 1e-6 if precision == "fp32" else 2e-3
    assert (a.committed, a.total, a.grad_l2_preclip) == pytest.approx((True, b.total, b.grad_l2_preclip), rel=rtol)
    for p, q in zip(big.model.parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=rtol, atol=1e-7 if precision == "fp32" else 1e-4)


def test_one_bad_micro_batch_rejects_its_whole_window():
    task = ToyTask(spoil=lambda b, r: spoiled("cls", NAN)(b, replace(r, row_values={"cls": r.row_values["bbox"]}))
                   if b.index == 1 else r)  # fmt: skip
    c = controller(task)
    before = everything(c)
    report = c.run([task.batch(i) for i in range(3)], lr_factor=1.0, clip_norm=10.0)
    assert report.outcome == "bad_loss" and "cls_loss" in report.culprit
    assert all(torch.equal(a, b) for a, b in zip(before, everything(c), strict=True))


def test_a_finite_spike_is_clipped_and_the_adam_state_stays_sane():
    task = ToyTask()
    c = controller(task)
    c.optimizer = build_optimizer(task.param_groups(), optim(name="adamw", lr=1e-3))
    handle = bad_gradients(task, 1e12)
    report = step(c)
    handle.remove()
    assert report.committed and report.grad_l2_preclip > 1e6 and report.grad_l2_postclip == pytest.approx(10.0)
    assert all(s["exp_avg_sq"].max() <= 0.1 for s in c.optimizer.state.values())


def test_no_graph_outlives_its_step():
    task = ToyTask()
    kept = []
    c = controller(task)
    step(c, observe=lambda report: kept.append(report.total))
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        kept[0].backward()


def test_observers_see_the_live_report_and_the_unclipped_gradients():
    c, seen = controller(ToyTask()), []
    step(c, clip_norm=0.01, observe=lambda r: seen.append(r.total.requires_grad),
         watch=lambda named: seen.append(math.hypot(*(float(p.grad.norm()) for _, p in named))))  # fmt: skip
    assert seen[0] is True and seen[1] > 0.1


EVENTS = ("fine", "pixel", "loss", "gradient", "frozen")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(EVENTS), min_size=1, max_size=8), st.sampled_from(["fp32", "fp16"]))
def test_any_sequence_of_events_commits_exactly_the_fine_steps(events, precision):
    """State machine: the outcome is the event's, rejected steps leave no trace, the scale halves only on overflow."""
    task = ToyTask()
    c = controller(task, precision, growth_interval=1000)
    fine = backoffs = 0
    for i, event in enumerate(events):
        task.tamper = nan_pixel if event == "pixel" else None
        task.spoil = spoiled("bbox", NAN) if event == "loss" else None
        task.model.requires_grad_(event != "frozen")
        handle = bad_gradients(task, INF) if event == "gradient" else None
        before, report = everything(c), step(c, i)
        if handle is not None:
            handle.remove()
        fine += event == "fine"
        backoffs += precision == "fp16" and event in ("gradient", "loss")
        expected = {"fine": ["committed"], "pixel": ["bad_input"], "loss": ["bad_loss"], "frozen": ["no_grad"],
                    "gradient": ["amp_backoff", "bad_grad"] if precision == "fp16" else ["bad_grad"]}  # fmt: skip
        assert report.outcome in OUTCOMES and report.outcome in expected[event]
        assert (c.step, c.ema.count, task.objective.committed) == (fine, fine, fine)
        if event != "fine":
            assert all(torch.equal(a, b) for a, b in zip(before, everything(c), strict=True))
    assert c.scaler.get_scale() == (8192 * 0.5**backoffs if precision == "fp16" else 1.0)
