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
import numpy as np
import yaml

from fsdet.data.demoset import mapper_of, publish, usable_cores
from fsdet.data.drawing.catalogue import BASE, KINDS, NOVEL
from fsdet.data.drawing.scenes import SIDE, Scene, draw_scene
from fsdet.data.drawing.sheets import class_sheet, framed, stacked, tiled
from fsdet.errors import DataError, explain

SIZES: Mapping[str, int] = {"train": 4000, "val": 400, "test": 400, "support": 800}
SPLITS = tuple(SIZES)
CHUNK, SLOTS = 25, 6
COUNTS = {"support": (0, 0, 0.1, 0.25, 0.35, 0.3)}  # probabilities of 1..SLOTS objects
USUAL_COUNTS = (0.04, 0.10, 0.20, 0.28, 0.24, 0.14)

Progress = Callable[[int, int], None]


def base_names() -> tuple[str, ...]:
    return tuple(k.name for k in BASE)


def novel_names() -> tuple[str, ...]:
    return tuple(k.name for k in NOVEL)


@cache
def generator_sha256() -> str:
    """Hash of the source files that decide what is drawn."""
    here = Path(__file__).parent
    total = hashlib.sha256()
    drawing = (f for f in sorted((here / "drawing").glob("*.py")) if f.name != "sheets.py")
    for file in [*drawing, Path(__file__)]:
        total.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return total.hexdigest()


def scene(seed: int, split: str, index: int) -> Scene:
    """Picture `index` of a split, a pure function of its arguments."""
    return draw_scene(_rng(seed, split, index), _labels(seed, split, index))


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

    return publish(out, identity, SPLITS, draw)


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
    quality = int(_rng(seed, split, index, 1).integers(60, 96))
    jpeg = cv2.imencode(".jpg", drawn.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    (folder / name).write_bytes(jpeg.tobytes())
    return {"name": name, "labels": drawn.labels.tolist(), "boxes": drawn.boxes.tolist(),
            "areas": drawn.masks.sum((1, 2)).tolist()}  # fmt: skip


def _rng(seed: int, split: str, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), *key)))


def _labels(seed: int, split: str, index: int) -> list[int]:
    """The classes of one picture, dealt from shuffled decks so that all classes are about equally frequent."""
    rng = _rng(seed, split, index, 2)
    count = 1 + int(rng.choice(SLOTS, p=COUNTS.get(split, USUAL_COUNTS)))
    labels: list[int] = []
    for slot in rng.permutation(SLOTS)[:count]:
        again = bool(labels) and rng.random() < 0.1
        labels.append(labels[-1] if again else _dealt(seed, split, index * SLOTS + int(slot)))
    return labels


def _dealt(seed: int, split: str, card: int) -> int:
    if split == "test":  # base and novel take turns, and swap places from picture to picture
        novel, card = (card + card // SLOTS) % 2 == 1, card // 2
    else:
        novel = split == "support"
    size, first = (len(NOVEL), len(BASE)) if novel else (len(BASE), 0)
    return first + int(_rng(seed, split, card // size, 3, int(novel)).permutation(size)[card % size])


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
