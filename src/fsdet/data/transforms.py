# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pixels and boxes moved together: letterbox, mosaic, affine jitter, colour jitter, support windows.

OpenCV on uint8 RGB: 4.5 ms an image at 640 px on one thread where torchvision's operators need 12.9. Every random
function takes its generator; nothing here reads a global one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

GREY = 114  # padding, as Ultralytics
MIN_SIDE, MIN_VISIBLE = 2.0, 0.1  # px; share of a box's area that must remain: below either, a moved box is dropped


@dataclass(frozen=True, eq=False)
class Sample:
    """image uint8 [H, W, 3] RGB; boxes [m, 4] float32 xyxy px of it; labels [m] int64 data-set classes.

    known: classes exhaustively labelled in every part of the image; None means all.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    known: frozenset[int] | None = None


@dataclass(frozen=True)
class Jitter:
    """Ranges of random change. scale .5 is a factor in .5..1.5; translate a share of the side; hsv relative gains."""

    mosaic: float = 0.0
    degrees: float = 0.0
    translate: float = 0.0
    scale: float = 0.0
    flip: float = 0.0
    hsv: tuple[float, float, float] = (0.0, 0.0, 0.0)
    blur: float = 0.0


def resize_long(image: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    """Scale so that the longer side is `size` px; returns the image and the factor."""
    h, w = image.shape[:2]
    factor = size / max(h, w)
    if factor == 1:
        return image, 1.0
    how = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    return cv2.resize(image, (max(1, round(w * factor)), max(1, round(h * factor))), interpolation=how), factor


def letterbox(image: np.ndarray, size: int) -> tuple[np.ndarray, float, tuple[float, float]]:
    """Scale to fit size x size and pad with grey on both sides. Returns image, factor, (left, top) padding in px."""
    small, factor = resize_long(image, size)
    h, w = small.shape[:2]
    top, left = (size - h) // 2, (size - w) // 2
    out = np.full((size, size, 3), GREY, np.uint8)
    out[top : top + h, left : left + w] = small
    return out, factor, (left, top)


def move_boxes(boxes: np.ndarray, matrix: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes under an affine 2x3 `matrix`: enclosing boxes clipped to the canvas, and which of them remain visible."""
    if not len(boxes):
        return boxes, np.zeros(0, bool)
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    moved = corners @ matrix[:, :2].T + matrix[:, 2]
    whole = np.concatenate((moved.min(1), moved.max(1)), 1)
    clipped = whole.copy()
    clipped[:, 0::2] = clipped[:, 0::2].clip(0, width)
    clipped[:, 1::2] = clipped[:, 1::2].clip(0, height)
    side = clipped[:, 2:] - clipped[:, :2]
    share = side.prod(1) / np.maximum((whole[:, 2:] - whole[:, :2]).prod(1), 1e-9)
    return clipped.astype(np.float32), (side.min(1) > MIN_SIDE) & (share > MIN_VISIBLE)


def warp(sample: Sample, matrix: np.ndarray, size: int, canvas: np.ndarray | None = None) -> Sample:
    """`sample` under an affine 2x3 matrix on a size x size canvas (grey, or drawn onto the one given).

    Boxes live on pixel edges, OpenCV counts pixel centres: without the half pixel a mirrored image is one px off its
    boxes.
    """
    canvas = np.full((size, size, 3), GREY, np.uint8) if canvas is None else canvas
    centres = matrix.copy()
    centres[:, 2] += matrix[:, :2].sum(1) / 2 - 0.5
    cv2.warpAffine(sample.image, centres, (size, size), dst=canvas, flags=cv2.INTER_LINEAR,
                   borderMode=cv2.BORDER_TRANSPARENT)  # fmt: skip
    boxes, keep = move_boxes(sample.boxes, matrix, size, size)
    return replace(sample, image=canvas, boxes=boxes[keep], labels=sample.labels[keep])


def random_affine(rng: np.random.Generator, jitter: Jitter, source: tuple[float, float], size: int) -> np.ndarray:
    """2x3 matrix: the point `source` (x, y) goes to the canvas centre, then rotation, scale, translation, flip."""
    angle = np.deg2rad(rng.uniform(-jitter.degrees, jitter.degrees))
    factor = rng.uniform(1 - jitter.scale, 1 + jitter.scale)
    mirror = -1.0 if rng.random() < jitter.flip else 1.0
    cos, sin = factor * np.cos(angle), factor * np.sin(angle)
    linear = np.array([[mirror * cos, -mirror * sin], [sin, cos]])
    target = size * (0.5 + rng.uniform(-jitter.translate, jitter.translate, 2))
    return np.concatenate((linear, (target - linear @ np.asarray(source))[:, None]), 1)


