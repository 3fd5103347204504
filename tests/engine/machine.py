# SPDX-License-Identifier: AGPL-3.0-or-later
"""The step as a state machine: a sequence of events on the real Trainer's parts, each checked against a small model.

`scripts/bench/soak.py` runs thousands of sequences of the same machine.
"""

import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from engine.toy import ToyBatch, ToyTask, trainer
from fsdet.config import Guard, Log
from fsdet.engine import rewind
from fsdet.engine.runlog import RunLog
from fsdet.engine.trainer import Trainer
from fsdet.types import LossReport, StepReport

NAN, INF = math.nan, math.inf
EVENTS = ("fine", "nan_pixel", "inf_pixel", "nan_loss", "inf_loss", "nan_gradient", "inf_gradient", "norm_overflow",
          "spike", "overflow_in_half", "huge_activation", "empty", "frozen", "resume", "rewind")  # fmt: skip
FREEZE = {1: [], 2: ["backbone"], 3: []}  # so that epochs of 5 batches freeze and unfreeze
WARMUP = 2  # steps
LR = 0.05


@dataclass(frozen=True)
class Sequence:
    """What is drawn: precision, micro-batches a window, schedule, fp16's first scale and interval, and the events.

    Each event comes with the micro-batch of its window that it strikes, modulo the window's length.
    """

    precision: str
    accumulate: int
    schedule: str
    scale: float
    interval: int
    adaptive: str
    events: tuple[tuple[str, int], ...]


@dataclass
class Model:
    """What must be true after each event. rejected, skipped: indices of batches; saves: what was true at each save."""

    commits: int = 0
    rewinds: int = 0
    backoffs: int = 0
    growths: int = 0
    tracker: int = 0
    rejected: set[int] = field(default_factory=set)
    skipped: set[int] = field(default_factory=set)
    saves: dict[int, tuple["Model", Mapping[str, Tensor]]] = field(default_factory=dict)

    def saved(self, run: Trainer) -> None:
        """The run has been saved, or has begun, where it is now."""
        now = replace(self, rejected=set(self.rejected), skipped=set(self.skipped), saves={})
        self.saves[run.position.batch] = now, _everything(run)

    def unscaled(self, overflow: bool, interval: int) -> None:
        """A step whose gradients were unscaled; the scaler grows after `interval` of them without overflow."""
        self.backoffs += overflow
        self.tracker = 0 if overflow else self.tracker + 1
        if self.tracker == interval:
            self.growths, self.tracker = self.growths + 1, 0


def draw(rng: random.Random, most: int = 9) -> Sequence:
    """A sequence from a generator, every event equally likely, fine ones as often as all others."""
    events = tuple((rng.choice(("fine", rng.choice(EVENTS))), rng.randrange(3)) for _ in range(rng.randint(1, most)))
    return Sequence(
        precision=rng.choice(("fp32", "bf16", "fp16")),
        accumulate=rng.randint(1, 3),
        schedule=rng.choice(("cosine", "linear", "constant")),
        scale=rng.choice((0.5, 2.0, 64.0)),
        interval=rng.randint(1, 3),
        adaptive=rng.choice(("none", "percentile", "zscore")),
        events=events,
    )


def check(sequence: Sequence) -> None:
    """Run a sequence; AssertionError tells the event at which the model and the engine part."""
    with tempfile.TemporaryDirectory() as folder:
        run, model = _start(sequence, Path(folder)), Model()
        model.saved(run)
        for number, (event, where) in enumerate(sequence.events):
            try:
                if event == "resume":
                    run = _resumed(run, sequence, Path(folder))
                    model.saved(run)
                elif event == "rewind":
                    model = _rewound(run, model)
                else:
                    _one(run, sequence, model, event, where)
                _agrees(run, sequence, model)
            except AssertionError as error:
                raise AssertionError(f"event {number} ({event}) of {sequence}: {error}") from error
            finally:
                run.log.records.close()  # a rewind opens them again


def climb(count: int, seed: int = 0) -> Iterator[tuple[StepReport, str | None]]:
    """Steps of fp16 whose scale doubles after each one, so that half precision itself overflows, `count` times.

    Each comes with the false alarm that it raised, or None.
    """
    with tempfile.TemporaryDirectory() as folder:
        drawn = Sequence("fp16", 1, "constant", 64.0, 1, "none", ())
        run, overflows = _start(replace(drawn, scale=2.0**12), Path(folder)), 0
        while overflows < count:
            report = run._step([run.task.batch(seed + run.position.batch)])
            flags = run.guard.see(report, warm=True)
            run.position.batch += 1
            overflows += report.outcome == "amp_backoff"
            sound = report.committed or (report.outcome == "amp_backoff" and run.guard.in_row == 0 and not flags)
            alarm = None if sound else f"{report.outcome}: {report.culprit} {[f.name for f in flags]}"
            yield report, alarm if run.guard.verdict() is None else run.guard.verdict()


