# SPDX-License-Identifier: AGPL-3.0-or-later
"""A step has one order and one outcome, and a rejected one leaves no trace."""

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from engine import machine
from engine.toy import ToyBatch, ToyTask, optim
from fsdet.config import Guard
from fsdet.engine.ema import Ema
from fsdet.engine.optimizer import build_optimizer
from fsdet.engine.step import StepController

NAN, INF = float("nan"), float("inf")


def drawn() -> st.SearchStrategy[machine.Sequence]:
    """A sequence of events; shrinks to few and fine ones."""
    event = st.tuples(st.sampled_from(machine.EVENTS) | st.just("fine"), st.integers(0, 2))
    return st.builds(machine.Sequence, st.sampled_from(["fp32", "bf16", "fp16"]), st.integers(1, 3),
                     st.sampled_from(["cosine", "linear", "constant"]), st.sampled_from([0.5, 2.0, 64.0]),
                     st.integers(1, 3), st.sampled_from(["none", "percentile", "zscore"]),
                     st.lists(event, min_size=1, max_size=8).map(tuple))  # fmt: skip


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
    assert (c.task.objective.committed, c.task.objective.discarded) == (0, 1)
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


def test_a_norm_a_little_above_the_limit_is_shortened_to_it():
    """Plain SGD: the parameters move by LR times the limit, whatever the report says."""
    task = ToyTask(norm=False)
    optimizer = build_optimizer(task.param_groups(), optim(lr=0.5, momentum=0.0, weight_decay=0.0))
    c = StepController(task, optimizer, device=torch.device("cpu"))
    norm = step(c, clip_norm=0.0, lr_factor=1e-9).grad_l2_preclip
    before = [p.detach().clone() for p in task.model.parameters()]
    report = step(c, clip_norm=0.8 * norm)
    assert 0.8 * norm < report.grad_l2_preclip < 1.6 * norm
    moved = math.hypot(*(float((a - b.detach()).norm()) for a, b in zip(before, task.model.parameters(), strict=True)))
    assert moved == pytest.approx(0.5 * 0.8 * norm, rel=1e-4)


def test_no_graph_outlives_its_step():
    task = ToyTask()
    kept, features = [], []
    c = controller(task)
    step(c, observe=lambda report: features.append(weakref.ref(report.probe_at[0])))
    gc.collect()
    assert features[0]() is None
    step(c, observe=lambda report: kept.append(report.total))
    with pytest.raises(RuntimeError, match=r"second time|freed"):
        kept[0].backward()


def test_observers_see_the_live_report_and_the_unclipped_gradients():
    c, seen = controller(ToyTask()), []
    step(c, clip_norm=0.01, observe=lambda r: seen.append(r.total.requires_grad),
         watch=lambda named: seen.append(math.hypot(*(float(p.grad.norm()) for _, p in named))))  # fmt: skip
    assert seen[0] is True and seen[1] > 0.1
    c.run(
        [c.task.batch(i) for i in range(3)], lr_factor=1.0, clip_norm=1.0, observe=lambda r: seen.append(r.image_ids[0])
    )
    assert seen[2:] == ["image_0_0"], "the first micro-batch of a window, and no other"


class Syncs(TorchDispatchMode):
    """Counts where a device would have to answer the host: a scalar read, or a shape that depends on values."""

    WAITING = ("_local_scalar_dense", "nonzero", "_unique2", "masked_select", "equal", "item")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.WAITING:
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_a_committed_step_asks_the_device_once(monkeypatch, precision, count, clip):
    """Whatever the precision, the number of micro-batches and whether it clips."""
    task, asked = ToyTask(), []
    c = controller(task, precision)
    step(c)  # the scaler makes its tensors on its first use
    monkeypatch.setattr(ToyBatch, "finite", lambda self: True)  # a matter of the host
    for name in ("tolist", "cpu", "numpy"):
        honest = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, honest=honest, name=name: asked.append(name) or honest(self, *a)
        )
    with Syncs() as syncs:
        report = c.run([task.batch(i) for i in range(count)], lr_factor=1.0, clip_norm=clip)
    assert report.committed and asked + syncs.seen == ["tolist"]
    with Syncs() as syncs:  # the counter counts
        bool(torch.ones(1)), float(torch.ones(1)), torch.ones(2).nonzero()
    assert len(syncs.seen) == 3


def test_the_share_of_saturated_rows_is_told_over_all_micro_batches():
    """Their mean, weighed like the losses by the micro-batches' normalisers: 1 and 3 here."""
    task, (one, two) = ToyTask(), (1.0, 3.0)

    def clamped(batch, report):
        first = batch.index == 0
        return replace(report, saturated={"dfl": torch.tensor(0.5 if first else 0.1), "cpe": torch.tensor(0.0)},
                       normaliser=torch.tensor(one if first else two))  # fmt: skip

    task.spoil = clamped
    report = controller(task).run([task.batch(0), task.batch(1)], lr_factor=1.0, clip_norm=10.0)
    assert report.saturated == pytest.approx({"dfl": (0.5 * one + 0.1 * two) / (one + two), "cpe": 0.0})
    task.spoil = None
    assert step(controller(task)).saturated == {} != step(controller(task)).raw


def test_a_running_variance_that_overflows_on_finite_losses_is_rejected_and_named():
    """Activations of 1e25 are finite and normalised away; their square is not, and evaluation would be dead."""
    task = ToyTask()
    c = controller(task)
    before = everything(c)
    handle = task.model.backbone[0].register_forward_hook(lambda m, i, out: out * 1e25)
    report = step(c)
    handle.remove()
    assert all(math.isfinite(v) for v in report.raw.values()) and report.outcome == "bad_loss"
    assert "running_var of backbone.1 (BatchNorm2d)" in report.culprit
    assert (report.evidence["running_statistics"], report.evidence["cause"]) == (
        "running_var of backbone.1 (BatchNorm2d)", "data")  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(before, everything(c), strict=True))


