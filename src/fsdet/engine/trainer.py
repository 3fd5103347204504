# SPDX-License-Identifier: AGPL-3.0-or-later
"""The training loop. It knows a Task, no detector.

feed -> controller.run (one guarded step) -> guard -> log -> rewind where too many were rejected -> at boundaries:
evaluation, the epoch's row, a checkpoint
"""

import logging
import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fsdet.command import typed
from fsdet.config import Guard, Log, Optim, Run, Save
from fsdet.engine import folder, forensics, judging, portions, probe, records, rewind
from fsdet.engine.allocator import keep_freed_memory
from fsdet.engine.clipping import Clipping
from fsdet.engine.ema import Ema
from fsdet.engine.feed import Feed
from fsdet.engine.freezing import Freezer
from fsdet.engine.guard import REJECTED, Flag, StepGuard, indices, plain
from fsdet.engine.optimizer import build_optimizer, choose_device, choose_precision, rates
from fsdet.engine.position import Position
from fsdet.engine.quarantine import Quarantine
from fsdet.engine.runlog import RunLog, Untold
from fsdet.engine.saving import Saver
from fsdet.engine.schedule import clip_norm_at, growth_interval, lr_factor, total_batches, total_steps
from fsdet.engine.signals import Signals
from fsdet.engine.state import RunState
from fsdet.engine.step import StepController
from fsdet.errors import RunFailed, Stopped, counted, explain
from fsdet.peers import ALONE, Peers
from fsdet.progress import Progress
from fsdet.types import LossReport, Replaced, StepReport, Task

logger = logging.getLogger("fsdet")
DEBUG_EVERY = 50  # steps between the debug log's blocks


@dataclass(frozen=True)
class RunResult:
    """How a run ended: its folder, best checkpoint and metric, last evaluation, committed steps, what to do next."""

    folder: Path
    best: Path
    best_metric: float | None
    metrics: Mapping[str, float]
    steps: int
    next_commands: tuple[str, ...]


