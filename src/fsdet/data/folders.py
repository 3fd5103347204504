# SPDX-License-Identifier: AGPL-3.0-or-later
"""Image folders, one folder a class: SPLIT/<class>/*.jpg -> a DataSet in which an image is one object of its class."""

import hashlib
from pathlib import Path

import numpy as np

from fsdet.data.images import image_sizes, is_image
from fsdet.data.report import Report
from fsdet.data.root import Root
from fsdet.data.sources import DataSet, plan
from fsdet.data.support import NO_CLASS
from fsdet.errors import DataError, explain
from fsdet.files import readable
from fsdet.names import class_folders
from fsdet.types import ImageRecord

LAYOUT = "put images into train/<class>/ and val/<class>/, or into <class>/ alone"
HELD_OUT = 5  # one image in so many is validation where the folder has no such split


def load_folders(path: str | Path) -> DataSet:
    """A folder with train/, val/, test/ of class folders, a folder of class folders, or a data YAML that names them.

    Every record has one box around the whole image, whose label is the image's class. Without a split val a fifth of
    the training images becomes one, chosen by a hash of their names, so that it is the same on every machine.

    Raises:
        DataError: nothing there, fewer than two classes, or a split without a readable image.
    """
    report = Report()
    listed = plan(path, report)
    root = Root(listed.root, report)
    found = {
        split: [root.source(source.path, source.where) for source in sources]
        for split, sources in listed.splits.items()
    }
    for folder in (folder for folders in found.values() for folder in folders if not folder.is_dir()):
        raise DataError(explain("folders named after their classes", "a file", str(folder), LAYOUT))
    names = sorted({name for folders in found.values() for folder in folders for name in _classes(folder)})
    if len(names) < 2:
        got = f"{len(names)} ({', '.join(names)})" if names else "none"
        raise DataError(explain("a folder for each of at least two classes", got, str(path), LAYOUT))
    splits = {split: _records(folders, names, root, report) for split, folders in found.items()}
    for split, records in splits.items():
        if not records:
            raise DataError(explain("at least one readable image", "none", f"{path}: {split}", f"{LAYOUT}\n{report}"))
    if "val" not in splits:
        splits = _held_out(splits)
    return DataSet(root.folder, names, (), splits, report, str(path))


def refuse_untaught(data: DataSet) -> None:
    """Raise DataError for classes that only other splits than train have: a model would never learn them."""
    counts = {split: np.bincount([int(r.labels[0]) for r in data.split(split)], minlength=len(data.names))
              for split in data.splits}  # fmt: skip
    without = [i for i, count in enumerate(counts["train"]) if not count]
    if without:
        there = {i: ", ".join(f"{split} {n[i]}" for split, n in counts.items() if n[i]) for i in without}
        got = "; ".join(f"none of {data.names[i]}{f' ({there[i]})' if there[i] else ''}" for i in without)
        cure = "add training images of it, or remove its folder from every split"
        raise DataError(explain("training images of every class", got, f"{data.name}: train", cure))


def _classes(folder: Path) -> dict[str, Path]:
    return class_folders(e for e in folder.iterdir() if e.is_dir() and not e.name.startswith(NO_CLASS))


def _records(folders: list[Path], names: list[str], root: Root, report: Report) -> list[ImageRecord]:
    records = []
    for folder in folders:
        for name, place in _classes(folder).items():
            label = names.index(name)
            files = [Path(file) for key, file in root.files(place).items() if is_image(key)]
            for file, size in zip(files, image_sizes(files), strict=True):
                if isinstance(size, DataError):
                    report.add("unreadable image", root.show(file))
                else:
                    whole = np.array([[0, 0, size[1], size[0]]], np.float32)
                    records.append(ImageRecord(file, size, whole, np.array([label])))
    return records


def _held_out(splits: dict[str, list[ImageRecord]]) -> dict[str, list[ImageRecord]]:
    """A fifth of train as val; a class of which nothing would be left to learn from stays whole."""
    train = splits["train"]
    held = [int(hashlib.sha256(readable(r.path.name).encode()).hexdigest(), 16) % HELD_OUT == 0 for r in train]
    left = {int(r.labels[0]) for r, out in zip(train, held, strict=True) if not out}
    held = [out and int(r.labels[0]) in left for r, out in zip(train, held, strict=True)]
    parts = {
        "train": [r for r, out in zip(train, held, strict=True) if not out],
        "val": [r for r, out in zip(train, held, strict=True) if out],
    }
    return {**splits, **parts} if all(parts.values()) else splits
