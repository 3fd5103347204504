# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pascal VOC: one xml per image, beside it or in Annotations/ for JPEGImages/, lists in ImageSets/Main.

Pixel indices are 1-based and inclusive (VOC development kit): xmin = 1, xmax = W covers the whole width.
"""

import os
import xml.etree.ElementTree as ET
from pathlib import Path

from fsdet.data.images import is_image
from fsdet.data.report import Report
from fsdet.data.root import Root
from fsdet.data.table import Table
from fsdet.errors import DataError, explain
from fsdet.names import composed

MAX_BYTES = 16 << 20  # of an xml file


class _NoDoctype(ET.TreeBuilder):
    """Refuses a document type declaration: without one there are no entities to expand."""

    def doctype(self, name: str, pubid: str | None, system: str | None) -> None:
        raise ET.ParseError("a DOCTYPE, which no annotation needs")


def read(path: Path, root: Root, report: Report, split: str = "") -> Table:
    """Objects of a VOC folder (all xml files, or those of ImageSets/Main/<split>.txt) or of one ImageSets list.

    The image is the one with the xml's stem; <path> and <size> of the xml are not relied upon.

    Raises:
        DataError: no xml file.
    """
    path = _home(path, root)
    xmls, images = _folders(path)
    stems = _stems(path, split, root, report)
    found = {
        os.path.splitext(name)[0]: file for name, file in root.files(xmls).items() if name.lower().endswith(".xml")
    }
    pictures: dict[str, str] = {}
    for name, file in root.files(images).items():
        if is_image(name):
            pictures.setdefault(os.path.splitext(name)[0], file)
    if not found:
        raise DataError(explain("xml files", "none", root.show(xmls), "name the folder that holds them"))
    for stem in sorted(set(pictures) - set(found)) if stems is None else ():
        report.add("image without an xml file", root.show(pictures[stem]))
    table, names = Table([]), {}
    for stem in found if stems is None else stems:
        if stem not in found:
            report.add("missing image", f"{root.show(path)}: no xml for '{stem}'")
        else:
            _image(found[stem], pictures.get(stem), images, names, table, root, report)
    declared = _declared_sizes(table)
    table.measure(root, report)
    for file, size, header in zip(table.paths, declared, table.sizes, strict=True):
        if header and size != header:
            report.add("size missing or wrong in the annotation", root.show(file))
    _sort_names(table, names)
    return table


def parse_xml(file: str | Path) -> ET.Element:
    """The root element; no DOCTYPE, no entities, size capped.

    Raises:
        ET.ParseError: anything else than a plain xml of that kind.
    """
    if os.path.getsize(file) > MAX_BYTES:
        raise ET.ParseError(f"larger than {MAX_BYTES >> 20} MiB")
    return ET.parse(file, ET.XMLParser(target=_NoDoctype())).getroot()


def objects(element: ET.Element, where: str, report: Report) -> list[tuple[str, tuple[float, ...], bool]]:
    """(name, xyxy px from 0, difficult) of every <object> that has them; others are reported."""
    found = []
    for number, item in enumerate(element.findall("object"), 1):
        name = composed(item.findtext("name") or "").strip()
        try:
            x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{key}") or "") for key in ("xmin", "ymin", "xmax", "ymax"))
        except ValueError:
            report.add("not a number", f"{where}: object {number}")
            continue
        if not name:
            report.add("malformed annotation", f"{where}: object {number}", "no name")
            continue
        difficult = (item.findtext("difficult") or "0").strip() not in ("0", "", "false", "False")
        found.append((name, (x1 - 1, y1 - 1, x2, y2), difficult))
    return found


def _home(path: Path, root: Root) -> Path:
    """VOC2007 for VOC2007/JPEGImages; other paths stay."""
    inside = path.name == "Annotations" or (path.name == "JPEGImages" and (path.parent / "Annotations").is_dir())
    return path.parent if inside and root.contains(path.parent) else path


def _folders(path: Path) -> tuple[Path, Path]:
    """(folder of the xml files, folder of the images)."""
    if path.is_file():  # VOC2007/ImageSets/Main/trainval.txt
        path = next(parent.parent for parent in path.parents if parent.name == "ImageSets")
    if (path / "Annotations").is_dir():
        images = next((path / name for name in ("JPEGImages", "images") if (path / name).is_dir()), path)
        return path / "Annotations", images
    return path, path


def _stems(path: Path, split: str, root: Root, report: Report) -> list[str] | None:
    """The listed images, None for all. A class's own list marks images without it by -1; they are left out."""
    file = path if path.is_file() else path / "ImageSets" / "Main" / f"{split}.txt"
    if not file.is_file() or not root.contains(file):
        return None
    rows = [line.split() for line in file.read_text("utf-8-sig", errors="replace").splitlines()]
    if not path.is_file():
        report.add("path", root.show(path), f"only the images of {root.show(file)}")
    return list(dict.fromkeys(row[0] for row in rows if row and row[-1] != "-1"))


def _image(xml: str, image: str | None, images: Path, names: dict, table: Table, root: Root, report: Report) -> None:
    where = root.show(xml)
    try:
        element = parse_xml(xml)
    except (ET.ParseError, ValueError, LookupError) as error:
        report.add("unreadable annotation file", where, str(error).split(":")[0])
        return
    written = (element.findtext("filename") or "").strip()
    if image is None:
        image = root.find(images, written, where) if written else None
    elif written and os.path.splitext(os.path.basename(written))[0] != os.path.splitext(os.path.basename(image))[0]:
        report.add("stale file name", where)
    if image is None:
        report.add("missing image", where)
        return
    size = tuple(element.findtext(f"size/{key}") or "" for key in ("height", "width"))
    table.paths.append(image)
    table.sizes.append(size)  # type: ignore[arg-type]  # text until _declared_sizes
    for number, (name, box, difficult) in enumerate(objects(element, where, report), 1):
        label = names.setdefault(name, len(names))
        table.add(box, len(table.paths) - 1, label, difficult, f"{where}: object {number}")


def _declared_sizes(table: Table) -> list[tuple[int, int] | None]:
    """What the xml files say; the table's sizes are then left to the headers."""
    declared: list[tuple[int, int] | None] = []
    for height, width in table.sizes:  # type: ignore[misc]
        try:
            declared.append((int(float(height)), int(float(width))))
        except (ValueError, OverflowError):
            declared.append(None)
    table.sizes = [None] * len(declared)
    return declared


def _sort_names(table: Table, names: dict[str, int]) -> None:
    table.names = sorted(names)
    rank = {names[name]: index for index, name in enumerate(table.names)}
    table.label = [rank[label] for label in table.label]
