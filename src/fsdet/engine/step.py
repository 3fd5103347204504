# SPDX-License-Identifier: AGPL-3.0-or-later
"""One optimization step, in one order: forward, scale, backward, unscale, decide, clip, step, update, EMA.

Only this object touches the scaler, the gradients and the optimizer. Every step ends in one outcome of types.OUTCOMES
and only `committed` moves parameters, running statistics, the EMA and the step counter.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fsdet.config import Guard
from fsdet.engine import forensics
from fsdet.engine.ema import Ema
from fsdet.engine.forensics import Finding
from fsdet.engine.memory import Memory
from fsdet.engine.optimizer import autocast, set_lr
from fsdet.engine.schedule import GROWTH_MOST
from fsdet.errors import FsdetError
from fsdet.peers import ALONE, PeerOutOfMemory, Peers
from fsdet.types import LossReport, StepReport, Task

REPLAY_AFTER = 3  # fp16 overflows in a row after which the batch is run again in float32, at whatever scale


class TooLarge(FsdetError):
    """The forward or backward of a window does not fit into memory. Everything is as before the step."""


@dataclass(frozen=True)
class Facts:
    """The decision vector of a step on the host: one sync for all of it. Losses are averaged over micro-batches.

    finite: every loss and normaliser of every micro-batch is. sound: no running statistic has become NaN or inf.
    saturated: shares of rows that clamped losses cut off.
    norm: L2 over all unscaled gradients; norm_there: the same where it was computed.
    """

    finite: bool
    sound: bool
    total: float
    raw: Mapping[str, float]
    weighted: Mapping[str, float]
    norm: float
    scale: float
    norm_there: Tensor | None = None
    saturated: Mapping[str, float] = field(default_factory=dict)


class StepController:
    """Owns the order of a step.

    Args:
        task: gives model, objective and losses. optimizer: of build_optimizer. device, precision: fp32, bf16 or fp16.
        guard: initial loss scale, growth interval and lowest healthy scale of fp16. ema: moved by committed steps.
        peers: the processes that take each step together.

    Of several processes each runs its images of the batch. Gradients are added up once, after the last backward, and
    with them the losses: what is decided on is then the same everywhere, and so is the decision. With
    DistributedDataParallel they would be added up during the backward, which hangs where one process leaves a branch
    unused or stops half-way; what it hides is little: 12 MB of yolov8n's gradients took 17 ms over loopback.
    """

    def __init__(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer,
        *,
        device: torch.device,
        precision: str = "fp32",
        guard: Guard | None = None,
        ema: Ema | None = None,
        peers: Peers = ALONE,
    ) -> None:
        self.peers = peers
        self.task, self.optimizer, self.device, self.precision, self.ema = task, optimizer, device, precision, ema
        self.guard = guard or Guard()
        self.named = [pair for members in task.param_groups().values() for pair in members]
        self.scaler = torch.amp.GradScaler(
            device.type,
            init_scale=self.guard.init_scale,
            enabled=precision == "fp16",
            growth_interval=self.guard.growth_interval or GROWTH_MOST,
        )
        self.memory = Memory(task.model, task.objective)
        self.step = 0  # committed
        self.overflows = self.overflows_low = 0  # in a row, of fp16; the latter below guard.min_scale
        self.proven = 0.0  # the largest loss scale of a committed step

    def run(
        self,
        window: Sequence[Any],
        *,
        lr_factor: float,
        clip_norm: float,
        observe: Callable[[LossReport], None] | None = None,
        watch: Callable[[Sequence[tuple[str, nn.Parameter]]], None] | None = None,
    ) -> StepReport:
        """Take one step over the micro-batches of `window` (host batches, at least one).

        observe: called once, between the first forward and its backward, with the live LossReport.
        watch: called with the named parameters when their gradients are unscaled and not yet clipped.
        Raises:
            TooLarge: out of memory before anything was decided; the same step may be run in smaller parts.
        """
        lr = set_lr(self.optimizer, lr_factor)
        ids = tuple(i for batch in window for i in getattr(batch, "image_ids", ()))
        finding = forensics.bad_input(window)
        if self.peers.most(finding is not None):
            nothing = _nothing(self.scaler.get_scale())
            return self._rejected("bad_input", nothing, lr, finding or Finding(), finding is not None, ids)
        self.memory.take()
        try:
            reports, vectors = self._backward(window, observe)
            vectors, sound = self._together(vectors)
        except torch.OutOfMemoryError as error:
            if not isinstance(error, PeerOutOfMemory):
                self.peers.confess()
            self._forget()
            self.memory.restore_generators()
            self.optimizer.zero_grad(set_to_none=True)
            raise TooLarge(str(error)) from error
        gradients = [p.grad for _, p in self.named if p.grad is not None]
        unscaled = self._unscale(gradients, reports)
        if watch is not None:
            watch(self.named)
        facts = self._read(reports[0], vectors, gradients, sound)
        outcome, finding, own = self._decide(facts, bool(gradients), window, reports)
        clip_norm = clip_norm or math.inf
        if outcome == "committed":
            self._commit(facts, clip_norm)
        else:
            self._forget()
        if unscaled:
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if outcome == "committed":
            return _report(outcome, self.step, facts, lr, finding, ids, clip_norm)
        return self._rejected(outcome, facts, lr, finding, own, ids, clip_norm)

    def _backward(self, window: Sequence[Any], observe: Callable | None) -> tuple[list[LossReport], list[Tensor]]:
        """Micro-batch i weighs total_i * normaliser_i / normaliser_0, so that their sum is the big batch's gradient."""
        reports, vectors = [], []
        for batch in window:
            with autocast(self.device, self.precision):
                report = self._shared(self.task.losses(batch.to(self.device)))
            if observe is not None and not reports:
                observe(report)
            total = report.total
            vectors.append(_vector(report, self.device))
            if len(window) > 1:
                first = reports[0].normaliser if reports else report.normaliser
                total = total * (report.normaliser.detach() / first.detach())
            if total.requires_grad:
                self.scaler.scale(total).backward()
            reports.append(forensics.without_graph(report))
        return reports, vectors

    def _shared(self, report: LossReport) -> LossReport:
        """This process's part of the batch's losses: means over images weigh by normaliser, as micro-batches do."""
        if self.peers.alone or report.shared:
            return report
        normaliser = self.peers.total(report.normaliser)
        part = report.normaliser.detach() / normaliser

        def scaled(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value * part for name, value in values.items()}

        return replace(report, total=report.total * part, raw=scaled(report.raw), weighted=scaled(report.weighted),
                       saturated=scaled(report.saturated), normaliser=normaliser, shared=True)  # fmt: skip

    def _together(self, vectors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Losses of all processes, and whether their running statistics are sound; the gradients are added up in place.

        Still scaled: the loss scale is the same everywhere, and an overflow in one process is one in all of them.
        """
        sound = [flag.to(self.device, torch.float32) for flag in self.memory.finite()]
        if self.peers.alone:
            return vectors, sound
        masks = self.peers.tell("".join("01"[p.grad is not None] for _, p in self.named))
        for (_, parameter), *used in zip(self.named, *masks, strict=True):
            if parameter.grad is None and "1" in used:  # a branch that another process has used and this one has not
                parameter.grad = torch.zeros_like(parameter)
        gradients = [p.grad for _, p in self.named if p.grad is not None]
        *summed, unsound = self.peers.add_up(
            gradients, torch.cat([*vectors, *(1 - flag.reshape(1) for flag in sound)])
        ).split([*map(len, vectors), len(sound)])
        return summed, list((unsound == 0).float())

    def _unscale(self, gradients: list[Tensor], reports: list[LossReport]) -> bool:
        if not gradients:
            return False
        self.scaler.unscale_(self.optimizer)
        if len(reports) > 1:
            share = reports[0].normaliser / sum(r.normaliser for r in reports)
            torch._foreach_mul_(gradients, share.to(gradients[0].dtype))
        return self.scaler.is_enabled()

    def _read(self, report: LossReport, vectors: list[Tensor], gradients: list[Tensor], sound: list[Tensor]) -> Facts:
        one = torch.ones((), device=self.device)
        norm = get_total_norm(gradients).float().to(self.device) if gradients else 0 * one
        tail = torch.stack([norm, self.scaler.scale(one), *sound])
        widths = [*(len(v) for v in vectors), 2, len(sound)]
        values = torch.cat([*vectors, tail]).tolist()  # the one host sync
        *table, (norm_value, scale), flags = _split(values, widths)
        share = [row[0] / (sum(r[0] for r in table) or math.nan) for row in table]
        mean = [sum(s * row[c] for s, row in zip(share, table, strict=True)) for c in range(widths[0])]
        raw = dict(zip(report.raw, mean[2:], strict=False))
        weighted = dict(zip(report.weighted, mean[2 + len(raw) :], strict=False))
        saturated = dict(zip(report.saturated, mean[2 + len(raw) + len(weighted) :], strict=True))
        finite = all(math.isfinite(v) for row in table for v in row)
        return Facts(finite, all(flags), mean[1], raw, weighted, norm_value, scale, norm, saturated)

    def _decide(
        self, facts: Facts, any_gradient: bool, window: Sequence[Any], reports: list[LossReport]
    ) -> tuple[str, Finding, bool]:
        """Outcome, the same in all processes; what this one found; and whether it is here that something is wrong."""
        if not (facts.finite and facts.sound):
            buffer = None if facts.sound else self.memory.first_not_finite()
            losses, replay = forensics.losses_not_finite(reports), self._replay(window)
            wrong = bool(losses or buffer or not replay.finite)
            return "bad_loss", forensics.bad_loss(losses, buffer, replay, self.precision), wrong
        if not any_gradient:
            return "no_grad", Finding("no parameter received a gradient"), False
        if math.isfinite(facts.norm):
            return "committed", Finding(), False
        suspect = forensics.suspect_of(self.named)
        if (
            self.scaler.is_enabled() and not suspect.finite
        ):  # the scale has no say in unscaled gradients that are finite
            return self._overflow(facts.scale, suspect, window)
        replay = self._replay(window)
        return "bad_grad", forensics.bad_gradient(suspect, replay, self.precision), not replay.finite

    def _overflow(self, scale: float, suspect: forensics.Suspect, window: Sequence[Any]) -> tuple[str, Finding, bool]:
        """fp16: calibration of the loss scale, unless it repeats at a low scale or float32 shows the same.

        A scale that no step has been committed at may simply be too high; one that has worked is not, nor are three
        in a row, and so the batch is run again in float32.
        """
        self.overflows += 1
        self.overflows_low = self.overflows_low + 1 if scale < self.guard.min_scale else 0
        low = self.overflows_low > 1
        asked = low or scale <= self.proven or self.overflows >= REPLAY_AFTER
        replay = self._replay(window) if asked else None
        own = replay is not None and not replay.finite and not replay.failed
        bad = low or (replay is not None and self.peers.most(own))
        finding = forensics.bad_gradient(suspect, replay, self.precision)
        if low:
            finding = replace(finding, culprit=f"{finding.culprit}; still so at loss scale {scale:g}")
        return ("bad_grad" if bad else "amp_backoff"), finding, own

    def _replay(self, window: Sequence[Any]) -> forensics.Replay:
        """The window once more in float32, from the buffers and generators it was run with."""
        with self.memory.again():
            found = forensics.replay(self.task, window, self.device, self.named, peers=self.peers)
            return replace(found, buffer=self.memory.first_not_finite())

    def _rejected(
        self, outcome: str, facts: Facts, lr: Mapping[str, float], finding: Finding, own: bool, ids: tuple[str, ...],
        clip_norm: float = math.inf,
    ) -> StepReport:  # fmt: skip
        """The report of a step that was not committed, the same in all processes: of the one that can name an image."""
        if self.peers.alone:
            return _report(outcome, self.step, facts, lr, finding, ids, clip_norm)
        weight = own + (own and forensics.names_images(finding))
        told = self.peers.tell([int(weight), finding.culprit, dict(finding.evidence), list(ids)])
        rank = max(range(len(told)), key=lambda r: (told[r][0], -r))
        blamed, culprit, evidence, _ = told[rank]
        finding = Finding(f"process {rank}: {culprit}" if blamed else culprit, {**evidence, "rank": rank})
        everyone = tuple(name for *_, names in told for name in names)
        return replace(_report(outcome, self.step, facts, lr, finding, everyone, clip_norm), rank=rank)

    def _commit(self, facts: Facts, clip_norm: float) -> None:
        if facts.norm > clip_norm:
            clip_grads_with_norm_([p for _, p in self.named if p.grad is not None], clip_norm, facts.norm_there)
        self.optimizer.step()
        self._pool_statistics()
        self.step += 1
        self.overflows = self.overflows_low = 0
        self.proven = max(self.proven, facts.scale)
        if self.ema is not None:
            self.ema.update(self.task.model)
        if commit := getattr(self.task.objective, "commit", None):
            commit()

    @torch.no_grad()
    def _pool_statistics(self) -> None:
        """BatchNorm normalises by the images of its process; its running statistics are the mean over all of them."""
        if self.peers.alone:
            return
        norms = [m for m in self.task.model.modules() if isinstance(m, _BatchNorm) and m.training]
        running = [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
        if running:
            self.peers.add_up(running, running[0].new_zeros(0))
            torch._foreach_div_(running, self.peers.world)

    def _forget(self) -> None:
        """Undo what the forward did: running statistics, and what the objective remembered for its commit."""
        self.memory.restore()
        if discard := getattr(self.task.objective, "discard", None):
            discard()


def _vector(report: LossReport, device: torch.device) -> Tensor:
    """[2 + losses] float32: normaliser, total, raw and weighted losses, saturated shares; detached, on the device."""
    scalars = (report.normaliser, report.total, *report.raw.values(), *report.weighted.values(),
               *report.saturated.values())  # fmt: skip
    return torch.stack([torch.as_tensor(v).detach().to(device, torch.float32) for v in scalars])


def _split(values: list[float], widths: Sequence[int]) -> list[list[float]]:
    ends = list(itertools.accumulate(widths))
    return [values[end - width : end] for end, width in zip(ends, widths, strict=True)]


def _nothing(scale: float) -> Facts:
    return Facts(False, True, math.nan, {}, {}, math.nan, scale)


def _report(
    outcome: str,
    step: int,
    facts: Facts,
    lr: Mapping[str, float],
    finding: Finding,
    ids: tuple[str, ...],
    clip_norm: float = math.inf,
) -> StepReport:
    ratio = max(1.0, facts.norm / clip_norm) if math.isfinite(facts.norm) else math.nan
    return StepReport(
        outcome,
        step,
        facts.norm,
        facts.norm / ratio,
        ratio,
        facts.scale,
        lr,
        facts.total,
        facts.raw,
        facts.weighted,
        finding.culprit,
        ids,
        finding.evidence,
        facts.saturated,
    )
