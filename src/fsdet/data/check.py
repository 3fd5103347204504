# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is wrong with a data set before a training finds out: damage, sizes, duplicates, leaks, thin classes."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import cv2
import numpy as np

from fsdet.data.frames import frame_of
from fsdet.data.images import image_size, read_rgb
from fsdet.data.sources import DataSet
from fsdet.errors import DataError, are, counted
from fsdet.types import ImageRecord

SHOWN = 5
LISTED = 30  # faults that are printed
SMALL = 16  # px, side of the copies by which pictures are compared
ALIKE = 3.0  # of 255, mean difference of small copies: up to 2.7 saved again, 7.4 between the nearest of the demo set
SEPARATE = ("train", "support"), ("val",), ("test",)  # groups that may not share an image


@dataclass
class CheckReport:
    """errors make a data set unfit (exit 2); warnings do not. table: objects and images of each class per split.

    places: `file:line: what is at fault (what was done)` of every faulty label and file that the reader met.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    loaded: str = ""
    table: str = ""

    @property
    def ok(self) -> bool:
        return not self.errors

    def __str__(self) -> str:
        lines = [self.table, "", "as loaded:", *(f"  {line}" for line in self.loaded.splitlines())]
        if self.places:
            rest = len(self.places) - LISTED
            more = [f"  and {rest} more; --list FILE writes all of them"] if rest > 0 else []
            lines += ["", f"faults: {len(self.places)}", *(f"  {row}" for row in self.places[:LISTED]), *more]
        for title, rows in (("errors", self.errors), ("warnings", self.warnings)):
            lines += ["", f"{title}: {len(rows)}", *(f"  {row}" for row in rows)]
        return "\n".join(lines)


def check(dataset: DataSet, deep: bool = False, k: int = 10, policy: str = "drop") -> CheckReport:
    """Check every image and annotation of the loaded splits.

    Args:
        deep: decode every image completely, not just its header: only that finds a truncated one, and one picture in
            two files whose bytes differ.
        k: shots that are wanted of each class in split `support` (or `train` without one).
        policy: "drop": faulty labels and files are a warning, as training drops, clips or mends them; "fail": an error.
    """
    report = CheckReport(loaded=str(dataset.report), table=class_table(dataset), places=dataset.report.places())
    if dataset.report.faults:
        told = report.errors if policy == "fail" else report.warnings
        done = ", ".join(f"{count} {how}" for how, count in dataset.report.done.items())
        told.append(f"{counted(dataset.report.faults, 'fault')} of labels or files: {done}; see 'as loaded'")
    unique = {record.path: record for split in dataset.splits for record in dataset.split(split)}
    looks = _images(list(unique.values()), deep, dataset.root, report)
    content = _contents(list(unique)) | {path: look.digest for path, look in looks.items()}
    _copies(dataset, content, report)
    _alike(dataset, looks, content, report)
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
    totals = {split: len({record.path for record in dataset.split(split)}) for split in splits}
    cells = [f"{objects.sum():6d} /{totals[split]:5d}" for split, (objects, _) in counts.items()]
    return "\n".join([*lines, f"{'all':{wide}s} {'':5s} {' '.join(cells)}"])


def _counts(records: Iterable[ImageRecord], classes: int) -> tuple[np.ndarray, np.ndarray]:
    """([C] objects, [C] images with any); an image that two sources share is one image."""
    objects, having = np.zeros(classes, int), [set() for _ in range(classes)]
    for record in records:
        own = np.bincount(record.labels[~record.crowd], minlength=classes)
        objects += own
        for label in np.flatnonzero(own).tolist():
            having[label].add(record.path)
    return objects, np.array([len(paths) for paths in having], int)


@dataclass(frozen=True, eq=False)
class Look:
    """What a decoded image is known by: a digest of its pixels, and a small grey copy, [SMALL, SMALL] float32."""

    digest: str
    small: np.ndarray


def look_at(pixels: np.ndarray) -> Look:
    """The Look of uint8 [H, W, 3] RGB."""
    digest = hashlib.sha256(str(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()
    small = cv2.resize(pixels, (SMALL, SMALL), interpolation=cv2.INTER_AREA)
    return Look(digest, small.astype(np.float32).mean(2))


def _images(records: list[ImageRecord], deep: bool, root: Path, report: CheckReport) -> dict[Path, Look]:
    """Damage and sizes into the report; the looks of what was decoded, which is nothing unless `deep`."""
    looks: dict[Path, Look] = {}

    def look(record: ImageRecord) -> str | None:
        try:
            if deep:
                pixels = read_rgb(record.path)
                size, looks[record.path] = pixels.shape[:2], look_at(pixels)
            else:
                size = image_size(record.path)
        except DataError as error:
            return str(error)
        if tuple(size) == record.size:
            return None
        turned = " (it is turned by EXIF: annotate the turned image)" if size[::-1] == record.size else ""
        return f"{_show(record.path, root)}: annotated as {_size(record.size)}, the image is {_size(size)}{turned}"

    report.errors += [problem for problem in _parallel(look, records) if problem]
    return looks


def _parallel(work: Callable, items: list) -> list:
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(work, items))


def _size(size: tuple[int, ...]) -> str:
    return f"{size[1]} x {size[0]}"


def _homes(dataset: DataSet) -> dict[Path, list[str]]:
    """{image: the splits that have it}, each image once."""
    homes: dict[Path, list[str]] = {}
    for split in dataset.splits:
        for path in dict.fromkeys(record.path for record in dataset.split(split)):
            homes.setdefault(path, []).append(split)
    return homes


def _groups(splits: Iterable[str]) -> set[int]:
    """Which of SEPARATE the splits are in."""
    return {number for number, group in enumerate(SEPARATE) for split in splits if split in group}


def _named(group: int, paths: Iterable[Path], homes: Mapping[Path, list[str]]) -> str:
    """The splits of a group that have any of the images."""
    having = {split for path in paths for split in homes[path]}
    return " and ".join(split for split in SEPARATE[group] if split in having)


def _copies(dataset: DataSet, content: Mapping[Path, str], report: CheckReport) -> None:
    """The same content twice: an error across train / val / test, a warning inside one of them."""
    homes = _homes(dataset)
    where: dict[str, dict[int, set[Path]]] = defaultdict(lambda: defaultdict(set))
    for path, splits in homes.items():
        for group in _groups(splits):
            where[content[path]][group].add(path)
    leaks: dict[tuple[int, int, str], list[str]] = defaultdict(list)  # a row for each image of the second group
    twice: dict[tuple[int, str], list[str]] = defaultdict(list)
    for groups in where.values():
        for one, other in combinations(sorted(groups), 2):
            first = _show(min(groups[one]), dataset.root)
            rows = [f"{first} = {_show(path, dataset.root)}" for path in sorted(groups[other])]
            leaks[one, other, _named(one, groups[one], homes)] += rows
        for group, files in groups.items():
            if len(files) > 1:
                row = " = ".join(_show(path, dataset.root) for path in sorted(files)[:2])
                twice[group, _named(group, files, homes)].append(row)
    for (_, other, name), found in sorted(leaks.items()):
        told = f"leak: {counted(len(found), 'image')} of {SEPARATE[other][0]} {are(len(found))} also in {name}"
        report.errors.append(f"{told}: {_some(found)}")
    for (_, name), found in sorted(twice.items()):
        told = f"{counted(len(found), 'image')} {are(len(found))} in {name} more than once"
        report.warnings.append(f"{told}: {_some(found)}")


def _alike(dataset: DataSet, looks: Mapping[Path, Look], content: Mapping[Path, str], report: CheckReport) -> None:
    """Pictures saved again, in another size or quality, that are in two of train / val / test: a warning."""
    homes = _homes(dataset)
    groups = {path: max(_groups(splits)) for path, splits in homes.items() if path in looks}
    found: dict[tuple[int, int, str], list[tuple[Path, Path]]] = defaultdict(list)
    for pair in _near(list(groups), looks):
        one, other = sorted(pair, key=lambda path: groups[path])
        if groups[one] != groups[other] and content[one] != content[other]:
            found[groups[one], groups[other], _named(groups[one], [one], homes)].append((one, other))
    for (_, group, name), pairs in sorted(found.items()):
        count = len({other for _, other in pairs})  # an image may look like several
        rows = sorted(f"{_show(one, dataset.root)} ~ {_show(other, dataset.root)}" for one, other in pairs)
        title = f"{counted(count, 'image')} of {SEPARATE[group][0]} look{'s' * (count == 1)} like images of {name}"
        report.warnings.append(f"{title}, saved again: {_some(rows)}")


def _near(paths: list[Path], looks: Mapping[Path, Look]) -> Iterator[tuple[Path, Path]]:
    """Pairs whose small copies differ by less than ALIKE: by their mean they differ by no more, so most are not met."""
    if not paths:
        return
    small = np.stack([looks[path].small.ravel() for path in paths])
    order = np.argsort(small.mean(1), kind="stable")
    small, mean = small[order], small.mean(1)[order]
    last = np.searchsorted(mean, mean + ALIKE)
    for i in range(len(paths)):
        others = np.abs(small[i + 1 : last[i]] - small[i]).mean(1)
        for j in np.flatnonzero(others < ALIKE).tolist():
            yield paths[order[i]], paths[order[i + 1 + j]]


def _contents(paths: list[Path]) -> dict[Path, str]:
    """{path: what identifies its bytes}; only files of equal length are read. A frame is its video's and its number."""
    frames = {path: frame for path in paths if (frame := frame_of(path))}
    if frames:
        films = _contents(list(dict.fromkeys(video for video, _ in frames.values())))
        rest = [path for path in paths if path not in frames]
        return _contents(rest) | {path: f"{films[video]} frame {n}" for path, (video, n) in frames.items()}
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
            have = f"{counted(len(thin), 'class', 'es')} {'has' if len(thin) == 1 else 'have'}"
            report.warnings.append(f"{have} fewer than {counted(k, 'instance')} in {pool}: {_some(thin)}")


def _some(items: list[str]) -> str:
    return ", ".join(items[:SHOWN]) + (", ..." if len(items) > SHOWN else "")


def _show(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
