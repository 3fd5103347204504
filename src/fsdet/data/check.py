# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is wrong with a data set before a training finds out: damage, sizes, duplicates, leaks, thin classes."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import numpy as np

from fsdet.data.images import image_size, read_rgb
from fsdet.data.sources import DataSet
from fsdet.errors import DataError
from fsdet.types import ImageRecord

SHOWN = 5
SEPARATE = ("train", "support"), ("val",), ("test",)  # groups that may not share an image


@dataclass
class CheckReport:
    """errors make a data set unfit (exit 2); warnings do not. table: objects and images of each class per split."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    loaded: str = ""
    table: str = ""

    @property
    def ok(self) -> bool:
        return not self.errors

    def __str__(self) -> str:
        lines = [self.table, "", "as loaded:", *(f"  {line}" for line in self.loaded.splitlines())]
        for title, rows in (("errors", self.errors), ("warnings", self.warnings)):
            lines += ["", f"{title}: {len(rows)}", *(f"  {row}" for row in rows)]
        return "\n".join(lines)


def check(dataset: DataSet, deep: bool = False, k: int = 10) -> CheckReport:
    """Check every image and annotation of the loaded splits.

    Args:
        deep: decode every image completely (only that finds a truncated one), not just its header.
        k: shots that are wanted of each class in split `support` (or `train` without one).
    """
    report = CheckReport(loaded=str(dataset.report), table=class_table(dataset))
    if dataset.report.faults:
        report.warnings.append(
            f"{dataset.report.faults} faulty labels or files were dropped or clipped, see 'as loaded'"
        )
    unique = {record.path: record for split in dataset.splits for record in dataset.split(split)}
    _images(list(unique.values()), deep, dataset.root, report)
    _copies(dataset, list(unique), report)
    _thin_classes(dataset, k, report)
    return report


def class_table(dataset: DataSet) -> str:
    """One row a class: base or novel, then objects / images in each split, crowds not counted."""
    splits = dataset.splits
    counts = {split: _counts(dataset.split(split), len(dataset.names)) for split in splits}
    wide = max([5, *map(len, dataset.names)])
    cells = [f"{split:>13s}" for split in splits]
    lines = [f"{'class':{wide}s} {'':5s} {' '.join(cells)}   (objects / images)"]
    for label, name in enumerate(dataset.names):
        kind = "base" if label < dataset.num_base else "novel"
        cells = [f"{objects[label]:6d} /{images[label]:5d}" for objects, images in counts.values()]
        lines.append(f"{name:{wide}s} {kind:5s} {' '.join(cells)}")
    cells = [f"{objects.sum():6d} /{len(dataset.split(split)):5d}" for split, (objects, _) in counts.items()]
    return "\n".join([*lines, f"{'all':{wide}s} {'':5s} {' '.join(cells)}"])


def _counts(records: Iterable[ImageRecord], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """([C] objects, [C] images with any)."""
    objects, images = np.zeros(classes, int), np.zeros(classes, int)
    for record in records:
        own = np.bincount(record.labels[~record.crowd], minlength=classes)
        objects += own
        images += own > 0
    return objects, images


def _images(records: list[ImageRecord], deep: bool, root: Path, report: CheckReport) -> None:
    def look(record: ImageRecord) -> str | None:
        try:
            size = read_rgb(record.path).shape[:2] if deep else image_size(record.path)
        except DataError as error:
            return str(error)
        if tuple(size) == record.size:
            return None
        turned = " (it is turned by EXIF: annotate the turned image)" if size[::-1] == record.size else ""
        return f"{_show(record.path, root)}: annotated as {_size(record.size)}, the image is {_size(size)}{turned}"

    report.errors += [problem for problem in _parallel(look, records) if problem]


def _parallel(work: Callable, items: list) -> list:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(work, items))


def _size(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]}"


def _copies(dataset: DataSet, paths: list[Path], report: CheckReport) -> None:
    """Same bytes twice: an error across train / val / test, a warning inside one of them."""
    content = _contents(paths)
    where: dict[str, dict[int, set[Path]]] = defaultdict(lambda: defaultdict(set))
    for split in dataset.splits:
        group = next(number for number, splits in enumerate(SEPARATE) if split in splits)
        for record in dataset.split(split):
            where[content[record.path]][group].add(record.path)
    leaks: dict[tuple[int, int], list[str]] = defaultdict(list)
    twice: dict[int, list[str]] = defaultdict(list)
    for groups in where.values():
        for one, other in combinations(sorted(groups), 2):
            leaks[one, other].append(
                f"{_show(min(groups[one]), dataset.root)} = {_show(min(groups[other]), dataset.root)}"
            )
        for group, files in groups.items():
            if len(files) > 1:
                twice[group].append(" = ".join(_show(path, dataset.root) for path in sorted(files)[:2]))
    for (one, other), found in sorted(leaks.items()):
        report.errors.append(
            f"leak: {len(found)} images of {SEPARATE[other][0]} are also in {SEPARATE[one][0]}: {_some(found)}"
        )
    for group, found in sorted(twice.items()):
        report.warnings.append(f"{len(found)} images are in {SEPARATE[group][0]} more than once: {_some(found)}")


def _contents(paths: list[Path]) -> dict[Path, str]:
    """{path: what identifies its bytes}; only files of equal length are read."""
    sizes = {path: path.stat().st_size if path.exists() else -1 for path in paths}
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path, size in sizes.items():
        by_size[size].append(path)
    rivals = [path for size, group in by_size.items() if len(group) > 1 and size >= 0 for path in group]
    digests = dict(zip(rivals, _parallel(_sha256, rivals), strict=True))
    return {path: digests.get(path, str(path)) for path in paths}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _thin_classes(dataset: DataSet, k: int, report: CheckReport) -> None:
    for split, classes in (
        ("train", range(dataset.num_base)),
        ("support", range(dataset.num_base, len(dataset.names))),
    ):
        pool = split if dataset.has(split) else "train"
        if not classes or not dataset.has(pool):
            continue
        objects, _ = _counts(dataset.split(pool), len(dataset.names))
        thin = [f"{dataset.names[c]} {objects[c]}" for c in classes if objects[c] < k]
        if thin:
            report.warnings.append(f"{len(thin)} classes have fewer than {k} instances in {pool}: {_some(thin)}")


def _some(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (", ..." if len(items) > SHOWN else "")


def _show(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
