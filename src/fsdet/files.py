# SPDX-License-Identifier: AGPL-3.0-or-later
"""Writing a file whole or not at all: the one place that replaces files users may have."""

import json
import os
from collections.abc import Callable
from pathlib import Path

from fsdet.errors import UserError, explain


def refuse_foreign(path: Path, what: str, is_ours: Callable[[Path], bool]) -> None:
    """Let `path` be written when nothing is there, or something of the same kind.

    Raises:
        UserError: a folder, or a file that is no `what`; a user's own file is never replaced.
    """
    if path.is_dir():
        raise UserError(explain(f"a file name for {what}", "a folder", str(path), "name a file in it"))
    if path.exists() and not is_ours(path):
        raise UserError(explain(f"no file yet, or {what}", "another file", str(path),
                                "name another one; nothing was replaced"))  # fmt: skip


def is_json_with(*keys: str) -> Callable[[Path], bool]:
    """Whether a file is a JSON object that has all `keys`, as a test for `refuse_foreign`."""

    def test(path: Path) -> bool:
        value = read_json(path)
        return all(key in value for key in keys)

    return test


def read_json(path: Path) -> dict:
    """A JSON object; an empty one when the file holds none, which its own reader then says."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def write_durably(path: Path, data: bytes) -> Path:
    """Replace `path` by `data` so that a crash leaves the old or the new content, never a part; makes the folder.

    Order: temporary file beside it, fsync, rename, fsync of the folder. Two processes writing one path do not meet.

    Raises:
        OSError: nothing was replaced and nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)
    return path


def _sync_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