class Trainer:
    """Trains `task` in `folder`.

    Args:
        run, optim, guard, save, log: sections of the configuration. workers: loader processes.
        eval_every: epochs between evaluations, fractions allowed; 0 evaluates at the end only.
        resolved: the whole configuration as plain values, stored beside the run. folder: the run folder.
        resume: continue from the newest intact checkpoint of `folder`. exist_ok: a folder with one may be overwritten.
        init_report: which weights were taken over, for the log; None: none. freeze: prefixes, or {epoch: prefixes}.
        freeze_norm: every BatchNorm in eval. peers: the processes that train together; the leading one alone writes,
        judges and tells, and all decide alike.
    Raises:
        ConfigError: the folder holds a run already, or a freeze prefix or group matches nothing.
        CheckpointError: resume finds no intact checkpoint, or one of another architecture.
    """

    def __init__(
        self,
        task: Task,
        *,
        run: Run,
        optim: Optim,
        guard: Guard,
        save: Save,
        log: Log,
        workers: int,
        eval_every: float,
        resolved: Mapping[str, Any],
        folder: Path,
        resume: bool = False,
        init_report: str | None = None,
        freeze: Sequence[str] | Mapping[int, Sequence[str]] = (),
        freeze_norm: bool = False,
        exist_ok: bool = False,
        peers: Peers = ALONE,
    ) -> None:
        self.peers, self.seed = peers, run.seed
        self.task, self.optim, self.logging, self.workers = task, optim, log, workers
        self.resolved, self.folder, self.resume, self.init_report = resolved, Path(folder), resume, init_report
        self._prepare_torch(run)
        self.freezer = Freezer(task, freeze, freeze_norm)
        self.optimizer = build_optimizer(task.param_groups(), optim)
        self._claim(exist_ok)
        self.ema = Ema(task.model, optim.ema, optim.ema_warmup) if optim.ema else None
        self._measure_run(eval_every)
        guard = guard.model_copy(update={"growth_interval": growth_interval(self.total_steps, guard.growth_interval)})
        self.guard, self.clipping = StepGuard(guard, self.folder), Clipping(optim)
        self.controller = StepController(
            task, self.optimizer, device=self.device, precision=self.precision, guard=guard, ema=self.ema,
            peers=peers,
        )  # fmt: skip
        self.quarantine = Quarantine.of(task, self.folder, guard.max_quarantined, peers.leads, resolved)
        self.state = RunState(self.controller, self.guard, self.clipping, self.quarantine, self.resolved)
        self.saver = Saver(self.state, self.folder, save)
        self._begin()
        self._check_alike()
        self._whole = True
        self._before: tuple[int, int] | None = None  # rows before the evaluation under way: one that fails adds none
        self._report: Path | None = None
        self._probed: list[probe.ProbeRow] = []
        self._debugging = False
        self._expected: Mapping[str, float] = {}

    def _prepare_torch(self, run: Run) -> None:
        if run.threads:
            torch.set_num_threads(run.threads)
        torch.manual_seed(run.seed)
        if run.deterministic != torch.are_deterministic_algorithms_enabled():  # asking imports torch's compiler
            torch.use_deterministic_algorithms(run.deterministic)
        self.device = choose_device(run.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.precision = choose_precision(run.precision, self.device)
        self.task.model.to(self.device, memory_format=torch.channels_last)
        self.task.objective.to(self.device)
        if not self.peers.alone:
            self._align()

    def _align(self) -> None:
        """Start from the weights of the leading process, should chance or a machine have made others elsewhere."""
        parts = (self.task.model, self.task.objective)
        for part, state in zip(parts, self.peers.given([dict(part.state_dict()) for part in parts]), strict=True):
            part.load_state_dict(state)

    def _check_alike(self) -> None:
        """Raises RunFailed where the processes were not given the same run: they would wait for each other in vain."""
        names = [name for name, _ in self.controller.named]
        own = {"steps": self.total_steps, "batches in an epoch": self.task.batches_per_epoch, "at": self.position.batch,
               "precision": self.precision, "evaluation every": self.eval_interval,
               "parameters": zlib.crc32(" ".join(names).encode())}  # fmt: skip
        for rank, theirs in enumerate(self.peers.tell(own)):
            if odd := [f"{name} {theirs[name]}, not {own[name]}" for name in own if theirs[name] != own[name]]:
                cure = "start all of them with the same command, data and versions"
                raise RunFailed(explain("the same run in all processes", f"of process {rank}: {', '.join(odd)}",
                                        f"process {self.peers.rank}", cure))  # fmt: skip

    def _claim(self, exist_ok: bool) -> None:
        if not self.peers.leads:
            return
        folder.claim(self.folder, self.resume, exist_ok)
        if not self.resume:
            folder.clear(self.folder)

    def _measure_run(self, eval_every: float) -> None:
        optim, per_epoch = self.optim, self.task.batches_per_epoch
        self.total_steps = total_steps(optim.epochs, optim.steps, per_epoch, optim.accumulate)
        self.stop_batch = None if optim.steps else total_batches(optim.epochs, per_epoch)
        self.warmup_steps = round(optim.warmup_epochs * math.ceil(per_epoch / optim.accumulate))
        self.eval_interval = max(1, round(eval_every * per_epoch)) if eval_every else None

    def _begin(self) -> None:
        """Where the run starts from: its newest checkpoint, or here."""
        if not self.resume:
            self.saver.begin()
            return
        self.saver.resume()
        if self.eval_interval:  # which may be another than it was
            self.position.evaluated = min(self.position.evaluated, self.position.batch // self.eval_interval)

    @property
    def position(self) -> Position:
        """Where the run is."""
        return self.state.position

    @property
    def epoch(self) -> int:
        """Epoch under way, from 1."""
        return self.position.batch // self.task.batches_per_epoch + 1

    def fit(self) -> RunResult:
        """Train to the end, or to a signal.

        Raises:
            RunFailed: the guard gave up, or a save that had to succeed did not. Stopped: a signal, after a save.
            ConfigError: another process trains into the folder.
        """
        with folder.held(self.folder) if self.peers.leads else nullcontext():
            return self._fitted()

    def _fitted(self) -> RunResult:
        if self.peers.leads:
            folder.describe(self.folder, self.resolved, self.device, self.precision)
        feed = Feed(self.task, self.position.batch, self.stop_batch, self.workers, self.device.type == "cuda",
                    self.quarantine if self.peers.alone else None, self.guard.limits.loader_timeout)  # fmt: skip
        feed.seek(self.position.batch, self.position.skipped)
        cut = self.position.cut if self.resume else None
        log = RunLog(self.folder, self.logging, self.resolved, cut) if self.peers.leads else Untold()
        with log as self.log, Signals() as signals:
            try:
                self.freezer.apply(self.epoch)
                self._tell_start()
                self._train(feed, signals)
                self._finish()
            except (RunFailed, Stopped) as error:
                self.log.ended(str(error), self.controller.step, self.epoch, self.position.batch)
                raise
            finally:
                feed.close()
                if self._whole and self.saver.unsaved():  # an evaluation failed, the steps did not
                    self._save()
                self.saver.writer.join()
        return self._result()

    def _train(self, feed: Feed, signals: Signals) -> None:
        """The loop."""
        self._boundary()
        batches = iter(feed)
        with Progress(self.total_steps, "train", self.controller.step, "step", self.peers.leads) as bar:
            while not self._done():
                started = time.perf_counter()
                window = self._window(batches)
                loaded = time.perf_counter()
                report = self._step(window)
                self._after(report, window, {"data": loaded - started, "step": time.perf_counter() - loaded})
                if not report.committed and (reason := self.guard.verdict()):
                    self._rewind(reason, report, feed)
                bar.update(self.controller.step - bar.count, loss=f"{report.total:.3f}", epoch=self.epoch)
                if signum := self.peers.most(signals.received):
                    self._stop(signum)
                self._boundary()

    def _done(self) -> bool:
        if self.stop_batch is None:
            return self.controller.step >= self.total_steps
        return self.position.batch >= self.stop_batch

    def _window(self, batches: Iterator[Any]) -> list[Any]:
        """The micro-batches of one step: `accumulate` of them, fewer at the end of an epoch."""
        end = self.epoch * self.task.batches_per_epoch
        left = self.position.left(end if self.stop_batch is None else min(end, self.stop_batch))
        window = [next(batches) for _ in range(min(self.optim.accumulate, left))]
        if not self.peers.alone:
            self._count_replaced(window)
        return window

    def _count_replaced(self, window: list[Any]) -> None:
        """What any of the processes could not use counts in all of them, so that all end at the same batch."""
        own = [[b.index, r.sample, r.reason] for b in window for r in getattr(b, "replaced", ())]
        if self.peers.most(len(own)):
            ids = tuple(name for b in window for name in getattr(b, "image_ids", ())) * self.peers.world
            for index, sample, reason in (row for rows in self.peers.tell(own) for row in rows):
                self.quarantine.see(SimpleNamespace(replaced=(Replaced(sample, reason),), image_ids=ids), index)

    def _step(self, window: list[Any]) -> StepReport:
        step, every, self._whole = self.controller.step, self.logging.probe_every, False
        if not self.peers.alone:
            self._seed()
        self.freezer.apply(self.epoch)
        self.clip_norm = self.clipping.limit(clip_norm_at(self.epoch, self.optim.clip_norm))
        probing = not self.position.probed or (every and step % every == 0)
        self._debugging = debugging = self.logging.debug and step % DEBUG_EVERY == 0
        if debugging:
            self.log.debug(step + 1, records.input_block(window))
        how = {
            "lr_factor": self._lr_factor(step),
            "clip_norm": self.clip_norm,
            "observe": self._observe if probing else None,
            "watch": self._watch if debugging else None,
        }
        return portions.run(self.controller, window, self.position, how)

    def _seed(self) -> None:
        """Each process draws numbers of its own (dropout, sampling); the place tells which, so that no save has to."""
        place = np.random.SeedSequence((self.seed, 7, self.position.batch, self.peers.rank))
        torch.manual_seed(int(place.generate_state(1, np.uint64)[0] >> 1))

    def _lr_factor(self, step: int) -> float:
        o = self.optim
        low, drops = o.min_lr / o.lr, self.position.drops
        planned = lr_factor(
            step, self.total_steps, self.warmup_steps, o.schedule, low, restarts=o.restarts, drops=drops
        )  # fmt: skip
        return planned * self.guard.limits.rewind_lr ** len(self.position.rewinds)

    def _observe(self, report: LossReport) -> None:
        self._probed = probe.measure(report, self.peers)
        fresh = not self.position.probed and not self.init_report
        self._expected = self.task.expected_initial(report) if fresh else {}

    def _watch(self, named: forensics.Named) -> None:
        self.log.debug(self.controller.step + 1, records.gradient_block(*forensics.gradient_norms(named)))

    def _after(self, report: StepReport, window: list[Any], seconds: Mapping[str, float]) -> None:
        """Count and log."""
        epoch, first = self.epoch, self.position.batch
        self.position.batch = batch = self.position.after(len(window))
        self._whole = True
        flags = self.guard.see(report, warm=report.step > self.warmup_steps)
        if self._probed:
            flags += self._tell_probe(report, epoch)
        if not report.committed or report.step % self.logging.every == 0 or report.step == 1:
            self.log.step(report, epoch, batch, self.clip_norm, self.guard.totals)
            self.log.timing(report.step, batch, seconds)
        if self._debugging:
            self.log.debug(report.step + (not report.committed), records.loss_block(report))
        for flag in flags:
            self.log.flag(flag, report.step, epoch, batch)
        if report.committed:
            self.position.add(report)
            self.clipping.add(report.grad_l2_preclip, self.clip_norm)
        else:
            self._rejected(report, window, first, epoch)

    def _rejected(self, report: StepReport, window: list[Any], first: int, epoch: int) -> None:
        """Keep the evidence, and which batches they were."""
        if report.outcome in REJECTED:
            self.position.reject(indices(window, first))
            if not self.peers.alone:  # its part of the batch is the evidence
                window = self.peers.given([plain(batch) for batch in window], report.rank)
        path = self.guard.record(report, window, first, epoch) if self.peers.leads else None
        if path is not None:
            self._report = path
            self.log.incident(report, path)

    def _rewind(self, reason: str, report: StepReport, feed: Feed) -> None:
        """Go back to the last good checkpoint, past the batches that were rejected since, or end the run."""
        saved = self.saver.good() if rewind.may_go_back(self.state) else None
        if saved is None:
            told = rewind.epitaph(self.state, reason, report, self._report or self.folder / "incidents")
            again = f", {typed('fsdet probe --incident {}', self._report.parent)}" if self._report else ""
            raise RunFailed(f"{told}\n{self._last_save()}next: {typed('fsdet doctor {}', self.folder)}{again}")
        self._whole = False
        self.log.cut(rewind.cut(self.state, saved))
        entry = rewind.go_back(self.state, saved, reason)
        self._whole = True
        self._save()
        self.saver.writer.join()
        self.log.rewind(entry, rewind.sentence(entry, self.guard.limits.max_rewinds))
        feed.seek(self.position.batch, self.position.skipped)

    def _tell_probe(self, report: StepReport, epoch: int) -> list[Flag]:
        rows, self._probed = self._probed, []
        first, self.position.probed = not self.position.probed, True
        self.log.probe(rows, probe.tell(rows, self._expected), report.step, epoch, self.position.batch)
        return probe.flags(rows, self._expected, self.guard.limits.first_loss) if first else []

    def _boundary(self) -> None:
        """What is due between two steps: evaluation, the epoch's row, a save. Also what a stopped run still owes."""
        position, per_epoch, best = self.position, self.task.batches_per_epoch, False
        passed = position.batch // self.eval_interval if self.eval_interval else 0
        if passed > position.evaluated or (self._done() and position.evaluated_batch != position.batch):
            best = self._evaluate()
            position.evaluated = passed
        ended = position.batch // per_epoch > position.epochs_told
        if ended:
            self._end_epoch(position.batch // per_epoch)
        if best or ended or self.saver.due():
            self._save(best=best)

    def _evaluate(self) -> bool:
        """Judge the EMA; returns whether it is the best so far. The generators are left as they were."""
        step, position = self.controller.step, self.position
        self._before, metrics, paths = self.log.written, {}, ()
        if self.peers.leads:
            model = self.ema.model if self.ema else self.task.model
            metrics, paths = judging.judge(self.task, model, self.folder, step)
            self.freezer.train_mode()
        if not self.peers.alone:
            self.peers.wait("the evaluation of process 0")
            metrics = self.peers.given(metrics)
        self.log.evaluation(metrics, step, position.batch / self.task.batches_per_epoch, position.batch)
        self.log.pictures(paths, step)
        position.metrics, position.evaluated_batch = metrics, position.batch
        name, value, best = self.task.best_metric, metrics.get(self.task.best_metric, math.nan), position.best or 0.0
        if best > 0.0 and value < (1 - self.guard.limits.validation_drop) * best:
            drop = Flag("validation_drop", f"{name} fell to {value:.4f} from its best {best:.4f}")
            self.log.flag(drop, step, self.epoch, position.batch)
        self._before = None
        return position.rank(value, step)

    def _end_epoch(self, epoch: int) -> None:
        position, step = self.position, self.controller.step
        means = position.close_epoch(epoch)
        fresh = position.metrics if position.evaluated_batch == position.batch else {}
        lr = {f"lr/{name}": value for name, value in rates(self.optimizer).items()}
        shown = " ".join(f"{k.removeprefix('train/')} {v:.4f}" for k, v in means.items()) or "no step committed"
        summary = f"epoch {epoch}: step {step}/{self.total_steps} {shown} | {self.guard.summary()}"
        self.log.epoch({**means, **fresh, **lr}, step, epoch, position.batch, summary)

    def _finish(self) -> None:
        told = self.position.told_batch == self.position.batch
        if self.position.batch % self.task.batches_per_epoch and not told:  # an unfinished epoch has a row, too
            self._end_epoch(self.epoch)
            self.position.epochs_told -= 1  # so that a longer run tells its end
        self.position.finished = True
        self._save(wait=True)
        self.peers.wait("the last save of process 0")
        for command in self._result().next_commands:
            logger.info("next: %s", command)

    def _stop(self, signum: int) -> None:
        self._save(wait=True)
        self.peers.wait("the save of process 0")  # one that leaves earlier has torchrun end the others
        raise Stopped(
            f"stopped by signal {signum} after step {self.controller.step}; the state is saved.\n"
            f"resume with: {typed('fsdet train --resume {}', self.folder)}",
            signum,
        )

    def _save(self, best: bool = False, wait: bool = False) -> None:
        self.position.rows, self.position.table = self._before or self.log.written
        self.saver.save(best=best, wait=wait)

    def _last_save(self) -> str:
        """Save before giving up, or say why not: a state that is not finite must not hide the diagnosis."""
        try:
            self._save(wait=True)
        except RunFailed as error:
            return f"{error}\n"
        return ""

    def _tell_start(self) -> None:
        parameters = list(self.task.model.parameters())
        sizes = [sum(p.numel() for p in some) / 1e6 for some in (filter(_trains, parameters), parameters)]
        if self.init_report:
            logger.info("%s", self.init_report)
        place = f"{self.task.name} on {self.device} in {self.precision}"
        plan = f"{counted(self.total_steps, 'step')}, from {self.controller.step}, warm-up {self.warmup_steps}"
        logger.info("%s: %.3f of %.3f M parameters train, %s, folder %s", place, *sizes, plan, self.folder)
        if self.warmup_steps >= self.total_steps:
            logger.warning("warm-up is as long as the run: the LR only rises. Next: lower optim.warmup_epochs")

    def _result(self) -> RunResult:
        best, position = self.folder / "best.pt", self.position
        told = [typed("fsdet eval {}", best), typed("fsdet report {}", self.folder)]
        if self.logging.wandb.mode != "disabled":
            told.append(typed("wandb leet {}", self.folder / "wandb"))
        return RunResult(self.folder, best, position.best, position.metrics, self.controller.step, tuple(told))


def _trains(parameter: torch.nn.Parameter) -> bool:
    return parameter.requires_grad
