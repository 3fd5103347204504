# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a run remembers of itself: JSONL, results.csv and training_debug.log always; W&B and TensorBoard when asked.

The only import of wandb. No sink raises into training: a sink that fails warns once and goes silent.
"""

import json
import logging
import math
import netrc
import os
import secrets
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import Image, ImageOps

from fsdet.config import Log, Wandb
from fsdet.engine.guard import Flag
from fsdet.engine.probe import ProbeRow
from fsdet.engine.records import Cut, Records
from fsdet.types import StepReport

log = logging.getLogger("fsdet")
ALERT_SECONDS = 300
INIT_SECONDS = 15.0
AXIS = "train_step/global_step"


class RunLog:
    """One call an event; every sink hears of it. Use as a context manager.

    folder: run folder, which exists. cut: where a resumed run goes on; later rows are cut off.
    """

    def __init__(self, folder: Path, options: Log, resolved: Mapping[str, Any], cut: Cut | None = None) -> None:
        self.options, self.folder = options, folder
        self.records = Records(folder, cut)
        self.sinks: list[WandbSink | TensorboardSink] = []
        if options.wandb.mode != "disabled":
            self.sinks.append(WandbSink(options.wandb, folder, resolved, cut is not None))
        if options.tensorboard:
            self.sinks.append(TensorboardSink(folder))

    def __enter__(self) -> "RunLog":
        self.records.open()
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        for sink in self.sinks:
            sink.close(failed=kind is not None)
        self.records.close()

    def step(self, report: StepReport, epoch: int, batch: int, clip_norm: float, totals: Mapping[str, int]) -> None:
        """A committed step that is due, or any rejected one."""
        self.records.step(report, epoch, batch, clip_norm)
        self._send(step_values(report, epoch, totals), report.step)

    def debug(self, step: int, text: str) -> None:
        """A block for training_debug.log alone."""
        self.records.write("training_debug.log", f"step {step} {text}")

    def timing(self, step: int, batch: int, seconds: Mapping[str, float]) -> None:
        self.records.timing(step, batch, seconds)

    def flag(self, flag: Flag, step: int, epoch: int, batch: int) -> None:
        """A red flag: a warning here, an alert there."""
        log.warning("step %d: %s", step, flag.message)
        self.records.row("flag", step, epoch, batch, flag=flag.name, message=flag.message)
        for sink in self.sinks:
            sink.alert(flag.name, flag.message)

    def incident(self, report: StepReport, path: Path) -> None:
        """An alert of a rejected step whose report lies at `path`; the log and metrics.jsonl have it from `step`."""
        for sink in self.sinks:
            sink.alert(f"step rejected: {report.outcome}", f"step {report.step}: {report.culprit}; report: {path}")

    def cut(self, cut: Cut) -> None:
        """Take back the rows after an earlier place; what was sent to W&B and TensorBoard stays there."""
        self.records.cut(cut)

    @property
    def written(self) -> tuple[int, int]:
        """Rows so far of metrics.jsonl, rewinds and ends not counted, and of results.csv."""
        return self.records.written

    def rewind(self, entry: Mapping[str, Any], text: str) -> None:
        """A return to a checkpoint: a row, a warning here, an alert there."""
        log.warning("%s", text)
        self.records.rewind(entry)
        for sink in self.sinks:
            sink.alert(f"rewind {entry['number']} to step {entry['to_step']}", text)

    def ended(self, text: str, step: int, epoch: int, batch: int) -> None:
        """Why a run that is not finished ends: all of it in training_debug.log, its first line as a row."""
        self.records.write("training_debug.log", text)
        self.records.row("end", step, epoch, batch, reason=text.partition("\n")[0])

    def probe(self, rows: Sequence[ProbeRow], text: str, step: int, epoch: int, batch: int) -> None:
        """The per-loss probe's table and values."""
        log.info("Per-loss probe at step %d\n%s", step, text)
        for row in rows:
            self.records.row("probe", step, epoch, batch, **vars(row))
        values = {f"probe/{r.name}/{key}": getattr(r, key) for r in rows for key in ("norm", "cosine")}
        self._send({AXIS: step, **values}, step)

    def evaluation(self, metrics: Mapping[str, float], step: int, epoch: float, batch: int) -> None:
        """Values of `task.evaluate`, whose names are W&B keys; the axis is the epoch."""
        self.records.row("val", step, epoch, batch, **metrics)
        shown = ", ".join(f"{k} {v:.4f}" for k, v in metrics.items() if isinstance(v, (int, float)))
        log.info("Evaluation at epoch %.4g: %s", epoch, shown)
        self._send({**metrics, "epoch": epoch, AXIS: step}, step)

    def epoch(self, values: Mapping[str, Any], step: int, epoch: int, batch: int, summary: str) -> None:
        """One line per epoch in results.csv and on the console."""
        self.records.epoch({"epoch": epoch, "step": step, "batch": batch, **values})
        log.info("%s", summary)
        self._send({"epoch": epoch, AXIS: step, **{f"epoch/{k}": v for k, v in values.items()}}, step)

    def pictures(self, paths: Sequence[Path], step: int) -> None:
        for sink in self.sinks:
            sink.pictures(paths, step)

    def _send(self, values: Mapping[str, Any], step: int) -> None:
        finite = {k: v for k, v in values.items() if isinstance(v, (int, float)) and math.isfinite(v)}
        for sink in self.sinks:
            sink.log(finite, step)


