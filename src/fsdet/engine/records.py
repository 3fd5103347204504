# SPDX-License-Identifier: AGPL-3.0-or-later
"""The text files of a run folder: metrics.jsonl, timings.jsonl, results.csv, training_debug.log, environment.json.

metrics.jsonl holds deterministic fields only, so two equal runs have equal files; times are in timings.jsonl.
"""

import csv
import io
import json
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch

from fsdet.engine.guard import jsonable
from fsdet.files import write_durably
from fsdet.types import StepReport

log = logging.getLogger("fsdet")
UNCOUNTED = ("rewind", "end")  # kinds of rows that an undisturbed run would not have
LARGE_INPUT = 10  # beyond which a normalised pixel is none
PACKAGES = ("torch", "torchvision", "ultralytics", "numpy", "opencv-python", "faster-coco-eval", "wandb")


@dataclass(frozen=True)
class Cut:
    """What stays of the rows of a run that goes on from an earlier place.

    batch: rows of later batches go; None: batches were numbered otherwise then. rows, table: so many rows of
    metrics.jsonl (rewinds not counted) and of results.csv were written by then; None: not known.
    rewinds: those in force there; each has a row that stays, or is made up for, and others have none.
    """

    batch: int | None
    rewinds: Sequence[Mapping[str, Any]] = ()
    rows: int | None = None
    table: int | None = None


