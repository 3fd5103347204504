# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which classes a picture of the demo set shows, and the picture: pure functions of (seed, split, index)."""

import cv2
import numpy as np

from fsdet.data.drawing.catalogue import BASE, NOVEL
from fsdet.data.drawing.scenes import Scene, draw_scene

SPLITS = ("train", "val", "test", "support")  # their order is part of every seed
SLOTS = 6
COUNTS = {"support": (0, 0, 0.1, 0.25, 0.35, 0.3)}  # probabilities of 1..SLOTS objects
USUAL_COUNTS = (0.04, 0.10, 0.20, 0.28, 0.24, 0.14)


def scene(seed: int, split: str, index: int) -> Scene:
    """Picture `index` of a split."""
    return draw_scene(_rng(seed, split, index), labels(seed, split, index))


def jpeg(drawn: Scene, seed: int, split: str, index: int) -> bytes:
    """The file of a picture, at a quality of its own."""
    quality = int(_rng(seed, split, index, 1).integers(60, 96))
    return cv2.imencode(".jpg", drawn.image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1].tobytes()


def labels(seed: int, split: str, index: int) -> list[int]:
    """The classes of one picture, dealt from shuffled decks so that all classes are about equally frequent."""
    rng = _rng(seed, split, index, 2)
    count = 1 + int(rng.choice(SLOTS, p=COUNTS.get(split, USUAL_COUNTS)))
    found: list[int] = []
    for slot in rng.permutation(SLOTS)[:count]:
        again = bool(found) and rng.random() < 0.1
        found.append(found[-1] if again else _dealt(seed, split, index * SLOTS + int(slot)))
    return found


def _rng(seed: int, split: str, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(SPLITS.index(split), *key)))


def _dealt(seed: int, split: str, card: int) -> int:
    if split == "test":  # base and novel take turns, and swap places from picture to picture
        novel, card = (card + card // SLOTS) % 2 == 1, card // 2
    else:
        novel = split == "support"
    size, first = (len(NOVEL), len(BASE)) if novel else (len(BASE), 0)
    return first + int(_rng(seed, split, card // size, 3, int(novel)).permutation(size)[card % size])
