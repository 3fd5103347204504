# SPDX-License-Identifier: AGPL-3.0-or-later
"""A folder of results and its index: which files runs have put there, and which of them a next run may replace."""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from fsdet.errors import UserError, explain, some
from fsdet.files import is_json_with, read_json, refuse_foreign, refuse_unwritable, sha256_of, write_durably


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
    refuse_foreign(_notes_of(out / index), f"notes of {index}", _is_journal)
    ours = recorded(out / index)
    theirs = [name for path in wanted if path.exists() and (name := path.relative_to(out).as_posix()) not in ours]
    if theirs:
        raise UserError(explain("a folder without these files", f"{theirs[0]} and {len(theirs) - 1} more, which "
                                f"{index} does not list", str(out),
                                "move them away, or name another --out"))  # fmt: skip
    known = {path: ours.get(path.relative_to(out).as_posix()) for path in wanted if path.is_file()}
    changed = [path.relative_to(out).as_posix() for path, digest in known.items()
               if digest and sha256_of(path) != digest]  # fmt: skip
    if changed:
        raise UserError(explain("files as they were written", f"{some(changed)}, changed since", str(out),
                                "move them away, or name another --out"))  # fmt: skip
    for folder in sorted({path.parent for path in wanted} - {out}):
        if folder.exists() and not folder.is_dir():
            raise UserError(explain("a folder", "a file", str(folder), "move it away, or name another --out"))
        refuse_unwritable(folder / index)


def recorded(index: Path, written: Iterable[str] = ()) -> dict[str, str]:
    """{file: its sha256 as it was written, "" where none is noted or no run shall remove it} of those that an index or
    its Journal says were put beside it, but those of `written`."""
    told, done = read_json(index), set(written)
    names, digests = told.get("written"), told.get("sha256")
    digests = digests if isinstance(digests, dict) else {}
    listed = {str(name): str(digests.get(name, "")) for name in (names if isinstance(names, list) else ())}
    return {name: digest for name, digest in listed.items() if name not in done} | _noted(index, done)


def earlier(index: Path, written: Iterable[str]) -> dict[str, str]:
    """`recorded` files that lie there and are none of `written`."""
    written = list(written)
    folder, spelt = index.parent, {name.casefold(): name for name in written}

    def is_other(name: str) -> bool:  # not where A.jpg is a.jpg
        twin, path = spelt.get(name.casefold()), folder / name
        return path.is_file() and not (twin and (folder / twin).exists() and path.samefile(folder / twin))

    return {name: digest for name, digest in sorted(recorded(index, written).items()) if is_other(name)}


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
        self._path, self._removable = _notes_of(index), removable

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


def _notes_of(index: Path) -> Path:
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


def _noted(index: Path, written: Collection[str]) -> dict[str, str]:
    """{file: sha256, "" for one that no run shall remove} of the notes whose file is there as it was noted, and is none
    of `written`."""
    noted: dict[str, str] = {}
    for row in _rows(_notes_of(index)):
        path = index.parent / row["file"]
        if row["file"] not in written and path.is_file() and sha256_of(path) == row["sha256"]:
            noted[row["file"]] = row["sha256"] if row.get("removable") is True else ""
    return noted
