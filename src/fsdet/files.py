# SPDX-License-Identifier: AGPL-3.0-or-later
"""Writing a file whole or not at all: the one place that replaces files users may have."""

import hashlib
import io
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from fsdet.errors import UserError, explain, some

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
    _refuse_unwritable(path)


def refuse_others(out: Path, index: str, what: str, keys: Iterable[str], wanted: Iterable[Path]) -> None:
    """Let `wanted` be written into a folder: what is there already of them, the folder's own `index` lists as it is.

    An index is a JSON file with `keys`, and with the names of the files beside it under "written"; what a run that was
    killed had noted in its Journal counts as listed.
    Raises:
        UserError: `out` or a folder in it is a file, its index is another file, one of `wanted` is somebody else's or
        has been changed since it was written, or nothing can be written there.
    """
    if out.exists() and not out.is_dir():
        raise UserError(explain("a folder", "a file", str(out), "name another --out"))
    wanted = list(wanted)
    refuse_foreign(out / index, what, is_json_with(*keys))
    refuse_foreign(_journal(out / index), f"notes of {index}", _is_journal)
    ours = listed(out / index)
    theirs = [name for path in wanted if path.exists() and (name := path.relative_to(out).as_posix()) not in ours]
    if theirs:
        raise UserError(explain("a folder without these files", f"{theirs[0]} and {len(theirs) - 1} more, which "
                                f"{index} does not list", str(out),
                                "move them away, or name another --out"))  # fmt: skip
    known = digests(out / index)
    changed = [name for path in wanted if path.is_file() and (name := path.relative_to(out).as_posix()) in known
               and sha256_of(path) != known[name]]  # fmt: skip
    if changed:
        raise UserError(explain("files as they were written", f"{some(changed)}, changed since", str(out),
                                "move them away, or name another --out"))  # fmt: skip
    for folder in sorted({path.parent for path in wanted} - {out}):
        if folder.exists() and not folder.is_dir():
            raise UserError(explain("a folder", "a file", str(folder), "move it away, or name another --out"))
        _refuse_unwritable(folder / index)


def listed(index: Path) -> set[str]:
    """The files that an index or its Journal says were written beside it, by their names in its folder."""
    names = read_json(index).get("written")
    return {*map(str, names if isinstance(names, list) else ()), *_noted(index)}


def listing(index: Path, names: Iterable[str]) -> list[str]:
    """What the next index has under "written": `names`, and what it listed before and still lies there."""
    return sorted({*names, *(name for name in listed(index) if (index.parent / name).is_file())})


def digests(index: Path) -> dict[str, str]:
    """{file: its sha256 as it was written} of those beside an index of which it says that, under "sha256", or which its
    Journal has."""
    told = read_json(index).get("sha256")
    known = {name: str(digest) for name, digest in told.items()} if isinstance(told, dict) else {}
    return known | {name: digest for name, digest in _noted(index).items() if digest}


def earlier(index: Path, written: Iterable[str]) -> list[str]:
    """Files that an index lists, lie there, and are none of `written`."""
    folder, spelt = index.parent, {name.casefold(): name for name in written}

    def is_other(name: str) -> bool:  # not where A.jpg is a.jpg
        twin, path = spelt.get(name.casefold()), folder / name
        return path.is_file() and not (twin and (folder / twin).exists() and path.samefile(folder / twin))

    return sorted(filter(is_other, listed(index)))


def remove_unchanged(folder: Path, written: Mapping[str, str]) -> dict[str, str]:
    """Remove those files of a folder, {name: sha256}, that are as they were written; returns {name: why} of the others.

    What has changed since, has no sha256 ("") or is a link or outside of the folder may be somebody's, and stays, as
    does what cannot be removed.
    """
    why = {name: _remove(folder, name, digest) for name, digest in written.items()}
    return {name: reason for name, reason in why.items() if reason}


def _remove(folder: Path, name: str, digest: str) -> str | None:
    """Why a file stays, in words; None where it is gone."""
    path = folder / name
    if path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
        return "as links and what is outside of the folder are let be"
    if not digest:
        return "which may have been changed since: no sha256 was noted"
    try:
        if sha256_of(path) != digest:
            return "changed since"
        path.unlink()
    except OSError as error:
        return f"which cannot be removed: {error.strerror or error}"
    return None


class Journal:
    """Notes of the files that are put beside an index before it lists them, each made on the disk before its file is.

    A run that is killed leaves the notes, and the next one knows its files by their sha256. `close` it after the index
    has been written. removable: whether a later run may remove them as results that are no longer any.
    """

    def __init__(self, index: Path, removable: bool = True) -> None:
        self._path, self._removable = _journal(index), removable

    def note(self, sha256: Mapping[str, str]) -> None:
        """{name in the index's folder: sha256} of files that are about to be written."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"file": name, "sha256": digest, "removable": self._removable} for name, digest in sha256.items()]
        with open(self._path, "a", encoding="utf-8") as file:
            file.write("".join(f"\n{json.dumps(row)}" for row in rows))  # not after a line that a kill cut off
            file.flush()
            os.fsync(file.fileno())

    def write(self, folder: Path, contents: Mapping[str, bytes]) -> dict[str, str]:
        """Note {name: content}, then write each file below `folder`, which is the index's; returns {name: sha256}."""
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
        self.note(digests)
        for name, data in contents.items():
            write_durably(folder / name, data)
        return digests

    def close(self) -> None:
        """Throw the notes away."""
        self._path.unlink(missing_ok=True)


def _journal(index: Path) -> Path:
    return index.with_name(f".{index.name}.part")


def _is_journal(path: Path) -> bool:
    return path.read_bytes()[:2] in (b"", b"\n", b"\n{")  # also one that a kill cut off


def _rows(journal: Path) -> list[dict]:
    """The notes that can be read: a kill may have cut the last one off."""
    rows = []
    for line in journal.read_bytes().splitlines() if journal.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("file", "sha256")):
            rows.append(row)
    return rows


def _noted(index: Path) -> dict[str, str]:
    """{file: sha256, "" for one that no run shall remove} of the notes whose file is there as it was noted."""
    noted: dict[str, str] = {}
    for row in _rows(_journal(index)):
        path = index.parent / row["file"]
        if path.is_file() and sha256_of(path) == row["sha256"]:
            noted[row["file"]] = row["sha256"] if row.get("removable") is True else ""
    return noted


def readable(name: object) -> str:
    r"""A name as any program can read it: a byte that is no UTF-8, a lone surrogate to Python, is written \udcNN."""
    return str(name).encode("utf-8", "backslashreplace").decode()


def sha256_of(path: Path) -> str:
    """sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_unwritable(path: Path) -> None:
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
