# SPDX-License-Identifier: AGPL-3.0-or-later
"""Writing a file whole or not at all: the one place that replaces files users may have."""

import hashlib
import io
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from fsdet.errors import UserError, explain

UNREADABLE = (zipfile.BadZipFile, zlib.error)  # an archive whose listing or whose compressed part is damaged


def refuse_foreign(path: Path, what: str, is_ours: Callable[[Path], bool]) -> None:
    """Let `path` be written when nothing is there, or something of the same kind.

    Raises:
        UserError: a folder, or a file that is no `what`; a user's own file is never replaced. Or nothing can be written
        there, which is better known before the work than after it.
    """
    if path.is_dir():
        raise UserError(explain(f"a file name for {what}", "a folder", str(path), "name a file in it"))
    if path.exists() and not is_ours(path):
        raise UserError(explain(f"no file yet, or {what}", "another file", str(path),
                                "name another one; nothing was replaced"))  # fmt: skip
    refuse_unwritable(path)


def readable(name: object) -> str:
    r"""A name as any program can read it: a byte that is no UTF-8, a lone surrogate to Python, is written \udcNN."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_unwritable(path: Path) -> None:
    """Raises UserError where no file can be put at `path`, the nearest folder there is being tried."""
    place = next(folder for folder in path.absolute().parents if folder.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        told = f"{error.strerror or error} ({place})"
        raise UserError(explain("a place that can be written to", told, str(path), "name another one")) from error


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
    except OSError as error:  # told by the name that the user gave
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
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


def damaged_part(data: bytes) -> str | None:
    """The first member of a zip archive whose bytes are not those of its checksum; None where there is none, or no
    archive at all, which is for its reader to judge.

    Raises:
        one of UNREADABLE, or what zipfile has for an archive that it cannot read: OSError, RuntimeError, ValueError.
    """
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return None
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return archive.testzip()
