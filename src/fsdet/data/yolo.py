# SPDX-License-Identifier: AGPL-3.0-or-later
"""YOLO text labels: `class cx cy w h` in shares of the image, one file per image in labels/ beside images/."""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from fsdet.data.datayaml import class_names, read_mapping
from fsdet.data.images import is_image
from fsdet.data.report import Report
from fsdet.data.root import Root
from fsdet.data.table import Table
from fsdet.errors import DataError, explain
from fsdet.names import composed, repeated

MAX_BYTES = 8 << 20  # of a label file
MAX_CLASSES = 100_000
ROUNDING = 1e-3  # how far above 1 a share may be by rounding


def read(path: Path, root: Root, report: Report, names: Sequence[str] | None = None) -> Table:
    """Objects of a folder of images (or of a txt that lists images), labels beside them or in labels/ for images/.

    Class names: `names`, else the nearest data.yaml or classes.txt from the folder up to the root.

    Raises:
        DataError: no class names, or no images.
    """
    files = _listed(path, root, report) if path.is_file() else _found(path, root)
    if not files:
        raise DataError(explain("images", "none", root.show(path), "name the folder that holds the images"))
    names = list(names or _nearest_names(path, root))
    for name, times in repeated(names).items():
        report.add("class name given twice", root.show(path), f"'{name}' {times}")
    table = Table(list(map(composed, names)))
    table.paths = files
    table.sizes = [None] * len(files)
    table.measure(root, report)
    used = set()
    for index, (file, label) in enumerate(zip(files, _label_files(files, root, report), strict=True)):
        if label is None:
            report.add("no label file", root.show(file))
        elif table.sizes[index]:
            used.add(label)
            read_labels(label, index, table, root, report)
    for folder in {os.path.dirname(label) for label in used} if path.is_dir() else ():
        for name, label in root.files(folder).items():
            if name.lower().endswith(".txt") and label not in used and name != "classes.txt":
                report.add("label file without an image", root.show(label))
    return table


def _found(path: Path, root: Root) -> list[str]:
    folder = path / "images" if (path / "images").is_dir() and (path / "labels").is_dir() else path
    return [file for _, files in root.walk(folder) for name, file in files.items() if is_image(name)]