def _start(sequence: Sequence, folder: Path, resume: bool = False) -> Trainer:
    guard = Guard(init_scale=sequence.scale, growth_interval=sequence.interval, max_rejected_in_row=10**6,
                  max_rejected_share=1.0, max_low_scale=10**6, max_rewinds=10**6)  # fmt: skip
    changes = {"accumulate": sequence.accumulate, "schedule": sequence.schedule, "epochs": 12, "lr": LR,
               "warmup_epochs": WARMUP / math.ceil(5 / sequence.accumulate), "min_lr": 0.0, "clip_norm": 1.0,
               "clip_adaptive": sequence.adaptive, "clip_window": 3}  # fmt: skip
    run = trainer(ToyTask(), folder / "run", changes=changes, guard=guard, log=Log(every=10**6), freeze=FREEZE,
                  precision=sequence.precision, resume=resume)  # fmt: skip
    run.log = RunLog(run.folder, run.logging, {})
    run.freezer.apply(run.epoch)
    return run


def _resumed(run: Trainer, sequence: Sequence, folder: Path) -> Trainer:
    """A new Trainer from the files of the old one: equal to the last bit, and one that was never stopped."""
    before = _everything(run)
    run._save(wait=True)
    fresh = _start(sequence, folder, resume=True)
    assert fresh.state.take()["optimizer"].keys() == run.state.take()["optimizer"].keys()
    assert _equal(before, _everything(fresh)), "a resume changed the state"
    memories = [(c.proven, c.overflows, c.overflows_low) for c in (fresh.controller, run.controller)]
    assert memories[0] == memories[1], f"the scale's history changed: {memories}"
    assert fresh.clipping.norms == run.clipping.norms and fresh.guard.state_dict() == run.guard.state_dict()
    fresh.task.objective.committed = run.task.objective.committed
    return fresh


class _Feed:
    """Hears where batches go on from."""

    def seek(self, batch: int, skipped: frozenset[int]) -> None:
        self.at, self.skipped = batch, set(skipped)


def _rewound(run: Trainer, model: Model) -> Model:
    """Back to a save: all that was true there is true again, but for the LR and the batches that are left out."""
    if not rewind.may_go_back(run.state) or run.saver.good() is None:
        return model
    report, feed = StepReport("bad_loss", run.controller.step, NAN, NAN, NAN, 1.0, {}, NAN, {}, {}), _Feed()
    reached = run.position.batch
    run._rewind("drawn", report, feed)
    entry = run.position.rewinds[-1]
    old, tensors = model.saves[entry["to_batch"]]
    assert _equal(tensors, _everything(run)), "a rewind is not where it was saved"
    assert entry["skipped"] == sorted(i for i in model.rejected if entry["to_batch"] <= i < reached)
    skipped = model.skipped | set(entry["skipped"])
    assert (feed.at, feed.skipped) == (run.position.batch, skipped)
    run.task.objective.committed = old.commits
    back = replace(old, rewinds=model.rewinds + 1, rejected=set(old.rejected), skipped=skipped)
    back.saves = {batch: save for batch, save in model.saves.items() if batch <= entry["to_batch"]}
    back.saved(run)
    return back


def _one(run: Trainer, sequence: Sequence, model: Model, event: str, where: int) -> None:
    run.freezer.apply(run.epoch)
    epoch, before, plan = run.epoch, _everything(run), _lr(run, sequence, model)
    kept = [p.clone() for p in run.task.model.backbone.parameters()]
    ahead = [i for i in range(run.position.batch, 5 * epoch) if i not in model.skipped][: sequence.accumulate]
    where = ahead[where % len(ahead)]
    with _struck(run, event, where):
        window = run._window(map(run.task.batch, [*ahead, None]))
        report = run._step(window)
    assert [batch.index for batch in window] == ahead, "a remainder ends with its epoch"
    run._after(report, window, {})
    model.rejected |= set() if report.committed or report.outcome == "amp_backoff" else set(ahead)
    _outcome(report, event, sequence.precision)
    rates = {g["group"]: g["lr"] for g in run.optimizer.param_groups}
    assert all(math.isclose(lr, plan, rel_tol=1e-12) for lr in rates.values()) and rates == report.lr
    if report.committed:
        model.commits += 1
        assert report.grad_l2_postclip <= 1.0 + 1e-5
    else:
        assert _equal(before, _everything(run)), f"a step that ended as {report.outcome} left a trace"
    if epoch == 2:
        assert all(map(torch.equal, kept, run.task.model.backbone.parameters())), "frozen parameters moved"
    if sequence.precision == "fp16" and event not in ("nan_pixel", "inf_pixel", "frozen"):
        overflow = event in ("nan_loss", "inf_loss", "nan_gradient", "inf_gradient", "overflow_in_half")
        broke = event == "huge_activation" and not math.isfinite(report.grad_l2_preclip)
        model.unscaled(overflow or broke, sequence.interval)


