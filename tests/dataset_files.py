# SPDX-License-Identifier: AGPL-3.0-or-later
"""Small data sets on disk, the same two images in three formats; every test breaks what it wants broken."""

import json
import os
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

NAMES = ("cat", "dog")
SIZES = {"a.jpg": (40, 60), "b.jpg": (50, 50)}  # height, width
OBJECTS = {  # name, xyxy px, difficult or crowd
    "a.jpg": [("cat", (10, 5, 30, 25), False), ("dog", (0, 0, 60, 40), False)],
    "b.jpg": [("dog", (5, 10, 45, 35), True)],
}


def image(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng([seed, *path.name.encode()]).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path, quality=95)
    return path


def images(folder: Path, seed: int = 0) -> None:
    for name, size in SIZES.items():
        image(folder / name, size, seed)


def coco_document() -> dict:
    document: dict = {"images": [], "annotations": [],
                      "categories": [{"id": 7, "name": "cat"}, {"id": 90, "name": "dog"}]}  # fmt: skip
    for number, (name, rows) in enumerate(OBJECTS.items(), 100):
        height, width = SIZES[name]
        document["images"].append({"id": number, "file_name": name, "height": height, "width": width})
        for label, (x1, y1, x2, y2), crowd in rows:
            box = [x1, y1, x2 - x1, y2 - y1]
            row = {"image_id": number, "category_id": {"cat": 7, "dog": 90}[label], "bbox": box, "iscrowd": int(crowd)}
            document["annotations"].append({"id": len(document["annotations"]) + 1, **row})
    return document


def coco(folder: Path, document: dict | None = None, seed: int = 0) -> Path:
    images(folder, seed)
    file = folder / "boxes.json"
    file.write_text(json.dumps(document or coco_document()))
    return file


def yolo(folder: Path, seed: int = 0) -> Path:
    """folder/images and folder/labels; returns the image folder."""
    images(folder / "images", seed)
    (folder / "labels").mkdir()
    for name, rows in OBJECTS.items():
        height, width = SIZES[name]
        lines = []
        for label, (x1, y1, x2, y2), _ in rows:
            centre = f"{(x1 + x2) / 2 / width} {(y1 + y2) / 2 / height}"
            lines.append(f"{NAMES.index(label)} {centre} {(x2 - x1) / width} {(y2 - y1) / height}")
        (folder / "labels" / name.replace(".jpg", ".txt")).write_text("\n".join(lines))
    return folder / "images"


def no_utf_8(folder: Path) -> Path:
    """A YOLO set whose first image has a byte in its name that is no UTF-8; returns its data.yaml."""
    yolo(folder / "train")
    for name in ("images/a.jpg", "labels/a.txt"):
        file = folder / "train" / name
        file.rename(file.with_stem(os.fsdecode(b"\xff")))
    return data_yaml(folder, train="train/images", novel=["cat"], names=list(NAMES))


def voc_xml(name: str, size: tuple[int, int] | None = None, rows: list | None = None) -> str:
    height, width = size or SIZES[name]
    parts = [f"<annotation><filename>{name}</filename><path>C:\\drive\\{name}</path>",
             f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"]  # fmt: skip
    for label, (x1, y1, x2, y2), difficult in OBJECTS[name] if rows is None else rows:
        parts.append(f"<object><name>{label}</name><difficult>{int(difficult)}</difficult><bndbox><xmin>{x1 + 1}</xmin>"
                     f"<ymin>{y1 + 1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>")  # fmt: skip
    return "".join([*parts, "</annotation>"])


def voc(folder: Path, seed: int = 0) -> Path:
    images(folder, seed)
    for name in OBJECTS:
        (folder / name.replace(".jpg", ".xml")).write_text(voc_xml(name))
    return folder


def data_yaml(folder: Path, **keys: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump(keys, sort_keys=False))
    return file


def rows_of(record, names) -> list[tuple]:
    """[(name, xyxy rounded to 0.01 px, crowd)] of a record, for comparison with OBJECTS."""
    boxes = np.round(record.boxes.astype(float), 2)
    return [(names[label], tuple(box), bool(crowd)) for label, box, crowd in
            zip(record.labels, boxes.tolist(), record.crowd, strict=True)]  # fmt: skip