def test_a_buffer_that_holds_inf_by_design_does_not_stop_training():
    task = ToyTask()
    task.model.head.register_buffer("mask", torch.tensor([0.0, -INF]))
    assert step(controller(task)).committed


def test_unscaled_gradients_whose_norm_overflows_are_no_matter_of_the_loss_scale():
    task = ToyTask()
    c = controller(task, "fp16")
    handle = task.model.head.weight.register_hook(lambda g: torch.full_like(g, 1e26))
    report = step(c)
    handle.remove()
    assert report.outcome == "bad_grad" and "norm overflows" in report.culprit and c.scaler.get_scale() == 8192


def test_an_overflow_at_a_scale_that_has_worked_is_run_again_at_once():
    """In fp32 too: the data, the loss or the backward, and not the scale. Only in half: calibration, said so."""
    task = ToyTask()
    c = controller(task, "fp16")
    assert step(c).committed
    handle = bad_gradients(task, NAN)
    report = step(c, 1)
    handle.remove()
    assert (report.outcome, report.evidence["cause"], report.evidence["in_float32"]) == (
        "bad_grad", "backward", "not finite")  # fmt: skip
    task.spoil = only_in_half
    report = step(c, 2)
    assert (report.outcome, report.evidence["cause"]) == ("amp_backoff", "amp")
    assert "finite in float32, so precision is the reason" in report.culprit


def test_an_overflow_at_a_scale_that_has_not_worked_yet_costs_no_replay():
    task = ToyTask(spoil=only_in_half)
    c = controller(task, "fp16")
    reports = [step(c) for _ in range(3)]
    assert [r.evidence["in_float32"][:7] for r in reports] == ["not run", "not run", "finite"]
    assert all(r.evidence["parameter"].startswith("head.") for r in reports), "of five, the nearest to the losses"
    assert {r.outcome for r in reports} == {"amp_backoff"}


def test_overflows_with_committed_steps_between_them_are_not_in_a_row():
    """The scale grows after each step and overflows at its new value, four times: none of it is worth a replay."""
    task = ToyTask()
    c = controller(task, "fp16", growth_interval=1, init_scale=8.0)
    for i in range(4):
        task.spoil = None
        assert step(c, 2 * i).loss_scale == 8.0
        task.spoil = only_in_half
        report = step(c, 2 * i + 1)
        assert (report.outcome, report.loss_scale) == ("amp_backoff", 16.0)
        assert report.evidence["in_float32"].startswith("not run")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_loss_that_is_bad_in_half_only_blames_the_precision(precision):
    def spoil(batch, report):
        return spoiled("bbox", NAN)(batch, report) if torch.is_autocast_enabled("cpu") else report

    report = step(controller(ToyTask(spoil=spoil), precision))
    assert (report.outcome, report.evidence["cause"]) == ("bad_loss", "amp")
    assert "bbox_loss (rows [1] of image_0_1)" in report.culprit and "precision is the reason" in report.culprit


def test_the_replay_draws_the_same_dropout_and_leaves_the_generator_alone():
    """A loss that is bad for one draw only is bad again in the replay, and training goes on with the next draw."""
    task, draws = ToyTask(), []

    def spoil(batch, report):
        draws.append(float(torch.rand(())))
        return spoiled("bbox", NAN)(batch, report) if draws[-1] == draws[0] else report

    task.spoil = spoil
    c = controller(task)
    report = step(c)
    after = torch.rand(())
    assert len(draws) == 2 and draws[0] == draws[1] and report.evidence["cause"] == "loss"
    torch.manual_seed(0)
    twin = ToyTask()
    twin.spoil = lambda b, r: (torch.rand(()), spoiled("bbox", NAN)(b, r))[1]
    step(controller(twin))
    assert torch.rand(()) == after


def test_a_replay_that_does_not_fit_into_memory_is_no_error():
    task, calls = ToyTask(), []

    def spoil(batch, report):
        calls.append(1)
        if len(calls) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return spoiled("bbox", NAN)(batch, report)

    task.spoil = spoil
    report = step(controller(task))
    assert (
        report.outcome == "bad_loss" and report.evidence["in_float32"] == "not run: it does not fit into memory in fp32"
    )


STOPPED = (("fine", 0), ("overflow_in_half", 0), ("resume", 0), ("fine", 1), ("inf_gradient", 0), ("resume", 0),
           ("empty", 0), ("fine", 0))  # fmt: skip


@settings(max_examples=40, deadline=None, derandomize=True)
@given(drawn())
@example(machine.Sequence("fp32", 2, "cosine", 64.0, 1, "percentile", STOPPED))
@example(machine.Sequence("bf16", 3, "linear", 64.0, 1, "none", STOPPED))
@example(machine.Sequence("fp16", 1, "cosine", 64.0, 1, "zscore", STOPPED))
def test_any_sequence_of_events_agrees_with_the_model(sequence):
    """Rejections leave no trace, LR, EMA and scale follow their formulas, nothing non-finite stays anywhere."""
    machine.check(sequence)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(drawn())
def test_three_hundred_sequences_of_events_agree_with_the_model(sequence):
    machine.check(sequence)


def test_backoffs_of_half_precision_itself_raise_no_alarm():
    seen = list(machine.climb(40))
    assert [alarm for _, alarm in seen if alarm] == []
    scales = [r.loss_scale for r, _ in seen if r.outcome == "amp_backoff"]
    assert len(scales) == 40 and min(scales) > 64, "the scale that overflows is far above the first"
