# SPDX-License-Identifier: AGPL-3.0-or-later
"""COCO json: images, categories, annotations with xywh px boxes; file names start at the json's own folder."""

import json
from pathlib import Path
from typing import Any

from fsdet.data.report import Report
from fsdet.data.root import Root
from fsdet.data.shapes import is_shape
from fsdet.data.table import Table
from fsdet.errors import DataError, counted, explain
from fsdet.names import composed, repeated

MAX_BYTES = 2 << 30
MAX_SIDE = 1 << 20  # px; a larger width or height is no size


def read(path: Path, root: Root, report: Report, images: Path | None = None, shapes: bool = False) -> Table:
    """Objects of a COCO json. `images`: the folder where file names start when it is not the json's own.

    shapes: keep the outlines too, which take far more memory than the boxes.

    Raises:
        DataError: the file is no COCO json, or none of its images exists.
    """
    document = _document(path)
    where = root.show(path)
    categories = _categories(document["categories"], where, report)
    names = list(dict.fromkeys(categories.values()))
    table = Table(names, origin=f"{where}: annotation ", shapes={} if shapes else None)
    ids = _images(document["images"], _folders(path, root, images), where, table, root, report)
    table.measure(root, report)
    position = {name: index for index, name in enumerate(names)}
    labels = {key: position[name] for key, name in categories.items()}
    _annotations(document["annotations"], ids, labels, table, report)
    return table


def _document(path: Path) -> dict[str, list]:
    if path.stat().st_size > MAX_BYTES:
        raise DataError(
            explain("a json of at most 2 GiB", f"{path.stat().st_size:,} bytes", str(path), "split the file")
        )
    try:
        document = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(explain("a COCO json", f"unreadable text ({error})", str(path), "export it again")) from error
    keys = ("images", "annotations", "categories")
    found: object = type(document).__name__
    if isinstance(document, dict):  # the keys, and beside one of the three that is no list what it is
        found = [f"{key} ({type(value).__name__})" if key in keys and not isinstance(value, list) else key
                 for key, value in sorted(document.items())]  # fmt: skip
    if not isinstance(document, dict) or not all(isinstance(document.get(key), list) for key in keys):
        raise DataError(
            explain(
                "a COCO json with lists 'images', 'annotations', 'categories'",
                str(found),
                str(path),
                "export the data as COCO detection (not as results)",
            )
        )
    return {key: document[key] for key in keys}


def _categories(rows: list, where: str, report: Report) -> dict[Any, str]:
    names: dict[Any, str] = {}
    for number, row in enumerate(rows):
        try:
            names[row["id"]] = str(row["name"])  # as it is written, until it is known which occur twice
        except (KeyError, TypeError):
            report.add("malformed annotation", f"{where}: category {number}")
    if not names:
        raise DataError(explain("at least one category", "none", where, "export the categories too"))
    for name, times in repeated(list(names.values())).items():
        report.add("class name given twice", where, f"'{name}' {times}")
    return {key: composed(name) for key, name in sorted(names.items(), key=lambda item: str(item[0]).zfill(12))}


def _folders(path: Path, root: Root, images: Path | None) -> list[Path]:
    """Where file names may start, first choice first; the published COCO layout keeps its jsons in annotations/."""
    if images is not None:
        return [images]
    near = [path.parent]
    for parent in (path.parent, path.parent.parent):
        near += [parent / "images", parent / path.stem.rpartition("_")[2]]
    return [folder for folder in near if folder == path.parent or (folder.is_dir() and root.contains(folder))]


def _images(rows: list, folders: list[Path], where: str, table: Table, root: Root, report: Report) -> dict[Any, int]:
    """{image id: index into the table}. Sizes are the json's, so that no image is opened for them."""
    ids: dict[Any, int] = {}
    for number, row in enumerate(rows):
        try:
            key, name = row["id"], row["file_name"]
            again = key in ids
        except (KeyError, TypeError):
            report.add("malformed annotation", f"{where}: image {number}")
            continue
        place = f"{where}: image {key}"
        if again or not isinstance(name, str):
            report.add("duplicate image id" if again else "malformed annotation", place)
            continue
        file = next((file for folder in folders if (file := root.find(folder, name, place))), None)
        ids[key] = len(table.paths) if file else -1
        if file is None:
            report.add("missing image", f"{place} '{name}'")
            continue
        table.paths.append(file)
        table.sizes.append(_size(row, place, report))
    if rows and not table.paths:
        looked = ", ".join(str(folder) for folder in folders)
        raise DataError(
            explain(
                f"the {counted(len(rows), 'image')} that it lists",
                f"none of them in {looked}",
                where,
                "put the json beside its images, or give `images:` with the source",
            )
        )
    return ids


def _size(row: dict, place: str, report: Report) -> tuple[int, int] | None:
    height, width = row.get("height"), row.get("width")
    if all(isinstance(side, int | float) and 0 < side < MAX_SIDE and side == int(side) for side in (height, width)):
        return int(height), int(width)
    report.add("size missing or wrong in the annotation", place)
    return None


def _annotations(rows: list, ids: dict[Any, int], labels: dict[Any, int], table: Table, report: Report) -> None:
    unread, absent = [], []  # objects whose outline is none
    for number, row in enumerate(rows):
        where = number
        try:
            where = row.get("id", number)
            image = ids.get(row["image_id"])
            label = labels.get(row["category_id"])
            x, y, width, height = map(float, row["bbox"])
            crowd = bool(row.get("iscrowd", 0) or row.get("ignore", 0))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            report.add("malformed annotation", f"{table.origin}{where}")
            continue
        if image is None or label is None:
            kind = "annotation of an unknown image" if image is None else "unknown class"
            report.add(kind, f"{table.origin}{where}")
        elif image >= 0:
            outline = row.get("segmentation") if table.shapes is not None else None
            if outline and is_shape(outline):
                table.shapes[len(table.boxes)] = outline
            elif table.shapes is not None:
                (unread if outline else absent).append(where)
            table.add((x, y, x + width, y + height), image, label, crowd, where)
    for where in unread + (absent if table.shapes else []):  # a json of boxes alone lacks none
        report.add("no outline that can be read", f"{table.origin}{where}")
