# SPDX-License-Identifier: AGPL-3.0-or-later
"""A support folder: support/<class>/*.jpg, the image being the object or with a same-named box file, or a json."""

import logging
import os
from pathlib import Path
from xml.etree.ElementTree import ParseError

from fsdet.data import coco, voc, yolo
from fsdet.data.images import is_image
from fsdet.data.report import Report
from fsdet.data.root import Root
from fsdet.data.table import Table
from fsdet.errors import DataError, explain
from fsdet.names import class_folders
from fsdet.types import ImageRecord

log = logging.getLogger("fsdet")
NO_CLASS = (".", "__MACOSX")  # folders that archives and file managers leave
BOX_FILES = (".txt", ".xml")
CLASS_LIST = "classes.txt"  # labelling tools leave it beside the boxes
_LAYOUT = "put images into DIR/<class>/, with a box file of the same name where the object does not fill the image"


def support_folder(folder: str | Path) -> tuple[tuple[str, ...], list[ImageRecord]]:
    """(class names, records): labels index the names, every record has at least one box.

    Class names are those of the subfolders in alphabetical order, or a json's categories that have boxes. A box file
    in support/<class>/ is YOLO text (its class numbers are not needed, but must agree; a line may end in a score, as
    `fsdet predict --txt` writes it) or VOC xml (its objects called <class>, or all when they have one other name). What
    was dropped is logged as a warning, or told with the error.

    Raises:
        DataError: nothing to read, or a class without a usable image.
    """
    folder = Path(folder)
    if not folder.exists():
        raise DataError(explain("a support folder", "nothing there", str(folder), _LAYOUT))
    report = Report()
    root = Root(folder.parent if folder.is_file() else folder, report)
    classes = class_folders(e for e in root.folder.iterdir() if e.is_dir() and not e.name.startswith(NO_CLASS))
    jsons = [path for name, path in root.files(root.folder).items() if name.lower().endswith(".json")]
    if folder.is_file():
        names, records = _from_json(folder.resolve(), root, report)
    elif len(jsons) == 1:
        names, records = _from_json(Path(jsons[0]), root, report)
    else:
        names, records = _from_folders(classes, root, report)
        _tell_passed_over(classes, root, report)
        for path in jsons:
            report.add("one of several jsons, none of which is read", root.show(path), "name one as the support")
    missing = [name for label, name in enumerate(names) if not any(label in record.labels for record in records)]
    if missing or not names:
        got = f"none for {', '.join(missing)}" if missing else "no class"
        told = f"{got}\n{report}" if len(report) else got
        raise DataError(explain("a usable image of every class", told, str(folder), _LAYOUT))
    if len(report):  # else the error has told it
        log.warning("%s:\n%s", folder, report)
    return names, records


def _from_json(path: Path, root: Root, report: Report) -> tuple[tuple[str, ...], list[ImageRecord]]:
    table = coco.read(path, root, report)
    labelled = table.labelled()
    names = tuple(name for name in table.names if name in labelled)
    records = table.records({name: label for label, name in enumerate(names)}, report, exhaustive=False)
    return names, [record for record in records if len(record.labels)]


def _from_folders(classes: dict[str, Path], root: Root, report: Report) -> tuple[tuple[str, ...], list[ImageRecord]]:
    records: list[ImageRecord] = []
    for label, (name, folder) in enumerate(classes.items()):
        table = Table([name])
        files = root.files(folder)
        stems = {os.path.splitext(file)[0]: file for file in files if not is_image(file)}
        pictures = [file for file in files if is_image(file)]
        table.paths = [files[file] for file in pictures]
        table.sizes = [None] * len(pictures)
        table.measure(root, report)
        for index, file in enumerate(pictures):
            boxes = stems.get(os.path.splitext(file)[0])
            if table.sizes[index]:
                _objects(files[boxes] if boxes else None, index, table, root, report)
        rows = table.records({name: label}, report, exhaustive=False)
        records += [record for record in rows if len(record.labels)]
    return tuple(classes), records


def _tell_passed_over(classes: dict[str, Path], root: Root, report: Report) -> None:
    """Report what looks like a shot and lies where none is read."""
    for file in root.files(root.folder):
        if is_image(file):
            report.add("image outside the class folders", file)
    for folder in classes.values():
        if not root.contains(folder):
            continue
        files = root.files(folder)
        pictures = {os.path.splitext(file)[0] for file in files if is_image(file)}
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            stem, suffix = os.path.splitext(entry.name)
            where = root.show(entry.path)
            if entry.name.startswith(NO_CLASS):
                continue
            if entry.is_symlink() and not os.path.exists(entry.path):
                report.add("missing image", where, "a link to nothing")
            elif entry.is_dir():
                report.add("folder in a class folder", where)
            elif suffix.lower() in BOX_FILES and stem not in pictures and entry.name != CLASS_LIST:
                report.add("label file without an image", where)


def _objects(file: str | None, index: int, table: Table, root: Root, report: Report) -> None:
    """The boxes of one image: the whole of it without a box file."""
    where = root.show(file or table.paths[index])
    height, width = table.sizes[index] or (0, 0)
    if file is not None and file.lower().endswith(".xml"):
        _xml(file, index, table, where, report)
    elif file is not None and file.lower().endswith(".txt"):
        boxes = Table([str(number) for number in range(yolo.MAX_CLASSES)], sizes=[table.sizes[index]])
        yolo.read_labels(file, 0, boxes, root, report, scored=True)
        if len(set(boxes.label)) > 1:
            raise DataError(
                explain(
                    f"boxes of one class in folder '{table.names[0]}'",
                    f"class numbers {sorted(set(boxes.label))}",
                    where,
                    "keep that class's lines",
                )
            )
        for box, place in zip(boxes.boxes, boxes.where, strict=True):
            table.add(box, index, 0, False, place)
    else:
        table.add((0, 0, width, height), index, 0, False, where)


def _xml(file: str, index: int, table: Table, where: str, report: Report) -> None:
    try:
        found = voc.objects(voc.parse_xml(file), where, report)
    except (ParseError, ValueError, LookupError) as error:
        report.add("unreadable annotation file", where, str(error).split(":")[0])
        return
    names = {name for name, _, _ in found}
    own = next((name for name in names if name.casefold() == table.names[0].casefold()), None)
    if own is None and len(names) > 1:
        raise DataError(
            explain(
                f"objects called '{table.names[0]}', as the folder",
                f"{', '.join(sorted(names))}",
                where,
                "rename the objects, or keep one kind",
            )
        )
    for number, (name, box, difficult) in enumerate(found, 1):
        if own in (None, name):
            table.add(box, index, 0, difficult, f"{where}: object {number}")