class Untold:
    """The log of a process that does not lead: each event is told by the one that does."""

    written = (0, 0)

    def __enter__(self) -> "Untold":
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def _nothing(self, *args: object, **kwargs: object) -> None:
        pass

    step = debug = timing = flag = incident = cut = rewind = ended = probe = evaluation = epoch = pictures = _nothing


def step_values(report: StepReport, epoch: int, totals: Mapping[str, int]) -> dict[str, float]:
    """The W&B keys of one step."""
    values = {
        AXIS: report.step,
        "epoch": epoch,
        "train_step/total_loss": report.total,
        "train_step/grad_norm": report.grad_l2_preclip,
        "train_step/grad_l2_preclip": report.grad_l2_preclip,
        "train_step/grad_l2_postclip": report.grad_l2_postclip,
        "train_step/clip_ratio": report.clip_ratio,
        "train_step/loss_scale": report.loss_scale,
    }
    values |= {f"train_step/{name}_loss": value for name, value in report.raw.items()}
    values |= {f"train_step/weighted/{name}": value for name, value in report.weighted.items()}
    values |= {f"train_step/saturated/{name}": value for name, value in report.saturated.items()}
    values |= {f"train_step/lr/{group}": value for group, value in report.lr.items()}
    return values | {f"health/{outcome}_total": count for outcome, count in totals.items()}


def wandb_boxes(rows: Sequence[Sequence[float]], names: Mapping[int, str]) -> dict[str, Any]:
    """Rows of x1, y1, x2, y2 px, label and maybe a score, as W&B has boxes."""
    out = []
    for x1, y1, x2, y2, label, *score in rows:
        text = " ".join([names[int(label)], *(f"{s:.2f}" for s in score)])
        box = {"position": {"minX": x1, "maxX": x2, "minY": y1, "maxY": y2}, "domain": "pixel", "class_id": int(label)}
        out.append({**box, "box_caption": text, "scores": dict(zip(("score",), score, strict=False))})
    return {"box_data": out, "class_labels": dict(names)}


def upright(path: Path) -> Image.Image:
    """An image file as it is meant to be seen, in RGB."""
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