def mosaic(rng: np.random.Generator, samples: Sequence[Sample], jitter: Jitter, size: int) -> Sample:
    """Four samples around a random point, under one affine jitter, warped straight onto the size x size canvas.

    Each tile keeps its own scale (long side = size), so the window sees on average the same object sizes as one image.
    """
    cx, cy = rng.uniform(0.5 * size, 1.5 * size, 2)
    matrix = random_affine(rng, jitter, (size, size), size)
    canvas = np.full((size, size, 3), GREY, np.uint8)
    boxes, labels, known = [], [], None
    for i, tile in enumerate(samples):
        h, w = tile.image.shape[:2]
        corner = np.array([cx - w if i % 2 == 0 else cx, cy - h if i < 2 else cy])
        placed = np.concatenate((matrix[:, :2], (matrix[:, :2] @ corner + matrix[:, 2])[:, None]), 1)
        out = warp(tile, placed, size, canvas)
        boxes.append(out.boxes)
        labels.append(out.labels)
        if tile.known is not None:
            known = tile.known if known is None else known & tile.known
    return Sample(canvas, np.concatenate(boxes), np.concatenate(labels), known)


def colour(rng: np.random.Generator, image: np.ndarray, jitter: Jitter) -> np.ndarray:
    """Random hue, saturation and value gains, and now and then a blur."""
    if any(jitter.hsv):
        gain = 1 + rng.uniform(-1, 1, 3) * jitter.hsv
        ramp = np.arange(256)
        tables = ((ramp * gain[0]) % 180, np.clip(ramp * gain[1], 0, 255), np.clip(ramp * gain[2], 0, 255))
        channels = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
        moved = cv2.merge([cv2.LUT(c, t.astype(np.uint8)) for c, t in zip(channels, tables, strict=True)])
        image = cv2.cvtColor(moved, cv2.COLOR_HSV2RGB)
    if jitter.blur and rng.random() < jitter.blur:
        image = cv2.blur(image, (3, 3))
    return image


def augment(rng: np.random.Generator, samples: Sequence[Sample], jitter: Jitter, size: int) -> Sample:
    """One training image of size x size: a mosaic when four samples are given, one jittered sample otherwise."""
    if len(samples) == 4:
        out = mosaic(rng, samples, jitter, size)
    else:
        h, w = samples[0].image.shape[:2]
        out = warp(samples[0], random_affine(rng, jitter, (w / 2, h / 2), size), size)
    return replace(out, image=colour(rng, out.image, jitter))


@dataclass(frozen=True)
class Disguise:
    """One change of looks for a whole episode: it turns known classes into classes nobody has seen.

    channels: a permutation of RGB. hue: added, in OpenCV's half degrees. turns: counter-clockwise quarter turns.
    """

    channels: tuple[int, int, int]
    hue: int
    turns: int

    @staticmethod
    def draw(rng: np.random.Generator) -> "Disguise":
        """Any of 6 permutations, 180 hues, 4 orientations."""
        channels = tuple(int(c) for c in rng.permutation(3))
        return Disguise(channels, int(rng.integers(180)), int(rng.integers(4)))  # type: ignore[arg-type]

    def image(self, image: np.ndarray) -> np.ndarray:
        """uint8 [S, S, 3] RGB in new colours and orientation."""
        hsv = cv2.cvtColor(np.ascontiguousarray(image[..., list(self.channels)]), cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(np.int32) + self.hue) % 180
        return np.ascontiguousarray(np.rot90(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), self.turns))

    def boxes(self, boxes: np.ndarray, side: int) -> np.ndarray:
        """[..., 4] xyxy px of an image of side x side px, turned with it."""
        for _ in range(self.turns):
            x0, y0, x1, y1 = np.moveaxis(boxes, -1, 0)
            boxes = np.stack((y0, side - x1, y1, side - x0), -1)
        return boxes


def support_matrix(box: np.ndarray, size: int, factor: float = 1.0, shift: np.ndarray | None = None,
                   mirror: bool = False) -> np.ndarray:  # fmt: skip
    """2x3 matrix of a size x size window around `box` at native scale x `factor`, smaller where the box would not fit.

    shift: px by which the box leaves the window's centre.
    """
    side = float((box[2:] - box[:2]).max())
    factor = min(factor, 0.8 * size / max(side, 1.0))
    linear = np.diag([-factor if mirror else factor, factor])
    target = size / 2 + (np.zeros(2) if shift is None else shift)
    return np.concatenate((linear, (target - linear @ ((box[:2] + box[2:]) / 2))[:, None]), 1)


def support_window(sample: Sample, index: int, size: int, rng: np.random.Generator | None = None,
                   jitter: Jitter | None = None, factor: float = 1.0,
                   mirror: bool = False) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The window around instance `index`: (uint8 [size, size, 3], box [4] px of the window).

    With a generator the window moves, zooms, mirrors and changes colour; without one it is centred and exact.
    """
    box, shift = sample.boxes[index], None
    if rng is not None and jitter is not None:
        factor *= rng.uniform(1 - jitter.scale / 2, 1 + jitter.scale / 2)
        mirror = rng.random() < jitter.flip
        room = max(0.0, (size - factor * float((box[2:] - box[:2]).max())) / 2)
        shift = rng.uniform(-0.5, 0.5, 2) * room
    matrix = support_matrix(box, size, factor, shift, mirror)
    nothing = np.zeros((0, 4), np.float32)
    image = warp(Sample(sample.image, nothing, sample.labels[:0]), matrix, size).image
    if rng is not None and jitter is not None:
        image = colour(rng, image, jitter)
    return image, move_boxes(box[None], matrix, size, size)[0][0]
