# SPDX-License-Identifier: AGPL-3.0-or-later
"""Class names as data spell them: composed Unicode (NFC), so that two spellings of an umlaut are one name."""

import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from fsdet.errors import DataError, explain


def composed(name: object) -> str:
    """`name` as a text in composed Unicode: macOS takes letters and accents of file names apart, others do not."""
    return unicodedata.normalize("NFC", str(name))


def repeated(names: Sequence[object]) -> dict[str, str]:
    """{composed name: how often, in words} of those that occur more than once."""
    spelt: dict[str, list[str]] = {}
    for name in names:
        spelt.setdefault(composed(name), []).append(str(name))
    return {name: f"{len(all_)} times" + (", in two spellings of Unicode" if len(set(all_)) > 1 else "")
            for name, all_ in sorted(spelt.items()) if len(all_) > 1}  # fmt: skip


def class_folders(folders: Iterable[Path]) -> dict[str, Path]:
    """{class name: its folder}, by name, of folders that are called after classes.

    Raises:
        DataError: two of them are one name.
    """
    found: dict[str, Path] = {}
    for folder in folders:
        name = composed(folder.name)
        if name in found:
            raise DataError(explain("one folder for each class", f"two for '{name}', in two spellings of Unicode",
                                    str(folder.parent), "put their files into one of them"))  # fmt: skip
        found[name] = folder
    return dict(sorted(found.items()))
