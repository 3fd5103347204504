# SPDX-License-Identifier: AGPL-3.0-or-later
"""A drawn set of document-like pictures, genuine or forged: OUT/train|val|test/genuine|forged/000000.png ...

A genuine page is printed, stamped and then photographed, so that one grain lies over all of it. On a forged one a field
was covered and lettered again afterwards, or a block was copied elsewhere: the grain ends at its border.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from fsdet.data.datayaml import write
from fsdet.data.demoset import mapper_of, publish, usable_cores
from fsdet.errors import DataError, explain

SIDE = 128  # px
SIZES: Mapping[str, int] = {"train": 1200, "val": 300, "test": 300}
SPLITS = tuple(SIZES)
CLASSES = ("forged", "genuine")
CHUNK = 50
Rng = np.random.Generator


def draw_documents(out: Path, seed: int = 0, processes: int | None = None, sizes: Mapping[str, int] | None = None,
                   progress: Callable[[int, int], None] | None = None) -> Path:  # fmt: skip
    """Draw the set into `out` and return the path of its data.yaml; arguments and errors are those of `draw_demo`."""
    out, sizes = Path(out), dict(SIZES if sizes is None else sizes)
    if not set(sizes) <= set(SPLITS):
        raise DataError(
            explain(f"splits among {', '.join(SPLITS)}", ", ".join(sizes), "draw_documents sizes", "rename")
        )
    generator = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    identity = {"documents_sha256": generator, "opencv": cv2.__version__, "seed": seed, "sizes": sizes}

    def draw(draft: Path) -> None:
        for split in sizes:
            for name in CLASSES:
                (draft / split / name).mkdir(parents=True)
        jobs = [(split, range(a, min(a + CHUNK, n))) for split, n in sizes.items() for a in range(0, n, CHUNK)]
        done = 0
        with mapper_of(processes or usable_cores()) as mapper:
            for count in mapper(partial(_chunk, draft, seed), jobs):
                done += count
                if progress:
                    progress(done, sum(sizes.values()))
        write(draft / "data.yaml", {"path": ".", **{split: split for split in sizes}})

    return publish(out, identity, SPLITS, draw)


def document(seed: int, split: str, index: int) -> tuple[np.ndarray, str]:
    """Picture `index` of a split, uint8 [SIDE, SIDE, 3] RGB, and its class; every other one is forged."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(9, SPLITS.index(split), index)))
    name = CLASSES[index % 2]
    page = _photographed(rng, _printed(rng))
    if name == "forged":
        page = _covered(rng, page) if rng.random() < 0.6 else _copied(rng, page)
    soft = cv2.GaussianBlur(page, (0, 0), float(rng.uniform(0.2, 0.5)))
    return soft.clip(0, 255).astype(np.uint8), name


def _chunk(draft: Path, seed: int, job: tuple[str, range]) -> int:
    split, indices = job
    for index in indices:
        image, name = document(seed, split, index)
        png = cv2.imencode(".png", image[..., ::-1])[1]
        (draft / split / name / f"{index:06d}.png").write_bytes(png.tobytes())
    return len(indices)


def _printed(rng: Rng) -> np.ndarray:
    """Paper with a heading, paragraphs, a form field, perhaps a portrait and a stamp; [SIDE, SIDE, 3] float32."""
    tone = rng.uniform(205, 248) + rng.uniform(-8, 8, 3)
    page = np.full((SIDE, SIDE, 3), tone, np.float32)
    ink = rng.uniform(20, 90, 3)
    _line(rng, page, 8, 10, int(rng.integers(50, 100)), 5, ink)
    top = 22
    if rng.random() < 0.6:
        _portrait(rng, page, int(rng.integers(8, 84)), top)
        top += 40
    while top < SIDE - 16:
        left = int(rng.integers(6, 14))
        _line(rng, page, left, top, int(rng.integers(50, SIDE - 12 - left)), int(rng.integers(2, 4)), ink)
        top += int(rng.integers(6, 9))
    if rng.random() < 0.5:
        y, x = (int(v) for v in rng.integers(20, 100, 2))
        tint = tone * rng.uniform(0.93, 0.98, 3)
        page[y : y + int(rng.integers(9, 14)), x : x + int(rng.integers(24, 50))] = tint
        _line(rng, page, x + 3, y + 3, 22, 3, ink)
    if rng.random() < 0.6:
        centre, shade = tuple(int(v) for v in rng.integers(24, 104, 2)), tuple(rng.uniform(60, 190, 3).tolist())
        cv2.circle(page, centre, int(rng.integers(9, 16)), shade, 2, cv2.LINE_AA)
    return page


def _line(rng: Rng, page: np.ndarray, left: int, top: int, width: int, height: int, ink: np.ndarray) -> None:
    """A line of words: bars of the height of letters."""
    x = left
    while x < left + width:
        word = int(rng.integers(4, 15))
        page[top : top + height, x : min(x + word, left + width)] = ink + rng.uniform(-12, 12)
        x += word + int(rng.integers(2, 4))


def _portrait(rng: Rng, page: np.ndarray, left: int, top: int) -> None:
    page[top : top + 34, left : left + 28] = rng.uniform(120, 215, 3)
    skin = tuple(rng.uniform(120, 220, 3).tolist())
    cv2.ellipse(page, (left + 14, top + 34), (11, 12), 0, 180, 360, tuple(rng.uniform(30, 140, 3).tolist()), -1)
    cv2.circle(page, (left + 14, top + 15), 7, skin, -1, cv2.LINE_AA)


def _photographed(rng: Rng, page: np.ndarray) -> np.ndarray:
    """Uneven light, and a grain that lies over everything."""
    x, y = np.meshgrid(*[np.linspace(-0.5, 0.5, SIDE, dtype=np.float32)] * 2)
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.16)
    light = 1 - depth * (0.5 + x * np.cos(angle) + y * np.sin(angle))
    grain = rng.normal(0, rng.uniform(6, 10), (SIDE, SIDE, 1))
    return (page * light[..., None] + grain).astype(np.float32)


def _covered(rng: Rng, page: np.ndarray) -> np.ndarray:
    """A field painted over in about the tone of the paper there, and lettered again."""
    w, h = int(rng.integers(46, 84)), int(rng.integers(20, 34))
    x, y = int(rng.integers(4, SIDE - w - 4)), int(rng.integers(4, SIDE - h - 4))
    out = page.copy()
    tone = np.percentile(page[y : y + h, x : x + w].reshape(-1, 3), 80, 0)
    out[y : y + h, x : x + w] = tone + rng.uniform(16, 40) * rng.choice([-1, 1])
    _line(rng, out, x + 3, y + h // 2 - 2, w - 6, 4, rng.uniform(20, 70, 3))
    return out


def _copied(rng: Rng, page: np.ndarray) -> np.ndarray:
    """A block of the page laid over another place of it, smoothed as copies of copies are."""
    w, h = int(rng.integers(46, 76)), int(rng.integers(24, 40))
    (x0, x1), (y0, y1) = rng.integers(3, SIDE - w - 3, 2), rng.integers(3, SIDE - h - 3, 2)
    block = cv2.GaussianBlur(page[y0 : y0 + h, x0 : x0 + w], (0, 0), float(rng.uniform(1.2, 2.0)))
    out = page.copy()
    out[y1 : y1 + h, x1 : x1 + w] = block + rng.uniform(12, 30) * rng.choice([-1, 1])
    return out
