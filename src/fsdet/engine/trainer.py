# SPDX-License-Identifier: AGPL-3.0-or-later
"""The training loop. It knows a Task, no detector.

feed -> controller.run (one guarded step) -> guard -> log -> at boundaries: epoch row, evaluation, checkpoint
"""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fsdet import yaml_strict
from fsdet.config import Guard, Log, Optim, Run, Save
from fsdet.engine import checkpoint, forensics, probe, records
from fsdet.engine.ema import Ema
from fsdet.engine.feed import Feed
from fsdet.engine.freezing import Freezer
from fsdet.engine.guard import Flag, StepGuard
from fsdet.engine.optimizer import build_optimizer, choose_device, choose_precision
from fsdet.engine.runlog import RunLog
from fsdet.engine.schedule import PLATEAU_PATIENCE, clip_norm_at, lr_factor, total_batches, total_steps
from fsdet.engine.signals import Signals
from fsdet.engine.step import StepController
from fsdet.errors import ConfigError, RunFailed, Stopped, explain
from fsdet.progress import Progress
from fsdet.types import StepReport, Task

log = logging.getLogger("fsdet")
DEBUG_EVERY = 50  # steps between Gradient Norms blocks in debug
VALUE_DROP = 0.5  # of the best metric, below which an evaluation is a sudden drop


@dataclass
class Position:
    """Where a run is; all of it is in a checkpoint. `batch` counts consumed micro-batches, rejected ones too."""

    batch: int = 0
    epochs_told: int = 0  # epochs with a row in results.csv
    evaluated: int = 0  # evaluation intervals done
    evaluated_batch: int = -1
    saved_epochs: int = 0
    best: float | None = None
    best_step: int = 0
    stale: int = 0  # evaluations since the best one, or since the last LR drop
    drops: int = 0
    finished: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)  # of this epoch's committed steps
    committed: int = 0  # steps in `sums`


@dataclass(frozen=True)
class RunResult:
    """How a run ended: its folder, its best checkpoint and metric, the last evaluation, and steps committed."""

    folder: Path
    best: Path
    best_metric: float | None
    metrics: Mapping[str, float]
    steps: int
    next_commands: tuple[str, ...] = ()


