# SPDX-License-Identifier: AGPL-3.0-or-later
"""Writing a file whole or not at all: the one place that replaces files users may have."""

import os
from pathlib import Path


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
