# SPDX-License-Identifier: AGPL-3.0-or-later
"""Checkpoints: snapshot in memory, written by a thread, atomic, checksummed, plain.

Each file is written as tmp, fsync, rename, fsync of the folder. The manifest names every file's sha256; before a file
is replaced the manifest lists its old and its new hash, so that a kill at any moment leaves a folder that verifies.
"""

import hashlib
import io
import json
import logging
import pickle
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsdet.errors import CheckpointError, RunFailed, explain
from fsdet.files import UNREADABLE, damaged_part, write_durably

log = logging.getLogger("fsdet")
FORMAT = 1
REQUIRED = ("model", "ema", "optimizer", "step")
FINITE = (*REQUIRED, "objective")  # what must hold no NaN and no inf
MANIFEST = "manifest.json"


def snapshot(state: Any) -> Any:
    """A deep copy of plain values and tensors, the tensors detached, on the CPU and compact."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True, memory_format=torch.preserve_format)
    if isinstance(state, Mapping):
        return {key: snapshot(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(snapshot(value) for value in state)
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    raise TypeError(f"a checkpoint holds plain values and tensors, got {type(state).__name__}")


def first_non_finite(state: Any, path: str = "") -> str | None:
    """Address of the first tensor with a NaN or inf in it, or None."""
    if isinstance(state, Tensor):
        return path if state.is_floating_point() and not state.isfinite().all() else None
    items = (
        state.items() if isinstance(state, Mapping) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    )
    return next((found for k, v in items if (found := first_non_finite(v, f"{path}.{k}" if path else str(k)))), None)


def in_run(path: str | Path) -> Path:
    """The checkpoint that `path` stands for: a run folder for its best.pt."""
    path = Path(path)
    return path / "best.pt" if path.is_dir() else path


def load(path: str | Path, device: str | torch.device = "cpu") -> dict[str, Any]:
    """Read a checkpoint, verifying its sha256 when a manifest lies beside it.

    Raises:
        CheckpointError: missing, damaged, of another format, with non-finite tensors, or holding code.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            explain(
                "a checkpoint file",
                "nothing there" if not path.exists() else "a folder",
                str(path),
                "check the path; a run folder holds best.pt and last.pt",
            )
        )
    data = path.read_bytes()
    vouched = _verify(path, data)
    try:
        if not vouched and (part := damaged_part(data)):  # torch does not look at the archive's own checksums
            raise _damaged(path, f"a part that is not as it was written ({part})")
        state = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        what = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            explain(
                "plain values and tensors",
                f"something else, which was not run{f' ({what[1]})' if what else ''}",
                str(path),
                "use a checkpoint that fsdet wrote",
            )
        ) from error
    except (*UNREADABLE, RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError) as error:
        raise _damaged(path, f"{len(data)} bytes that cannot be read") from error
    _check_content(path, state)
    return state


def _check_content(path: Path, state: Any) -> None:
    missing = [key for key in REQUIRED if not isinstance(state, Mapping) or key not in state]
    if missing:
        raise CheckpointError(
            explain(
                f"a dict with {', '.join(REQUIRED)}",
                f"one without {', '.join(missing)}",
                str(path),
                "use a checkpoint that fsdet wrote",
            )
        )
    if state.get("format", FORMAT) > FORMAT:
        raise CheckpointError(
            explain(
                f"checkpoint format <= {FORMAT}",
                f"format {state['format']}",
                str(path),
                "read it with the newer fsdet that wrote it",
            )
        )
    if where := first_non_finite({k: state[k] for k in FINITE if k in state}):
        raise CheckpointError(
            explain("finite tensors", f"NaN or inf in {where}", str(path), "use an earlier checkpoint of the run")
        )


