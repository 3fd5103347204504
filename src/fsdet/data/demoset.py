# SPDX-License-Identifier: AGPL-3.0-or-later
"""A folder of drawn data that appears whole or not at all, and replaces nothing but its like."""

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2

from fsdet.errors import DataError, explain

MARKER = "demo.json"
KINDS = {"documents_sha256": "the classifier", "instances_sha256": "Mask R-CNN", "flights_sha256": "videos",
         "generator_sha256": "few-shot detection"}  # the first of them in an identity: what it is for  # fmt: skip
SLACK = 2.0  # s, by which the times of files that were written one after another may be out of order
DRAWN = re.compile(r"\d{6}\.(jpg|png)|annotations\.json|drone_video\.mp4")  # every file that a drawn split holds


def publish(out: Path, identity: Mapping[str, Any], splits: Iterable[str], draw: Callable[[Path], None],
            same_as: Mapping[str, Any] | None = None) -> Path:  # fmt: skip
    """Let `draw` fill a new folder and put it at `out`; returns the path of its data.yaml.

    A complete set of the same `identity`, or of an older one that stood for the same pictures (`same_as`), is left as
    it is; another demo set of the same kind is replaced. A key of KINDS in an identity names its kind.

    Raises:
        DataError: `out` holds something else than a demo set, one of another kind, or files that nobody drew.
    """
    found = _drawn(out)
    if found in (identity, same_as or identity):
        return out / "data.yaml"
    _refuse_foreign(out, {"data.yaml", MARKER, *splits})
    if found and _kind(found) != _kind(identity):
        what, got = (f"a demo set for {_kind(i)}" for i in (identity, found))
        raise DataError(explain(f"{what}, or a new folder", got, str(out), "choose another folder"))
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        draw(draft)
        (draft / MARKER).write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
        draft.chmod(0o755)  # mkdtemp keeps others out
        _replace(out, draft)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return out / "data.yaml"


def _drawn(out: Path) -> dict | None:
    """What the demo set in `out` was drawn with; None when there is none."""
    if not (out / MARKER).is_file():
        return None
    try:
        return json.loads((out / MARKER).read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(explain("a demo set's marker", str(error), str(out / MARKER), "remove the folder")) from error


def _kind(identity: Mapping[str, Any]) -> str:
    """The task that a set was drawn for."""
    return next((task for key, task in KINDS.items() if key in identity), "an unknown task")


def _refuse_foreign(out: Path, entries: set[str]) -> None:
    """A folder that holds anything else than a demo set is not ours to replace."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    foreign = sorted(p.name for p in out.iterdir() if p.name not in entries) if out.is_dir() else ["a file"]
    own = [p for p in out.rglob("*") if p.is_file() and p.parent != out and not DRAWN.fullmatch(p.name)]
    foreign += sorted(str(p.relative_to(out)) for p in own)
    if foreign or not (out / MARKER).is_file():
        got = f"other things ({', '.join(foreign[:3])})" if foreign else f"files without {MARKER}"
        raise DataError(explain("a new or empty folder, or a demo set", got, str(out), "choose another folder"))
    written = (out / MARKER).stat().st_mtime  # the last file that a draw writes
    later = [p for p in out.rglob("*") if p.is_file() and p.stat().st_mtime > written + SLACK]
    changed = sorted(str(p.relative_to(out)) for p in later)
    if changed:
        got = f"files changed since ({', '.join(changed[:3])})"
        raise DataError(explain("a demo set as it was drawn", got, str(out), "choose another folder, or remove it"))


def _replace(out: Path, draft: Path) -> None:
    if out.exists():
        old = draft.with_name(draft.name + ".old")
        out.rename(old)
        draft.rename(out)
        shutil.rmtree(old)
    else:
        draft.rename(out)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def mapper_of(processes: int) -> Iterator[Callable[..., Iterable]]:
    """A `map` over worker processes, all at rest on leaving. Spawned: a fork of a process with threads may hang."""
    if processes <= 1:
        yield map
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), partial(cv2.setNumThreads, 1)) as pool:
        try:
            yield pool.map
        finally:
            pool.shutdown(cancel_futures=True)
