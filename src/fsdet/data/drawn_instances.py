# SPDX-License-Identifier: AGPL-3.0-or-later
"""A drawn set of objects with masks of their visible pixels: OUT/train|val|test/annotations.json, 000000.jpg ...

Four kinds of the demo set's objects on its backdrops, in pictures of 128 px: two CPU cores learn them in minutes.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from fsdet.data.datayaml import write
from fsdet.data.demoset import mapper_of, publish, usable_cores
from fsdet.data.drawing.catalogue import KINDS
from fsdet.data.drawing.scenes import Scene, draw_scene
from fsdet.data.shapes import runs_of
from fsdet.data.synthetic import generator_sha256
from fsdet.errors import DataError, explain

SIDE = 128  # px
SIZES: Mapping[str, int] = {"train": 1000, "val": 150, "test": 150}
SPLITS = tuple(SIZES)
NAMES = ("gold star", "red heart", "pine tree", "whale")
CHUNK = 25
COUNTS = (0.3, 0.4, 0.3)  # probabilities of 1, 2, 3 objects


def draw_instances(out: Path, seed: int = 0, processes: int | None = None, sizes: Mapping[str, int] | None = None,
                   progress: Callable[[int, int], None] | None = None) -> Path:  # fmt: skip
    """Draw the set into `out` and return the path of its data.yaml; arguments and errors are those of `draw_demo`."""
    out, sizes = Path(out), dict(SIZES if sizes is None else sizes)
    if not set(sizes) <= set(SPLITS):
        raise DataError(
            explain(f"splits among {', '.join(SPLITS)}", ", ".join(sizes), "draw_instances sizes", "rename")
        )
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    identity = {"instances_sha256": own, "generator_sha256": generator_sha256(), "opencv": cv2.__version__,
                "seed": seed, "sizes": sizes}  # fmt: skip

    def draw(draft: Path) -> None:
        jobs = [(split, range(a, min(a + CHUNK, n))) for split, n in sizes.items() for a in range(0, n, CHUNK)]
        rows: dict[str, list[dict]] = {split: [] for split in sizes}
        for split in sizes:
            (draft / split).mkdir()
        with mapper_of(processes or usable_cores()) as mapper:
            for (split, _), found in zip(jobs, mapper(partial(_chunk, draft, seed), jobs), strict=True):
                rows[split] += found
                if progress:
                    progress(sum(map(len, rows.values())), sum(sizes.values()))
        for split, found in rows.items():
            (draft / split / "annotations.json").write_text(json.dumps(_coco(found)), encoding="utf-8")
        write(draft / "data.yaml", {"path": ".", **{s: f"{s}/annotations.json" for s in sizes}, "base": list(NAMES)})

    return publish(out, identity, SPLITS, draw)


def scene(seed: int, split: str, index: int) -> Scene:
    """Picture `index` of a split, a pure function of its arguments; labels index NAMES."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(8, SPLITS.index(split), index)))
    kinds = [next(i for i, k in enumerate(KINDS) if k.name == name) for name in NAMES]
    wanted = rng.choice(kinds, 1 + int(rng.choice(3, p=COUNTS)))
    drawn = draw_scene(rng, wanted.tolist(), SIDE)
    labels = np.array([kinds.index(label) for label in drawn.labels.tolist()], np.int64)
    return Scene(drawn.image, drawn.boxes, labels, drawn.masks, drawn.instances)


def _chunk(draft: Path, seed: int, job: tuple[str, range]) -> list[dict]:
    split, indices = job
    return [_draw(draft / split, scene(seed, split, index), f"{index:06d}.jpg") for index in indices]


def _draw(folder: Path, drawn: Scene, name: str) -> dict:
    jpeg = cv2.imencode(".jpg", drawn.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 90])[1]
    (folder / name).write_bytes(jpeg.tobytes())
    return {"name": name, "labels": drawn.labels.tolist(), "boxes": drawn.boxes.tolist(),
            "areas": drawn.masks.sum((1, 2)).tolist(), "shapes": [runs_of(mask) for mask in drawn.masks]}  # fmt: skip


def _coco(rows: list[dict]) -> dict:
    images = [{"id": i, "file_name": r["name"], "width": SIDE, "height": SIDE} for i, r in enumerate(rows, 1)]
    objects = [
        (i, *o)
        for i, r in enumerate(rows, 1)
        for o in zip(r["labels"], r["boxes"], r["areas"], r["shapes"], strict=True)
    ]
    annotations = [
        {"id": k, "image_id": image, "category_id": label + 1, "bbox": [x0, y0, x1 - x0, y1 - y0], "area": area,
         "segmentation": shape, "iscrowd": 0}
        for k, (image, label, (x0, y0, x1, y1), area, shape) in enumerate(objects, 1)
    ]  # fmt: skip
    categories = [{"id": i, "name": name} for i, name in enumerate(NAMES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}