def _damaged(path: Path, got: str) -> CheckpointError:
    return CheckpointError(
        explain(
            "an intact checkpoint",
            got,
            str(path),
            "the file is damaged: use another checkpoint of the run, or its copy",
        )
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder; empty when there is none or it is unreadable."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or not content:
        return {}
    files = content.get("files", {})
    entries = {name: e for name, e in files.items() if isinstance(e, dict)} if isinstance(files, dict) else {}
    return {**content, "files": entries}


def _verify(path: Path, data: bytes) -> bool:
    """Whether a manifest beside the file vouches for it.

    Raises:
        CheckpointError: the file is empty, or the manifest has another sha256.
    """
    if not data:
        cure = "copy it again, or use another checkpoint of the run"
        raise CheckpointError(explain("a checkpoint", "an empty file", str(path), cure))
    entry = read_manifest(path.parent).get("files", {}).get(path.name)
    if not entry:
        return False
    digest = hashlib.sha256(data).hexdigest()
    if digest not in (entry.get("sha256"), entry.get("replaces")):
        raise _damaged(path, f"{len(data)} bytes whose sha256 is not the manifest's")
    return True


def damage(path: Path) -> str | None:
    """What `load` says of a file that is empty, or whose sha256 is not the manifest's; None of another, or where no
    manifest names it."""
    try:
        _verify(path, path.read_bytes())
    except CheckpointError as error:
        return str(error)
    return None


def to_judge(folder: Path) -> Path | None:
    """The checkpoint of a run to evaluate: best.pt, or the newest one where that is damaged; None where there is no
    best.pt, or nothing that is as it was written."""
    best = folder / "best.pt"
    saved = [best, *candidates(folder)] if best.is_file() else []
    return next((path for path in saved if not damage(path)), None)


def candidates(folder: Path) -> list[Path]:
    """Files a run can be resumed from, newest first."""
    ring = sorted(folder.glob("step_*.pt"), key=lambda p: p.name, reverse=True)
    return [p for p in (folder / "last.pt", *ring, folder / "best.pt") if p.exists()]


def intact(folder: Path, problems: list[str] | None = None) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The intact checkpoints of a run folder, newest first; damaged ones are named in the log and in `problems`."""
    for path in candidates(folder):
        try:
            yield path, load(path)
        except CheckpointError as error:
            log.warning("%s", error)
            if problems is not None:
                problems.append(path.name)


def newest(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The newest intact checkpoint of a run folder; damaged ones are named in the log and passed over.

    Raises:
        CheckpointError: there is none.
    """
    problems: list[str] = []
    for found in intact(folder, problems):
        return found
    got = f"only damaged ones ({', '.join(problems)})" if problems else "none"
    raise CheckpointError(explain("an intact checkpoint", got, str(folder), "start the run afresh in another folder"))


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Put optimizer state back in the memory layout of its parameters, which fused kernels take for granted."""
    optimizer.load_state_dict(dict(state))
    for parameter, slots in optimizer.state.items():
        for name, value in slots.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                slots[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class Writer:
    """Saves states of one run folder: a ring of `keep` step files, last.pt, best.pt, the manifest.

    `save` returns when the snapshot is taken. A background save that fails is a warning, the first of a row only, and
    the next one retries; with `wait=True` it raises RunFailed. failures: in a row. written: step of the last success.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self.failures = 0
        self.written: int | None = None
        self._thread: threading.Thread | None = None
        self._error: str | None = None

    def save(self, state: Mapping[str, Any], *, best: bool = False, wait: bool = False) -> None:
        """Snapshot `state` now and write it; `best` also replaces best.pt."""
        taken = snapshot(state)
        self.join()
        self._thread = threading.Thread(target=self._write, args=(taken, best), name="checkpoint", daemon=False)
        self._thread.start()
        if wait:
            self.join()
            if self._error:
                raise RunFailed(f"the checkpoint could not be saved: {self._error}")

    def join(self) -> None:
        """Wait for the save under way."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, state: dict[str, Any], best: bool) -> None:
        if self.written is not None and not self.folder.is_dir():
            log.warning("the run folder %s is gone; it is made again, with what is saved from now on", self.folder)
        try:
            self._write_files(state, best)
        except (OSError, RuntimeError) as error:  # disk full surfaces as either
            self._error, self.failures = str(error), self.failures + 1
            if self.failures == 1:
                told = "checkpoint of step %s not saved (%s); the files before it are intact, and it is tried again"
                log.warning(told, state["step"], error)
        else:
            if self.failures:
                log.warning("checkpoint of step %s saved, after %d that were not", state["step"], self.failures)
            self._error, self.failures, self.written = None, 0, state["step"]

    def _write_files(self, state: dict[str, Any], best: bool) -> None:
        if where := first_non_finite({k: state[k] for k in FINITE if k in state}):
            raise RuntimeError(f"NaN or inf in {where}; such a state is never written")
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        files = dict(read_manifest(self.folder).get("files", {}))
        entry = {
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "step": state["step"],
            "batch": state.get("batch", 0),
        }
        # best.pt first: whoever goes on from last.pt takes for granted that the best one so far is there
        names = [*(["best.pt"] if best else []), f"step_{state['step']:08d}.pt", "last.pt"]
        self._write_manifest(files | {n: entry | _replaces(files.get(n)) for n in names}, finished=False)
        for name in names:
            write_durably(self.folder / name, data)
        files |= dict.fromkeys(names, entry)
        old = self._dropped({*files, *(path.name for path in candidates(self.folder))}, state["step"])
        finished = bool(state.get("finished", False))  # not before all of it is on the disk
        self._write_manifest({n: e for n, e in files.items() if n not in old}, finished)
        for name in old:
            (self.folder / name).unlink(missing_ok=True)

    def _dropped(self, names: Iterable[str], step: int) -> list[str]:
        """Step files beyond the newest `keep`, and those of later steps: from a way that a rewind or resume left."""
        steps = {name: int(digits[1]) for name in names if (digits := re.fullmatch(r"step_(\d+)\.pt", name))}
        left = sorted(name for name, at in steps.items() if at <= step)
        return [*left[: -self.keep], *(name for name, at in steps.items() if at > step)]

    def _write_manifest(self, files: Mapping[str, Any], finished: bool) -> None:
        content = {"format": FORMAT, "finished": finished, "files": files}
        write_durably(self.folder / MANIFEST, json.dumps(content, indent=1).encode())


def _replaces(entry: Mapping[str, Any] | None) -> dict[str, str]:
    return {"replaces": entry["sha256"]} if entry else {}


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` reached its end."""
    return bool(read_manifest(folder).get("finished", False))


def random_state() -> dict[str, Tensor]:
    """State of torch's generators; batches need none, they are pure functions of their index."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), **{f"cuda:{i}": s for i, s in enumerate(cuda)}}


def restore_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if torch.cuda.is_available():
        for name, value in state.items():
            if name.startswith("cuda:") and int(name[5:]) < torch.cuda.device_count():
                torch.cuda.set_rng_state(value.cpu(), name)