def _listed(path: Path, root: Root, report: Report) -> list[str]:
    """Ultralytics's train.txt: one image path a line, starting at the list's own folder."""
    files = []
    for number, line in enumerate(path.read_text("utf-8-sig", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{root.show(path)}:{number}"
        file = root.find(path.parent, os.path.normpath(line.strip()), where)
        if file:
            files.append(file)
        else:
            report.add("missing image", where)
    return files


def _label_files(images: Sequence[str], root: Root, report: Report) -> list[str | None]:
    """The label file of each image: of its own stem, else of one that differs in letter case and is no other image's,
    as a file system that tells no case apart leaves them."""
    found = [_label_file(image, lambda folder, name: root.files(folder).get(name)) for image in images]
    taken = set(found)
    for index, image in enumerate(images):
        other = None if found[index] else _label_file(image, root.any_case)
        if other and other not in taken:
            report.add("letter case of a file name", root.show(other))
            taken.add(other)
            found[index] = other
    return found


def _label_file(image: str, find: Callable[[str, str], str | None]) -> str | None:
    folder, name = os.path.split(image)
    label = os.path.splitext(name)[0] + ".txt"
    head, inside, tail = f"{folder}/".rpartition("/images/")
    return (find(os.path.normpath(f"{head}/labels/{tail}"), label) if inside else None) or find(folder, label)


def _nearest_names(path: Path, root: Root) -> list[str]:
    folder = path if path.is_dir() else path.parent
    while root.contains(folder):
        files = root.files(folder)
        for name in ("data.yaml", "data.yml", "dataset.yaml"):
            written = read_mapping(Path(files[name])).get("names") if name in files else None
            if isinstance(written, list | dict) and written:
                return _by_number(written, f"{root.show(files[name])}: names")
        for name in ("classes.txt", "obj.names"):
            if name in files:
                return [line.strip() for line in Path(files[name]).read_text("utf-8-sig").strip().splitlines()]
        folder = folder.parent
    raise DataError(
        explain(
            "class names for YOLO labels",
            "none in the data YAML, data.yaml or classes.txt",
            root.show(path),
            "add `names: [..]` in the order of the class numbers"
            + (", or read folders named after their classes with --task classifier" if _of_folders(path) else ""),
        )
    )


def _by_number(names: list | dict, where: str) -> list[str]:
    """Names in the order of their class numbers. Raises DataError where a number has none."""
    problems: list[str] = []
    listed = class_names(names, where, problems) if isinstance(names, dict) else names
    if listed is None:
        raise DataError("\n".join(problems))
    return list(map(str, listed))


def _of_folders(path: Path) -> bool:
    """Whether it looks like images sorted into folders of their classes."""
    inner = [entry for entry in path.iterdir() if entry.is_dir() and not entry.is_symlink()] if path.is_dir() else []
    return len(inner) > 1 and all(any(is_image(file.name) for file in entry.iterdir()) for entry in inner)


def read_labels(label: str, index: int, table: Table, root: Root, report: Report, scored: bool = False) -> None:
    """Add the objects of one label file to image `index` of the table, whose size must be known.

    scored: whether a line may end in a score, as those of detections do; it is not kept.
    """
    where = root.show(label)
    if os.path.getsize(label) > MAX_BYTES:
        report.add("unreadable annotation file", f"{where} (larger than {MAX_BYTES >> 20} MiB)")
        return
    with open(label, "rb") as file:
        text = file.read()
    if text.startswith(b"\xef\xbb\xbf"):
        report.add("byte order mark", where)
        text = text[3:]
    rows = [(number, line.split()) for number, line in enumerate(text.decode("utf-8", "replace").splitlines(), 1)]
    rows = [(number, columns) for number, columns in rows if columns]
    if not rows:
        report.add("empty label file", where)
    height, width = table.sizes[index]
    for number, columns in rows:
        place = f"{where}:{number}"
        parsed = _row(columns, len(table.names), place, report, scored)
        if parsed:
            label_index, (x, y, w, h) = parsed
            box = ((x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height)
            table.add(box, index, label_index, False, place)


def _row(columns: list[str], classes: int, place: str, report: Report,
         scored: bool) -> tuple[int, tuple[float, ...]] | None:  # fmt: skip
    """(class, (cx, cy, w, h)) of one line; an odd number of seven or more columns is a polygon and becomes its box."""
    if scored and len(columns) == 6:
        *columns, score = columns
        if not _is_share(score):
            report.add("wrong number of columns", place, "6, the last of which is no score from 0 to 1")
            return None
    polygon = len(columns) >= 7 and len(columns) % 2 == 1
    if len(columns) != 5 and not polygon:
        report.add("wrong number of columns", place, f"{len(columns)}")
        return None
    try:
        number, *values = map(float, columns)
    except ValueError:
        report.add("not a number", place)
        return None
    kind = _fault(number, values, classes)
    if kind:
        report.add(kind, place)
        return None
    if "." in columns[0] or "e" in columns[0].lower():
        report.add("class written as a decimal", place)
    if polygon:
        report.add("polygon", place, "read as its box")
        xs, ys = values[::2], values[1::2]
        low, high = (min(xs), min(ys)), (max(xs), max(ys))
        values = [(low[0] + high[0]) / 2, (low[1] + high[1]) / 2, high[0] - low[0], high[1] - low[1]]
    return int(number), tuple(values)


def _is_share(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False


def _fault(number: float, values: list[float], classes: int) -> str | None:
    if not all(map(math.isfinite, (number, *values))):
        return "not finite"
    if number != int(number):
        return "class is no whole number"
    if not 0 <= number < classes:
        return "unknown class"
    if min(values) < 0:
        return "negative value"
    return "value above 1" if max(values) > 1 + ROUNDING else None
