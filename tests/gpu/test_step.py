# SPDX-License-Identifier: AGPL-3.0-or-later
"""The step on a CUDA device: the same outcomes as on the CPU, fused optimizers, one wait for the device."""

import math
import warnings
from dataclasses import replace

import pytest
import torch

from engine.toy import ToyBatch, ToyTask, optim
from fsdet.config import Guard
from fsdet.engine.ema import Ema
from fsdet.engine.optimizer import build_optimizer
from fsdet.engine.step import StepController

pytestmark = pytest.mark.gpu
INF, NAN = float("inf"), float("nan")


class Resident(ToyTask):
    """ToyTask whose model, objective and batches are on the device already."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model, self.objective = self.model.cuda(), self.objective.cuda()

    def batch(self, index):
        batch = super().batch(index)
        return ToyBatch(**{**vars(batch), "pixels": batch.pixels.cuda(), "answer": batch.answer.cuda()})

    def losses(self, batch):
        report = super().losses(batch)
        return replace(report, normaliser=self.count) if hasattr(self, "count") else report


def watch(mode: str) -> None:
    """torch.cuda.set_sync_debug_mode, which warns that it is a prototype."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode(mode)


def controller(task, precision="fp32", name="sgd", **guard):
    optimizer = build_optimizer(task.param_groups(), optim(lr=0.05, momentum=0.9, name=name))
    task.model.train()
    device = next(task.model.parameters()).device
    return StepController(task, optimizer, device=device, precision=precision, guard=Guard(**guard),
                          ema=Ema(task.model, 0.9, 5))  # fmt: skip


def step(c, index=0):
    return c.run([c.task.batch(index)], lr_factor=1.0, clip_norm=10.0)


@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_committed_steps_move_parameters_as_on_the_cpu(name):
    """Five steps with the same batches; dropout draws differently, so it is off."""
    ours, theirs = Resident(), ToyTask()
    both = []
    for task in (ours, theirs):
        task.model.drop.p = 0.0
        c = controller(task, name=name)
        assert all(step(c, i).committed for i in range(5))
        both.append(
            [p.detach().cpu() for p in task.model.parameters()] + [t.cpu() for t in c.ema.state_dict().values()]
        )
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_sgd_and_adamw_run_in_one_kernel():
    for name in ("sgd", "adamw"):
        optimizer = controller(Resident(), name=name).optimizer
        assert all(group["fused"] for group in optimizer.param_groups), name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["sgd", "adamw", "muon"])
def test_a_committed_step_waits_for_the_device_once(monkeypatch, precision, name):
    """CUDA itself refuses every other wait: the debug mode raises, but for the one reading of the decision vector."""
    task = Resident()
    task.count = torch.tensor(4.0, device="cuda")
    c = controller(task, precision, name)
    batches = [task.batch(i) for i in range(3)]
    monkeypatch.setattr(ToyBatch, "to", lambda self, device: self)
    monkeypatch.setattr(ToyBatch, "finite", lambda self: True)  # a matter of the host
    c.run(batches[:1], lr_factor=1.0, clip_norm=0.01)  # kernels load, state is made
    read, readings = torch.Tensor.tolist, []

    def allowed(tensor):
        watch("default")
        readings.append(tensor)
        try:
            return read(tensor)
        finally:
            watch("error")

    monkeypatch.setattr(torch.Tensor, "tolist", allowed)
    watch("error")
    try:
        reports = [c.run(window, lr_factor=1.0, clip_norm=0.01) for window in (batches[1:2], batches)]
        with pytest.raises(RuntimeError, match="synchronizing"):  # the mode is on
            torch.ones(2, device="cuda").sum().item()
    finally:
        watch("default")
    assert all(r.committed for r in reports) and len(readings) == 2


def test_an_overflow_in_half_precision_lowers_the_scale_and_is_not_blamed_on_the_data():
    task = Resident()
    c = controller(task, "fp16", init_scale=2.0**15)
    hook = task.model.head.weight.register_hook(lambda g: g * INF)
    before = [p.detach().clone() for p in task.model.parameters()]
    assert step(c).outcome == "amp_backoff" and c.scaler.get_scale() == 2.0**14
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, task.model.parameters(), strict=True))
    assert step(c).committed and c.step == 1 and c.ema.count == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_loss_that_is_nan_is_rejected_and_leaves_no_trace(precision):
    task = Resident()
    c = controller(task, precision)
    assert step(c).committed
    before = [t.clone() for t in (*task.model.state_dict().values(), *c.ema.state_dict().values())]
    task.spoil = lambda batch, report: replace(
        report, total=report.total * NAN, raw={**report.raw, "cls": report.raw["cls"] * NAN},
        weighted={**report.weighted, "cls": report.weighted["cls"] * NAN})  # fmt: skip
    report = step(c, 1)
    assert report.outcome == "bad_loss" and "cls" in report.culprit and c.step == 1
    after = [*task.model.state_dict().values(), *c.ema.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    task.spoil = None
    assert step(c, 2).committed and math.isfinite(c.scaler.get_scale())