def _outcome(report: StepReport, event: str, precision: str) -> None:
    """The outcome is the event's."""
    calibrating = ["amp_backoff", "bad_grad"] if precision == "fp16" else ["bad_grad"]
    expected = {"fine": ["committed"], "empty": ["committed"], "spike": ["committed"], "frozen": ["no_grad"],
                "nan_pixel": ["bad_input"], "inf_pixel": ["bad_input"], "nan_loss": ["bad_loss"],
                "inf_loss": ["bad_loss"], "huge_activation": ["bad_loss"], "norm_overflow": ["bad_grad"],
                "nan_gradient": calibrating, "inf_gradient": calibrating,
                "overflow_in_half": calibrating if precision != "fp32" else ["committed"]}[event]  # fmt: skip
    assert report.outcome in expected, f"ended as {report.outcome} ({report.culprit})"


def _agrees(run: Trainer, sequence: Sequence, model: Model) -> None:
    """The invariants of a state machine of steps."""
    counts = run.controller.step, run.ema.count, run.task.objective.committed, run.guard.totals["committed"]
    assert counts == (model.commits,) * 4, f"committed, EMA, objective, guard: {counts}, not {model.commits}"
    scale = sequence.scale * 0.5**model.backoffs * 2.0**model.growths if sequence.precision == "fp16" else 1.0
    assert run.controller.scaler.get_scale() == scale, f"loss scale {run.controller.scaler.get_scale()}, not {scale}"
    for name, tensor in _everything(run).items():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), f"{name} is not finite"
    assert all(p.grad is None for p in run.task.model.parameters()), "a gradient was left behind"


def _lr(run: Trainer, sequence: Sequence, model: Model) -> float:
    """Learning rate of the next step, from its definition."""
    total = 12 * math.ceil(5 / sequence.accumulate)
    step = model.commits
    done = min(1.0, (step - WARMUP) / (total - WARMUP))
    shape = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": 1.0}[sequence.schedule]
    return LR * 0.5**model.rewinds * ((step + 1) / WARMUP if step < WARMUP else shape)


def _everything(run: Trainer) -> Mapping[str, Tensor]:
    """Copies of all tensors that a rejected step must leave as they were."""
    task = run.task
    parts = {"model": task.model.state_dict(), "objective": task.objective.state_dict(), "ema": run.ema.state_dict()}
    found = {f"{part}.{name}": value for part, state in parts.items() for name, value in state.items()}
    groups = [p for group in run.optimizer.param_groups for p in group["params"]]
    for i, parameter in enumerate(groups):
        for name, value in run.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                found[f"optimizer.{i}.{name}"] = value
    return {name: value.detach().clone() for name, value in found.items()}


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@contextmanager
def _struck(run: Trainer, event: str, where: int) -> Iterator[None]:
    """The event strikes batch `where`, and its traces in the toy are removed afterwards."""
    task, handles = run.task, []
    frozen = [p for p in task.model.parameters() if p.requires_grad] if event == "frozen" else []
    task.tamper = _pixels(where, event) if event in ("nan_pixel", "inf_pixel", "empty") else None
    if event in ("nan_loss", "inf_loss"):
        task.spoil = _spoiled(where, NAN if event == "nan_loss" else INF)
    elif event == "overflow_in_half":
        task.spoil = _overflowing
    elif event == "huge_activation":
        handles = [task.model.backbone[0].register_forward_hook(lambda m, i, out: out * 1e25)]
    changes = {"nan_gradient": lambda g: g * NAN, "inf_gradient": lambda g: g.index_fill(1, torch.tensor([0]), INF),
               "norm_overflow": lambda g: torch.full_like(g, 1e26), "spike": lambda g: g * 1e6}  # fmt: skip
    if event in changes:
        handles = [task.model.head.weight.register_hook(changes[event])]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        task.tamper = task.spoil = None
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)


def _pixels(where: int, event: str) -> Callable[[ToyBatch], ToyBatch]:
    def tamper(batch: ToyBatch) -> ToyBatch:
        if event == "empty":
            return replace(batch, answer=batch.answer[:0])
        if batch.index == where:
            batch.pixels[1, 2, 3, 4] = NAN if event == "nan_pixel" else INF
        return batch

    return tamper


def _spoiled(where: int, value: float) -> Callable[[ToyBatch, LossReport], LossReport]:
    def spoil(batch: ToyBatch, report: LossReport) -> LossReport:
        if batch.index != where:
            return report
        weighted = {**report.weighted, "bbox": report.weighted["bbox"] * value}
        return replace(report, total=sum(weighted.values()), weighted=weighted)

    return spoil


def _overflowing(batch: ToyBatch, report: LossReport) -> LossReport:
    """A gradient that is inf under autocast and 0 elsewhere."""
    if not torch.is_autocast_enabled("cpu"):
        return report
    term = report.total * 0
    term.register_hook(lambda g: g * INF)
    return replace(report, total=report.total + term)