class WandbSink:
    """W&B, online when it can be reached in bounded time, else offline, else not at all."""

    def __init__(self, options: Wandb, folder: Path, resolved: Mapping[str, Any], resumed: bool) -> None:
        self.folder, self.run, self._failed = folder, None, False
        try:
            import wandb
            from wandb.errors import Error
        except ImportError:
            log.warning("wandb is not installed; metrics.jsonl has everything. Next: pip install wandb")
            return
        self._wandb = wandb
        self._mistakes = (Error, OSError, RuntimeError, ValueError, TypeError, AttributeError, KeyError)
        self.run = self._start(options, resolved, resumed)
        if self.run is not None:
            self._guarded(self._axes)

    def _start(self, options: Wandb, resolved: Mapping[str, Any], resumed: bool) -> Any:
        modes = {
            "auto": ["online", "offline"] if self._has_key() else ["offline"],
            "online": ["online", "offline"],
            "offline": ["offline"],
        }[options.mode]
        for mode in modes:
            try:
                return self._init(mode, options, resolved, resumed)
            except self._mistakes as error:
                first = (str(error).strip() or type(error).__name__).splitlines()[0]
                log.warning(
                    "W&B cannot start %s (%s)%s",
                    mode,
                    first[:200],
                    "; logging offline instead" if mode != modes[-1] else "; going on without it",
                )
        return None

    def _init(self, mode: str, options: Wandb, resolved: Mapping[str, Any], resumed: bool) -> Any:
        known = self.folder / "wandb_id"
        previous = known.read_text().strip() if resumed and known.exists() else None
        run_id = previous if previous and mode == "online" else secrets.token_hex(4)
        limits = {"init_timeout": INIT_SECONDS, "login_timeout": INIT_SECONDS, "finish_timeout": INIT_SECONDS}
        limits |= {"finish_timeout_raises": False, "console": "off"}
        known_settings = self._wandb.Settings.model_fields  # older versions lack some of the limits
        settings = self._wandb.Settings(**{k: v for k, v in limits.items() if k in known_settings})
        config = {**resolved, **({"resumed_from": previous} if previous else {})}
        run = self._wandb.init(
            mode=mode,
            project=options.project,
            entity=options.entity,
            dir=str(self.folder),
            name=options.name or self.folder.name,
            tags=options.tags,
            id=run_id,
            config=config,
            group=self.folder.name,
            resume="allow" if mode == "online" else None,
            settings=settings,
        )
        known.write_text(run.id)  # a sweep's agent chooses its own
        return run

    def _has_key(self) -> bool:
        """Whether a key is configured, found without asking the network."""
        if os.environ.get("WANDB_API_KEY"):
            return True
        path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
        host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
        try:
            return netrc.netrc(path).authenticators(host) is not None
        except (OSError, netrc.NetrcParseError):
            return False

    def _axes(self) -> None:
        self.run.define_metric(AXIS)
        self.run.define_metric("epoch")
        for pattern in ("train_step/*", "health/*", "probe/*"):
            self.run.define_metric(pattern, step_metric=AXIS)
        for pattern in ("val/*", "epoch/*"):
            self.run.define_metric(pattern, step_metric="epoch")

    def _guarded(self, call: Any, *args: Any, **kwargs: Any) -> None:
        if self.run is None or self._failed:
            return
        self._try(call, *args, **kwargs)

    def _try(self, call: Any, *args: Any, **kwargs: Any) -> None:
        try:
            call(*args, **kwargs)
        except self._mistakes as error:
            if not self._failed:
                log.warning("W&B stopped working (%s); metrics.jsonl goes on", error)
            self._failed = True

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self.run is not None:
            self._guarded(self.run.log, dict(values))

    def alert(self, title: str, text: str) -> None:
        if self.run is not None:
            self._guarded(self.run.alert, title=title, text=text, wait_duration=ALERT_SECONDS)

    def pictures(self, paths: Sequence[Path], step: int) -> None:
        if self.run is not None and paths:
            self._guarded(self._send_pictures, paths, step)

    def _send_pictures(self, paths: Sequence[Path], step: int) -> None:
        images = [self._wandb.Image(str(path), caption=path.stem) for path in paths]
        boxed = [image for path in paths for image in self._boxed(path.with_suffix(".json"))]
        self.run.log({"media/episodes": images, **({"media/validation": boxed} if boxed else {}), AXIS: step})

    def _boxed(self, listed: Path) -> list[Any]:
        """The images that a sheet's list names, with true and found boxes that W&B can switch on and off."""
        if not listed.is_file():
            return []
        content = json.loads(listed.read_text(encoding="utf-8"))
        names = dict(enumerate(content["names"]))
        return [
            self._wandb.Image(
                upright(Path(entry["path"])),
                caption=Path(entry["path"]).name,
                boxes={kind: wandb_boxes(entry[kind], names) for kind in ("true", "found")},
                file_type="jpg",
            )
            for entry in content["images"]
        ]

    def close(self, failed: bool) -> None:
        if self.run is not None:
            self._try(self.run.finish, exit_code=int(failed))  # also what failed before may have something to finish


class TensorboardSink:
    """TensorBoard event files in the run folder's `tensorboard`."""

    def __init__(self, folder: Path) -> None:
        self.writer = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            log.warning("tensorboard is not installed; metrics.jsonl has everything. Next: pip install tensorboard")
            return
        self.writer = SummaryWriter(str(folder / "tensorboard"))

    def _guarded(self, call: Any, *args: Any, **kwargs: Any) -> None:
        if self.writer is None:
            return
        try:
            call(*args, **kwargs)
        except (OSError, ValueError) as error:
            self.writer = None
            log.warning("TensorBoard stopped working (%s); metrics.jsonl goes on", error)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items() if self.writer is not None else ():
            self._guarded(self._scalar, key, value, step)

    def _scalar(self, key: str, value: float, step: int) -> None:
        self.writer.add_scalar(key, value, step)

    def alert(self, title: str, text: str) -> None:
        self._guarded(self._text, f"alerts/{title}", text)

    def _text(self, tag: str, text: str) -> None:
        self.writer.add_text(tag, text)

    def pictures(self, paths: Sequence[Path], step: int) -> None:
        for number, path in enumerate(paths):
            self._guarded(self._picture, f"media/episodes/{number}" if number else "media/episodes", path, step)

    def _picture(self, tag: str, path: Path, step: int) -> None:
        self.writer.add_image(tag, np.asarray(upright(path)), step, dataformats="HWC")

    def close(self, failed: bool) -> None:
        if self.writer is not None:
            self._guarded(self.writer.close)