class Records:
    """Appends to the files of `folder`; a file that cannot be written is one warning and no more.

    cut: where a resumed run goes on. None starts afresh.
    """

    def __init__(self, folder: Path, cut: Cut | None = None) -> None:
        self.folder = folder
        self._files: dict[str, TextIO | None] = {}
        self._handler: logging.Handler | None = None
        self._level = log.level
        self._epochs: list[dict[str, Any]] = []
        self._missing: list[Mapping[str, Any]] = []
        self._rows = 0
        self._deleted = False
        if cut is None:
            for name in ("metrics.jsonl", "timings.jsonl", "results.csv", "training_debug.log"):
                (folder / name).unlink(missing_ok=True)
        else:
            self._cut(cut)

    def _cut(self, cut: Cut) -> None:
        if cut.batch is not None:
            cut_rows(self.folder / "timings.jsonl", cut.batch)
        kept = cut_rows(self.folder / "metrics.jsonl", cut.batch, len(cut.rewinds), cut.rows)
        told = {row["number"] for row in kept if row.get("kind") == "rewind"}
        self._rows = sum(row.get("kind") not in UNCOUNTED for row in kept)
        self._missing = [entry for entry in cut.rewinds if entry["number"] not in told]
        table = read_csv(self.folder / "results.csv")[: cut.table]
        self._epochs = [row for row in table if cut.batch is None or float(row["batch"]) <= cut.batch]

    @property
    def written(self) -> tuple[int, int]:
        """Rows so far of metrics.jsonl, rewinds and ends not counted, and of results.csv."""
        return self._rows, len(self._epochs)

    def cut(self, cut: Cut) -> None:
        """Go on from an earlier place while the files are open."""
        for name in ("metrics.jsonl", "timings.jsonl"):
            if (file := self._files.get(name)) is not None:
                self._try(name, file.close)
        try:
            self._cut(cut)
        except OSError as error:
            log.warning("rows that a rewind takes back stay in the run folder (%s)", error)
        self._write_epochs()
        for name in ("metrics.jsonl", "timings.jsonl"):
            self._open(name)
        self._make_up()

    def _open(self, name: str) -> None:
        try:
            self._files[name] = open(self.folder / name, "a", encoding="utf-8", errors="backslashreplace", buffering=1)
        except OSError as error:
            self._files[name] = None
            log.warning("%s cannot be written (%s)", name, error)

    def _make_up(self) -> None:
        """Rows of rewinds that were saved, but not told any more."""
        for entry in self._missing:
            self.rewind(entry)
        self._missing = []

    def open(self) -> None:
        for name in ("metrics.jsonl", "timings.jsonl", "training_debug.log"):
            self._open(name)
        self._make_up()
        self._handler = _ToFile(self)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._level = log.level
        if log.getEffectiveLevel() > logging.INFO:
            log.setLevel(logging.INFO)
        log.addHandler(self._handler)

    def close(self) -> None:
        if self._handler is not None:
            log.removeHandler(self._handler)
            log.setLevel(self._level)
        for name, file in self._files.items():
            if file is not None:
                self._try(name, file.close)
        self._files = {}

    def write(self, name: str, text: str) -> None:
        """Append a line to one of the open files."""
        if self._files.get(name) is not None:
            self._try(name, self._append, name, text + "\n")

    def _append(self, name: str, text: str) -> None:
        if not os.fstat(self._files[name].fileno()).st_nlink:  # deleted: what is written now would be lost in silence
            self._files[name].close()
            self.folder.mkdir(parents=True, exist_ok=True)
            self._open(name)
            if not self._deleted:
                self._deleted = True  # before the warning, which comes back here for training_debug.log
                log.warning("files of %s were deleted; they begin again", self.folder)
        if (file := self._files.get(name)) is not None:
            file.write(text)

    def _try(self, name: str, call: Any, *args: Any) -> None:
        try:
            call(*args)
        except (OSError, ValueError) as error:
            self._files[name] = None
            if self._handler is not None and name == "training_debug.log":
                log.removeHandler(self._handler)
            log.warning("%s stopped being written (%s); training goes on", name, error)

    def row(self, kind: str, step: int, epoch: float, batch: int, **values: Any) -> None:
        """One JSON line; non-finite numbers become null."""
        content = {"kind": kind, "step": step, "epoch": epoch, "batch": batch, **values}
        self.write("metrics.jsonl", json.dumps(jsonable(content), allow_nan=False))
        self._rows += kind not in UNCOUNTED

    def rewind(self, entry: Mapping[str, Any]) -> None:
        """The row of a return to a checkpoint, at the place that it went back to."""
        self.row("rewind", entry["to_step"], batch=entry["to_batch"], **entry)

    def timing(self, step: int, batch: int, seconds: Mapping[str, float]) -> None:
        self.write("timings.jsonl", json.dumps({"step": step, "batch": batch, "seconds": dict(seconds)}))

    def step(self, report: StepReport, epoch: int, batch: int, clip_norm: float) -> None:
        """A step into metrics.jsonl and, in the words its readers grep for, into training_debug.log."""
        fields = {
            "outcome": report.outcome,
            "total": report.total,
            "raw": report.raw,
            "weighted": report.weighted,
            "grad_l2_preclip": report.grad_l2_preclip,
            "grad_l2_postclip": report.grad_l2_postclip,
            "clip_ratio": report.clip_ratio,
            "loss_scale": report.loss_scale,
            "lr": report.lr,
        }
        if report.saturated:
            fields |= {"saturated": report.saturated}
        if not report.committed:
            fields |= {"culprit": report.culprit, "image_ids": list(report.image_ids)}
        self.row("step", report.step, epoch, batch, **fields)
        lines = committed_lines(report, clip_norm) if report.committed else rejected_lines(report)
        for level, line in lines:
            if level:
                log.log(level, "step %d epoch %d %s", report.step, epoch, line)
            else:
                self.write("training_debug.log", f"step {report.step} epoch {epoch} {line}")

    def epoch(self, values: Mapping[str, Any]) -> None:
        """Rewrite results.csv with one more row, so that late columns (validation) fit too."""
        self._epochs.append(dict(values))
        self._write_epochs()

    def _write_epochs(self) -> None:
        if not self._epochs:  # all of them were taken back
            (self.folder / "results.csv").unlink(missing_ok=True)
            return
        columns = list(dict.fromkeys(key for row in self._epochs for key in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._epochs)
        try:
            write_durably(self.folder / "results.csv", text.getvalue().encode())
        except OSError as error:
            log.warning("results.csv not written: %s", error)


class _ToFile(logging.Handler):
    """Log records of the package into training_debug.log."""

    def __init__(self, records: Records) -> None:
        super().__init__(logging.INFO)
        self.records = records

    def emit(self, record: logging.LogRecord) -> None:
        self.records.write("training_debug.log", self.format(record))


def committed_lines(report: StepReport, clip_norm: float) -> list[tuple[int, str]]:
    """[(log level or 0 for the file only, line)] of a committed step."""
    lines = [
        (0, f"{name}_loss: {value:.6f} (weighted {report.weighted.get(name, 0.0):.6f})")
        for name, value in report.raw.items()
    ]
    threshold = f"threshold {clip_norm:g}" if clip_norm else "no clipping"
    lines += [
        (logging.INFO, f"Total Loss: {report.total:.6f}"),
        (logging.INFO, f"Total Grad Norm: {report.grad_l2_preclip:.6f} (L2, unscaled, before clipping)"),
        (0, f"Norm after clip: {report.grad_l2_postclip:.6f} ({threshold})"),
        (0, "LR: " + ", ".join(f"{group} {lr:.3e}" for group, lr in report.lr.items())),
    ]
    return lines


def rejected_lines(report: StepReport) -> list[tuple[int, str]]:
    """The words of a rejected step; calibration of the loss scale is none of an error's."""
    if report.outcome == "amp_backoff":
        return [(0, f"AMP backoff: overflow at loss scale {report.loss_scale:g}, halved ({report.culprit})")]
    what = f"NaN/Inf gradient in {report.culprit}" if report.outcome == "bad_grad" else f"{report.culprit}"
    ids = ", ".join(report.image_ids[:8]) or "unknown"
    return [
        (logging.WARNING, f"{report.outcome}: {what}; images: {ids}"),
        (logging.WARNING, f"Skipping optimizer step ({report.outcome})"),
    ]


def gradient_block(total: float, largest: Sequence[tuple[str, float]]) -> str:
    """`Gradient Norms:` of the debug log: the total, then the largest parameters by name."""
    rows = "".join(f"\n    {name}: {norm:.6f}" for name, norm in largest)
    return f"Gradient Norms:\n  total: {total:.6f}{rows}"


def loss_block(report: StepReport) -> str:
    """`Loss Components:` of the debug log: each loss raw and weighted, and how the step ended."""
    rows = "".join(
        f"\n    {name}: raw {value:.6f}, weighted {report.weighted.get(name, 0.0):.6f}"
        for name, value in report.raw.items()
    )
    return f"Loss Components: {report.outcome}\n  total: {report.total:.6f}{rows}"


def input_block(window: Sequence[Any]) -> str:
    """`Input check:` of the debug log: what is in the floating tensors of a window's batches, on the host."""
    rows = []
    for number, batch in enumerate(window):
        for name, value in sorted(vars(batch).items()) if hasattr(batch, "__dict__") else ():
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                rows.append(f"\n    {number}.{name} {list(value.shape)}: {_contents(value)}")
    return f"Input check:{''.join(rows)}"


def _contents(values: torch.Tensor) -> str:
    """Range, how many are not finite, and of pixels how many are too large for an image in [0, 1]."""
    values = values.detach().float()
    sound = values[values.isfinite()]
    low, high, mean = (sound.min(), sound.max(), sound.mean()) if sound.numel() else (math.nan,) * 3
    large = f"|x| > {LARGE_INPUT}: {int((sound.abs() > LARGE_INPUT).sum())}, " if values.ndim > 2 else ""
    wrong = f"NaN: {int(values.isnan().sum())}, inf: {int(values.isinf().sum())}"
    return f"min={low:.4g}, max={high:.4g}, mean={mean:.4g}, {large}{wrong}"


def cut_rows(path: Path, batch: int | None, rewinds: int = 0, most: int | None = None) -> list[dict[str, Any]]:
    """Keep the rows of batches up to `batch`, `most` at most, and of rewinds the first `rewinds`; returns them.

    A half-written last line goes too.
    """
    if not path.exists():
        return []
    kept, lines, count = [], [], 0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("kind") == "end":  # it goes on
            stays = False
        elif row.get("kind") == "rewind":
            stays = row["number"] <= rewinds
        else:
            stays = (batch is None or row.get("batch", 0) <= batch) and (most is None or count < most)
            count += 1
        if stays:
            kept.append(row)
            lines.append(line)
    write_durably(path, "".join(line + "\n" for line in lines).encode())
    return kept


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Rows of results.csv as text; empty when there is none."""
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Versions, device, threads and git commit of this run."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "device": str(device),
        "gpu": gpu,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "git_commit": _git_commit(),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def _git_commit() -> str | None:
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None