class Trainer:
    """Trains `task` in `folder`.

    Args:
        run, optim, guard, save, log: sections of the configuration. workers: loader processes.
        eval_every: epochs between evaluations, fractions allowed; 0 evaluates at the end only.
        resolved: the whole configuration as plain values, stored beside the run. folder: the run folder.
        resume: continue from the newest intact checkpoint of `folder`. exist_ok: a folder with one may be overwritten.
        init_report: what `checkpoint.init_from` said, for the log. freeze: prefixes, or {epoch: prefixes}.
        freeze_norm: every BatchNorm in eval.
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
    ) -> None:
        self.task, self.optim, self.save, self.log_options = task, optim, save, log
        self.workers, self.eval_every, self.resolved, self.folder = workers, eval_every, resolved, Path(folder)
        self.init_report, self.resume = init_report, resume
        claim(self.folder, resume, exist_ok)
        if run.threads:
            torch.set_num_threads(run.threads)
        torch.manual_seed(run.seed)
        torch.use_deterministic_algorithms(run.deterministic)
        self.device = choose_device(run.device)
        self.precision = choose_precision(run.precision, self.device)
        task.model.to(self.device, memory_format=torch.channels_last)
        task.objective.to(self.device)
        self.position = Position()
        self.freezer = Freezer(task, freeze, freeze_norm)
        self.ema = Ema(task.model, optim.ema, optim.ema_warmup) if optim.ema else None
        self.optimizer = build_optimizer(task.param_groups(), optim)
        self.guard = StepGuard(guard, self.folder)
        self.controller = StepController(
            task, self.optimizer, device=self.device, precision=self.precision, guard=guard, ema=self.ema
        )
        self.writer = checkpoint.Writer(self.folder, save.keep)
        per_epoch = task.batches_per_epoch
        self.total_steps = total_steps(optim.epochs, optim.steps, per_epoch, optim.accumulate)
        self.stop_batch = None if optim.steps else total_batches(optim.epochs, per_epoch)
        steps_per_epoch = math.ceil(per_epoch / optim.accumulate)
        self.warmup_steps = round(optim.warmup_epochs * steps_per_epoch)
        self._probed: list[probe.ProbeRow] = []
        self._saved_at = time.monotonic()
        if resume:
            self._load()

    @property
    def epoch(self) -> int:
        """Epoch under way, from 1."""
        return self.position.batch // self.task.batches_per_epoch + 1

    def fit(self) -> RunResult:
        """Train to the end, or to a signal.

        Raises:
            RunFailed: the guard gave up, or a save that had to succeed did not. Stopped: a signal, after a save.
        """
        self._write_once()
        resume_batch = self.position.batch if self.resume else None
        feed = Feed(self.task, self.position.batch, self.stop_batch, self.workers, self.device.type == "cuda")
        with RunLog(self.folder, self.log_options, self.resolved, resume_batch) as self.log, Signals() as signals:
            try:
                self._tell_start()
                self._train(feed, signals)
                self._finish()
            finally:
                feed.close()
                self.writer.join()
        return self._result()

    def _train(self, feed: Feed, signals: Signals) -> None:
        """The loop."""
        self._boundary()
        batches = iter(feed)
        with Progress(self.total_steps, "train", self.controller.step, "step") as bar:
            while not self._done():
                began = time.perf_counter()
                window = self._window(batches)
                loaded = time.perf_counter()
                report = self._step(window)
                self._after(report, window, {"data": loaded - began, "step": time.perf_counter() - loaded})
                bar.update(int(report.committed), loss=f"{report.total:.3f}", epoch=self.epoch)
                if signals.received:
                    self._stop(signals.received)
                self._boundary()

    def _done(self) -> bool:
        if self.stop_batch is None:
            return self.controller.step >= self.total_steps
        return self.position.batch >= self.stop_batch

    def _window(self, batches: Any) -> list[Any]:
        """The micro-batches of one step: `accumulate` of them, fewer at the end of an epoch."""
        left = self.task.batches_per_epoch - self.position.batch % self.task.batches_per_epoch
        if self.stop_batch is not None:
            left = min(left, self.stop_batch - self.position.batch)
        return [next(batches) for _ in range(min(self.optim.accumulate, left))]

    def _step(self, window: list[Any]) -> StepReport:
        step, optim = self.controller.step, self.optim
        self.freezer.apply(self.epoch)
        factor = lr_factor(
            step,
            self.total_steps,
            self.warmup_steps,
            optim.schedule,
            optim.min_lr / optim.lr,
            restarts=optim.restarts,
            drops=self.position.drops,
        )
        probing = not self.guard.seen or (self.log_options.probe_every and step % self.log_options.probe_every == 0)
        debugging = self.log_options.debug and step % DEBUG_EVERY == 0
        return self.controller.run(
            window,
            lr_factor=factor,
            clip_norm=clip_norm_at(self.epoch, optim.clip_norm),
            observe=self._observe if probing else None,
            watch=self._watch if debugging else None,
        )

    def _observe(self, report: Any) -> None:
        self._probed = probe.measure(report)

    def _watch(self, named: Any) -> None:
        norms = [p.grad for _, p in named if p.grad is not None]
        total = float(torch.nn.utils.get_total_norm(norms)) if norms else 0.0
        block = records.gradient_block(total, forensics.largest_gradients(named))
        self.log.records.write("training_debug.log", f"step {self.controller.step} {block}")

    def _after(self, report: StepReport, window: list[Any], seconds: Mapping[str, float]) -> None:
        """Count, log, and end the run when the guard says so."""
        epoch, first = self.epoch, self.position.batch
        was_first = not self.guard.seen
        self.position.batch = batch = first + len(window)
        flags = self.guard.see(report, warm=report.step > self.warmup_steps)
        if self._probed:
            flags += self._tell_probe(report, was_first, epoch, batch)
        if not report.committed or report.step % self.log_options.every == 0 or report.step == 1:
            clip = clip_norm_at(epoch, self.optim.clip_norm)
            self.log.step(report, epoch, batch, clip, self.guard.totals)
            self.log.timing(report.step, batch, seconds)
        for flag in flags:
            self.log.flag(flag, report.step, epoch, batch)
        if report.committed:
            self._add(report)
            return
        path = self.guard.record(report, window, first, epoch)
        if reason := self.guard.verdict():
            self._save(wait=True)
            raise RunFailed(
                f"training stopped at step {report.step}, epoch {epoch}: {reason}\n"
                f"culprit: {report.culprit}\nreport: {path or self.folder / 'incidents'}"
            )

    def _tell_probe(self, report: StepReport, first: bool, epoch: int, batch: int) -> list[Flag]:
        rows, self._probed = self._probed, []
        expected = self.task.expected_initial() if first and not self.init_report else {}
        self.log.probe(rows, probe.table(rows, expected), report.step, epoch, batch)
        words = [(r.name, probe.verdict(r, expected.get(r.name))) for r in rows]
        return [
            Flag(f"first_{name}", f"{name}_loss at the first batch: {text}")
            for name, text in words
            if first and ("expected" in text or "NOT" in text)
        ]

    def _add(self, report: StepReport) -> None:
        sums = self.position.sums
        values = {
            **{f"train/{k}_loss": v for k, v in report.raw.items()},
            "train/total_loss": report.total,
            "train/grad_norm": report.grad_l2_preclip,
        }
        self.position.sums = {k: sums.get(k, 0.0) + v for k, v in values.items()}
        self.position.committed += 1

    def _boundary(self) -> None:
        """What is due between two steps: evaluation, the epoch's row, a save. Also what a stopped run still owes."""
        position, per_epoch = self.position, self.task.batches_per_epoch
        interval = max(1, round(self.eval_every * per_epoch)) if self.eval_every else None
        best = False
        if interval and position.batch // interval > position.evaluated:
            best = self._evaluate()
            position.evaluated = position.batch // interval
        ended = position.batch // per_epoch > position.epochs_told
        if ended:
            self._end_epoch()
        if best or ended or self._save_due():
            self._save(best=best)

    def _save_due(self) -> bool:
        every, minutes = self.save.every_steps, self.save.every_minutes
        by_step = every and self.controller.step % every == 0 and self.controller.step > self._saved_step
        return bool(by_step) or bool(minutes and time.monotonic() - self._saved_at >= 60 * minutes)

    _saved_step = 0

    def _evaluate(self) -> bool:
        """Judge the EMA; returns whether it is the best so far. The generators are left as they were."""
        model = self.ema.model if self.ema else self.task.model
        state, step, position = checkpoint.random_state(), self.controller.step, self.position
        model.eval()
        with torch.no_grad():
            metrics = dict(self.task.evaluate(model))
            paths = self.task.illustrate(model, self.folder / "episodes", step)
        checkpoint.restore_random_state(state)
        self.freezer.train_mode()
        epoch = position.batch / self.task.batches_per_epoch
        self.log.evaluation(metrics, step, epoch, position.batch)
        self.log.pictures(paths, step)
        position.metrics, position.evaluated_batch = metrics, position.batch
        value = metrics.get(self.task.best_metric, math.nan)
        if (position.best or 0.0) > 0.0 and value < VALUE_DROP * position.best:
            self.log.flag(
                Flag("validation_drop", f"{self.task.best_metric} fell to {value:.4f} from {position.best:.4f}"),
                step,
                self.epoch,
                position.batch,
            )
        return self._rank(value)

    def _rank(self, value: float) -> bool:
        position = self.position
        if position.best is None or value > position.best or (math.isnan(position.best) and not math.isnan(value)):
            position.best, position.best_step, position.stale = value, self.controller.step, 0
            return True
        position.stale += 1
        if position.stale >= PLATEAU_PATIENCE:
            position.stale, position.drops = 0, position.drops + 1
        return False

    def _end_epoch(self) -> None:
        position = self.position
        epoch = position.batch // self.task.batches_per_epoch
        means = {k: v / max(1, position.committed) for k, v in position.sums.items()}
        fresh = position.metrics if position.evaluated_batch == position.batch else {}
        rates = {f"lr/{g['group']}": g["lr"] for g in self.optimizer.param_groups}
        shown = " ".join(f"{k.removeprefix('train/')} {v:.4f}" for k, v in means.items())
        summary = f"epoch {epoch}: step {self.controller.step}/{self.total_steps} {shown} | {self.guard.summary()}"
        self.log.epoch({**means, **fresh, **rates}, self.controller.step, epoch, position.batch, summary)
        position.epochs_told, position.sums, position.committed = epoch, {}, 0

    def _finish(self) -> None:
        best = False
        if self.position.evaluated_batch != self.position.batch:
            best = self._evaluate()
        self.position.finished = True
        self._save(best=best, wait=True)

    def _stop(self, signum: int) -> None:
        self._save(wait=True)
        raise Stopped(
            f"stopped by signal {signum} after step {self.controller.step}; the state is saved.\n"
            f"resume with: fsdet train --resume {self.folder}",
            signum,
        )

    def _save(self, best: bool = False, wait: bool = False) -> None:
        self._saved_at, self._saved_step = time.monotonic(), self.controller.step
        self.writer.save(self.state_dict(), best=best, wait=wait)

    def state_dict(self) -> dict[str, Any]:
        """All of a run: what `_load` puts back, and what rebuilds the model elsewhere."""
        model = self.task.model.state_dict()
        return {
            "format": checkpoint.FORMAT,
            "task": self.task.name,
            "model": model,
            "ema": self.ema.state_dict() if self.ema else model,
            "ema_count": self.ema.count if self.ema else 0,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.controller.scaler.state_dict(),
            "objective": self.task.objective.state_dict(),
            "step": self.controller.step,
            "backoffs": self.controller.backoffs,
            "epoch": self.epoch,
            "batch": self.position.batch,
            "finished": self.position.finished,
            "position": vars(self.position),
            "guard": self.guard.state_dict(),
            "rng": checkpoint.random_state(),
            "spec": dict(self.task.describe()),
            "config": dict(self.resolved),
            "precision": self.precision,
            "threads": torch.get_num_threads(),
            "versions": {"torch": str(torch.__version__)},
        }

    def _load(self) -> None:
        path, state = checkpoint.newest(self.folder)
        checkpoint.check_fits(path, state, self.task.model, self.optimizer, self.precision)
        self.task.model.load_state_dict(state["model"])
        self.task.objective.load_state_dict(state["objective"])
        if self.ema:
            self.ema.load_state_dict(state["ema"], state["ema_count"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.controller.scaler.load_state_dict(state["scaler"])
        self.controller.step, self.controller.backoffs = state["step"], state["backoffs"]
        self.position = Position(**state["position"])
        self.guard.load_state_dict(state["guard"])
        checkpoint.restore_random_state(state["rng"])
        self._saved_step = state["step"]
        if state["threads"] != torch.get_num_threads():
            log.warning(
                "resumed with %d threads instead of %d: results may differ in the last bits",
                torch.get_num_threads(),
                state["threads"],
            )
        log.info("resumed from %s at step %d, batch %d", path, state["step"], state["batch"])

    def _write_once(self) -> None:
        content = records.environment(self.device, self.precision)
        (self.folder / "environment.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        (self.folder / "config.yaml").write_text(yaml_strict.dump(dict(self.resolved)), encoding="utf-8")

    def _tell_start(self) -> None:
        trainable = sum(p.numel() for p in self.task.model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in self.task.model.parameters())
        if self.init_report:
            log.info("%s", self.init_report)
        log.info(
            "%s on %s in %s: %.2f M of %.2f M parameters train, %d steps from step %d, warm-up %d, folder %s",
            self.task.name,
            self.device,
            self.precision,
            trainable / 1e6,
            total / 1e6,
            self.total_steps,
            self.controller.step,
            self.warmup_steps,
            self.folder,
        )
        if self.warmup_steps >= self.total_steps:
            log.warning(
                "warm-up (%d steps) is as long as the run (%d): the LR only rises", self.warmup_steps, self.total_steps
            )

    def _result(self) -> RunResult:
        best = self.folder / "best.pt"
        commands = (f"fsdet eval {best}", f"fsdet report {self.folder}")
        return RunResult(self.folder, best, self.position.best, self.position.metrics, self.controller.step, commands)


def claim(folder: Path, resume: bool, exist_ok: bool) -> None:
    """Make the run folder, or refuse one that holds a run.

    Raises:
        ConfigError: it has a checkpoint and neither `resume` nor `exist_ok` is given; or it cannot be written.
    """
    if checkpoint.candidates(folder) and not resume and not exist_ok:
        raise ConfigError(
            explain(
                "a folder without a checkpoint",
                "a run",
                str(folder),
                "--resume continues it, --exist-ok overwrites it, run.dir= starts another",
            )
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_durably(folder / ".writable", b"")
        (folder / ".writable").unlink()
    except OSError as error:
        raise ConfigError(
            explain("a folder that can be written", str(error), str(folder), "choose another with run.dir=")
        ) from error
    if not resume:
        for old in (*checkpoint.candidates(folder), folder / checkpoint.MANIFEST):
            old.unlink(missing_ok=True)
