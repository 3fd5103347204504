# SPDX-License-Identifier: AGPL-3.0-or-later
"""Write a data set in one of the three formats, with a data.yaml that load() reads back to the same records."""

import json
import os
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from fsdet.data import datayaml
from fsdet.data.frames import frame_of, read_frame
from fsdet.data.report import Report
from fsdet.data.sources import DataSet
from fsdet.errors import DataError, counted, explain
from fsdet.files import readable
from fsdet.types import ImageRecord

Named = list[tuple[str, ImageRecord]]  # (file name in the split's folder, record)


def convert(dataset: DataSet, out: str | Path, fmt: str, link: bool = False) -> Report:
    """Write all loaded splits below `out` as "coco", "yolo" or "voc"; returns what the format cannot express.

    COCO keeps outlines, where `dataset` was read with them.
    link: images are hard-linked instead of copied where the file system allows it.

    Raises:
        DataError: another format, or `out` is not empty.
    """
    writers: dict[str, Callable[[Named, str, Path, Sequence[str], Report], Path]] = {
        "coco": _coco,
        "yolo": _yolo,
        "voc": _voc,
    }
    out = Path(out)
    if fmt not in writers:
        raise DataError(explain(f"one of {', '.join(writers)}", f"'{fmt}'", "format", "name one of them"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(explain("a new or empty folder", "one with files in it", str(out), "name another folder"))
    report = Report()
    document: dict[str, object] = {}
    for split in dataset.splits:
        named = _named(dataset.split(split))
        images = out / split / "JPEGImages" if fmt == "voc" else out / "images" / split
        images.mkdir(parents=True)
        for name, record in named:
            _place(record.path, images / name, link)
        if partly := sum(record.exhaustive is not None for record in dataset.split(split)):
            told = f"that {counted(partly, 'image')} may show unlabelled objects of some classes"
            report.add("cannot be expressed", split, f"{told}: they count as labelled for all")
        if fmt != "coco" and (lost := sum(shape is not None for _, record in named for shape in record.shapes)):
            report.add("cannot be expressed", split, f"{counted(lost, 'outline')}, whose boxes are kept")
        document[split] = writers[fmt](named, split, out, dataset.names, report).relative_to(out).as_posix()
    document |= {"base": list(dataset.base), "novel": list(dataset.novel)}
    document |= {"names": list(dataset.names)} if fmt == "yolo" else {}
    datayaml.write(out / "data.yaml", document)
    return report


def _named(records: Sequence[ImageRecord]) -> Named:
    """File names that differ in their stem, letter case aside: YOLO and VOC label files are named by it."""
    used: set[str] = set()
    named = []
    for record in records:
        stem, suffix = os.path.splitext(readable(record.path.name))
        name, number = stem, 1
        while name.casefold() in used:
            number += 1
            name = f"{stem}_{number}"
        used.add(name.casefold())
        named.append((name + suffix, record))
    return named


def _place(source: Path, target: Path, link: bool) -> None:
    if frame := frame_of(source):
        Image.fromarray(read_frame(*frame)).save(target)
        return
    if link:
        try:
            os.link(source.resolve(), target)
            return
        except OSError:
            pass  # another file system, or one without links: a copy serves
    shutil.copyfile(source, target)


def _objects(record: ImageRecord) -> zip:
    """((x1, y1, x2, y2), label, crowd) of every box, as plain numbers."""
    return zip(record.boxes.astype(float).tolist(), record.labels.tolist(), record.crowd.tolist(), strict=True)


def _coco(named: Named, split: str, out: Path, names: Sequence[str], report: Report) -> Path:
    images, annotations = [], []
    for number, (name, record) in enumerate(named, 1):
        height, width = record.size
        images.append({"id": number, "file_name": f"images/{split}/{name}", "width": width, "height": height})
        shapes = record.shapes or [None] * len(record.boxes)
        for ((x1, y1, x2, y2), label, crowd), shape in zip(_objects(record), shapes, strict=True):
            box = [round(value, 3) for value in (x1, y1, x2 - x1, y2 - y1)]
            row = {"id": len(annotations) + 1, "image_id": number, "category_id": label + 1, "bbox": box,
                   "area": round(box[2] * box[3], 2), "iscrowd": int(crowd)}  # fmt: skip
            annotations.append(row if shape is None else {**row, "segmentation": shape})
    categories = [{"id": label, "name": name} for label, name in enumerate(names, 1)]
    file = out / f"{split}.json"
    document = {"images": images, "annotations": annotations, "categories": categories}
    file.write_text(json.dumps(document, ensure_ascii=False), "utf-8")
    return file


def _yolo(named: Named, split: str, out: Path, names: Sequence[str], report: Report) -> Path:
    labels = out / "labels" / split
    labels.mkdir(parents=True)
    for name, record in named:
        height, width = record.size
        lines = []
        for (x1, y1, x2, y2), label, crowd in _objects(record):
            if crowd:
                report.add("cannot be expressed", f"{split}/{name}", "crowd or difficult object in YOLO")
                continue
            shares = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
            lines.append(" ".join([str(label), *(f"{share:.8f}" for share in shares)]))
        (labels / f"{os.path.splitext(name)[0]}.txt").write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return out / "images" / split


def _voc(named: Named, split: str, out: Path, names: Sequence[str], report: Report) -> Path:
    folder = out / split / "Annotations"
    folder.mkdir(parents=True)
    for name, record in named:
        root = ET.Element("annotation")
        ET.SubElement(root, "filename").text = name
        size = ET.SubElement(root, "size")
        for key, value in (("width", record.size[1]), ("height", record.size[0]), ("depth", 3)):
            ET.SubElement(size, key).text = str(value)
        for (x1, y1, x2, y2), label, crowd in _objects(record):
            item = ET.SubElement(root, "object")
            ET.SubElement(item, "name").text = names[label]
            ET.SubElement(item, "difficult").text = str(int(crowd))
            box = ET.SubElement(item, "bndbox")
            for key, value in (("xmin", x1 + 1), ("ymin", y1 + 1), ("xmax", x2), ("ymax", y2)):
                ET.SubElement(box, key).text = f"{value:.3f}".rstrip("0").rstrip(".")
        ET.indent(root)
        ET.ElementTree(root).write(folder / f"{os.path.splitext(name)[0]}.xml", encoding="utf-8")
    return out / split
