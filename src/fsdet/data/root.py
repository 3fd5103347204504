# SPDX-License-Identifier: AGPL-3.0-or-later
"""The data root: every file that a data set reads lies inside it, links resolved."""

import os
from collections.abc import Iterator
from pathlib import Path

from fsdet.data.report import Report
from fsdet.errors import DataError, did_you_mean, explain


class Root:
    """A folder, cached listings of what is in it, and the only way from a written path to a file."""

    def __init__(self, folder: Path, report: Report) -> None:
        self.folder = Path(folder).resolve()
        self.report = report
        self._prefix = str(self.folder).rstrip(os.sep) + os.sep
        self._listings: dict[str, dict[str, str]] = {}
        self._lower: dict[str, dict[str, str]] = {}
        self._refused: set[str] = set()  # links to folders outside, reported once

    def show(self, path: str | Path) -> str:
        """The path as it is printed: relative to the root."""
        return str(path).removeprefix(self._prefix)

    def contains(self, path: str | Path) -> bool:
        """Whether the path, links resolved, is the root or below it."""
        real = os.path.realpath(path)
        return real == str(self.folder) or real.startswith(self._prefix)

    def source(self, text: str, where: str) -> Path:
        """The file or folder that a data YAML names. `../X` is read as `X` when only that exists inside.

        Raises:
            DataError: it leaves the root or does not exist.
        """
        written = self.folder / text
        if self.contains(written):
            path = self._as_written(written)
            if not path.exists():
                raise DataError(explain("an existing file or folder", f"'{text}'", where, self._advice(path)))
            return path
        inside = self.folder.joinpath(*_without_dots(text)) if text.replace("\\", "/").startswith("../") else None
        if inside and not written.exists() and inside.exists() and self.contains(inside):
            self.report.add("path", where, f"'{text}' read as '{self.show(inside)}'")
            return self._as_written(inside)
        raise DataError(
            explain(
                f"a path inside {self.folder}",
                f"'{text}'",
                where,
                "move the data inside, or set `path` to a folder that holds all of it",
            )
        )

    def _as_written(self, path: Path) -> Path:
        """The path with its links kept: labels lie beside the folder that was named. Where `..` crosses a link, or the
        way in is a link from outside, it is resolved."""
        plain, real = os.path.normpath(path), os.path.realpath(path)
        return Path(plain if os.path.realpath(plain) == real and plain.startswith(self._prefix) else real)

    def files(self, folder: str | Path) -> dict[str, str]:
        """{file name: full path} of a folder, hidden files left out, links that leave the root reported."""
        key = str(folder)
        if key not in self._listings:
            self._listings[key] = self._scan(key)
        return self._listings[key]

    def walk(self, folder: str | Path) -> Iterator[tuple[str, dict[str, str]]]:
        """(folder, its files) from `folder` downwards in sorted order, each folder once.

        Links to folders are followed inside the root; those that leave it are reported and left out.
        """
        seen = {os.path.realpath(folder)}
        for here, folders, _ in os.walk(folder, followlinks=True):
            folders[:] = [name for name in sorted(folders) if self._enters(os.path.join(here, name), seen)]
            yield here, self.files(here)

    def _enters(self, folder: str, seen: set[str]) -> bool:
        real = os.path.realpath(folder)
        if os.path.basename(folder).startswith(".") or real in seen:
            return False
        seen.add(real)
        if not self.contains(real):
            if folder not in self._refused:
                self.report.add("path leaves the data root", self.show(folder))
            self._refused.add(folder)
            return False
        return True

    def find(self, folder: str | Path, name: str, where: str) -> str | None:
        """Full path of the file that an annotation in `folder` calls `name`, or None.

        Back slashes, another letter case and somebody's own folders in front of the name are mended and reported.
        """
        exact = self._lookup(folder, name)
        if exact:
            return exact
        parts = _without_dots(name)
        for tail, kind in (
            (name.replace("\\", "/"), ""),
            (parts[-1] if parts else "", "foreign folder in a file name"),
        ):
            path = self._lookup(folder, tail)
            if path is None and (path := self.any_case(folder, tail)):
                kind = kind or "letter case of a file name"
            if path:
                if kind:
                    self.report.add(kind, where)
                return path
        return None

    def _lookup(self, folder: str | Path, name: str) -> str | None:
        head, _, tail = name.rpartition("/")
        return self.files(self._below(folder, head)).get(tail) if tail else None

    def any_case(self, folder: str | Path, name: str) -> str | None:
        """Full path of the file that has this name from `folder` on, letter case of the file aside, or None."""
        head, _, tail = name.rpartition("/")
        place = self._below(folder, head)
        if place not in self._lower:
            self._lower[place] = {key.lower(): value for key, value in self.files(place).items()}
        return self._lower[place].get(tail.lower())

    @staticmethod
    def _below(folder: str | Path, head: str) -> str:
        return os.path.normpath(os.path.join(folder, head)) if head else str(folder)

    def _scan(self, folder: str) -> dict[str, str]:
        if not self.contains(folder) or not os.path.isdir(folder):
            return {}
        found: dict[str, str] = {}
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.name.startswith(".") or not entry.is_file():
                    continue
                if entry.is_symlink() and not self.contains(entry.path):
                    self.report.add("path leaves the data root", self.show(entry.path))
                    continue
                found[entry.name] = entry.path
        return found

    def _advice(self, path: Path) -> str:
        parent = path.parent
        while not parent.is_dir():
            path, parent = parent, parent.parent
        names = sorted(entry.name for entry in parent.iterdir())
        hint = did_you_mean(path.name, names) or f" '{self.show(parent)}' holds {', '.join(names[:8]) or 'nothing'}"
        return f"correct the path.{hint}"


def _without_dots(text: str) -> list[str]:
    """Path parts without `..`, `.` and drives."""
    parts = text.replace("\\", "/").split("/")
    return [part for part in parts if part not in ("", ".", "..") and not part.endswith(":")]
