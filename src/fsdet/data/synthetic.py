# SPDX-License-Identifier: AGPL-3.0-or-later
"""The demo set: pictures of 80 base and 16 novel classes, drawn on the spot, the same on every draw.

    OUT/data.yaml  demo.json  train|val|test|support/annotations.json, 000000.jpg ...

train and val hold base objects, support holds novel ones, test holds both; every object is annotated.
Masks of the visible pixels come with `scene`; the files hold boxes and areas.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

import cv2
import yaml

from fsdet.data.demoset import mapper_of, publish, usable_cores
from fsdet.data.drawing.catalogue import BASE, KINDS, NOVEL
from fsdet.data.drawing.deal import SPLITS, jpeg, scene
from fsdet.data.drawing.scenes import SIDE
from fsdet.data.drawing.sheets import class_sheet, framed, stacked, tiled
from fsdet.errors import DataError, explain

SIZES: Mapping[str, int] = {"train": 4000, "val": 400, "test": 400, "support": 800}
CHUNK = 25  # pictures a job
FIRST = "5e2a55694b76f523415fbe1cb6e1bcb415d2b99d0d9f01252d6fd67f3d64b0ab"  # when the hash covered this file too

Progress = Callable[[int, int], None]


def base_names() -> tuple[str, ...]:
    return tuple(k.name for k in BASE)


def novel_names() -> tuple[str, ...]:
    return tuple(k.name for k in NOVEL)


@cache
def generator_sha256() -> str:
    """Hash of the source files that decide what is drawn."""
    total = hashlib.sha256()
    for file in sorted((Path(__file__).parent / "drawing").glob("*.py")):
        if file.name != "sheets.py":
            total.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()


def draw_demo(
    out: Path,
    seed: int = 0,
    processes: int | None = None,
    sizes: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Draw the demo set into `out` and return the path of its data.yaml.

    A complete set of the same generator, seed and sizes is left as it is; another demo set is replaced.
    The folder appears only when everything in it has been written.

    Args:
        processes: workers; None means one per usable core. The result does not depend on it.
        sizes: {split: pictures}, a part of SIZES or all of it; for small draws.
        progress: called with (pictures done, pictures in all).
    Raises:
        DataError: `out` holds something else than a demo set, or `sizes` names an unknown split.
    """
    out, sizes = Path(out), dict(SIZES if sizes is None else sizes)
    if not set(sizes) <= set(SPLITS):
        known = ", ".join(SPLITS)
        raise DataError(explain(f"splits among {known}", ", ".join(sizes), "draw_demo sizes", "rename them"))
    identity = {"generator_sha256": generator_sha256(), "opencv": cv2.__version__, "seed": seed, "sizes": sizes}
    workers = processes or usable_cores()

    def draw(draft: Path) -> None:
        _draw_splits(draft, seed, sizes, workers, progress)
        _write_yaml(draft / "data.yaml", sizes)

    return publish(out, identity, SPLITS, draw, same_as={**identity, "generator_sha256": FIRST})


def sheet(path: Path, seed: int = 0, scenes: int = 14) -> Path:
    """Draw a .png or .jpg of every class with its name, base then novel, and of some test scenes with their boxes."""
    path = Path(path)
    if path.suffix not in (".png", ".jpg"):
        raise DataError(explain("a .png or .jpg path", path.suffix or "no suffix", str(path), "rename the file"))
    shown = [framed(drawn) for drawn in (scene(seed, "test", index) for index in range(scenes))]
    parts = {
        f"{len(BASE)} base classes": class_sheet(BASE, seed),
        f"{len(NOVEL)} novel classes": class_sheet(NOVEL, seed),
        "test scenes": tiled(shown, 7),
    }
    path.write_bytes(cv2.imencode(path.suffix, stacked(parts)[..., ::-1])[1].tobytes())
    return path


def _draw_splits(draft: Path, seed: int, sizes: Mapping[str, int], processes: int, progress: Progress | None) -> None:
    jobs = [(split, range(a, min(a + CHUNK, n))) for split, n in sizes.items() for a in range(0, n, CHUNK)]
    for split in sizes:
        (draft / split).mkdir()
    found: dict[str, list] = {split: [] for split in sizes}
    done = 0
    with mapper_of(processes) as mapper:
        for (split, indices), rows in zip(jobs, mapper(partial(_draw_chunk, draft, seed), jobs), strict=True):
            found[split] += rows
            done += len(indices)
            if progress:
                progress(done, sum(sizes.values()))
    for split, rows in found.items():
        (draft / split / "annotations.json").write_text(json.dumps(_coco(rows)), encoding="utf-8")


def _draw_chunk(draft: Path, seed: int, job: tuple[str, range]) -> list[dict]:
    split, indices = job
    return [_draw_image(draft / split, seed, split, index) for index in indices]


def _draw_image(folder: Path, seed: int, split: str, index: int) -> dict:
    drawn, name = scene(seed, split, index), f"{index:06d}.jpg"
    (folder / name).write_bytes(jpeg(drawn, seed, split, index))
    return {"name": name, "labels": drawn.labels.tolist(), "boxes": drawn.boxes.tolist(),
            "areas": drawn.masks.sum((1, 2)).tolist()}  # fmt: skip


def _coco(rows: list[dict]) -> dict:
    images = [{"id": i + 1, "file_name": r["name"], "width": SIDE, "height": SIDE} for i, r in enumerate(rows)]
    objects = [(i + 1, *o) for i, r in enumerate(rows) for o in zip(r["labels"], r["boxes"], r["areas"], strict=True)]
    annotations = [
        {"id": k + 1, "image_id": image, "category_id": label + 1, "bbox": [x0, y0, x1 - x0, y1 - y0],
         "area": area, "iscrowd": 0}
        for k, (image, label, (x0, y0, x1, y1), area) in enumerate(objects)
    ]  # fmt: skip
    categories = [{"id": i + 1, "name": k.name} for i, k in enumerate(KINDS)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _write_yaml(path: Path, sizes: Mapping[str, int]) -> None:
    sources = {split: f"{split}/annotations.json" for split in sizes}
    keys = {"path": ".", **sources, "base": list(base_names()), "novel": list(novel_names())}
    note = f"# drawn by fsdet data demo, generator {generator_sha256()}\n"
    path.write_text(note + yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
