# SPDX-License-Identifier: AGPL-3.0-or-later
"""One picture of the demo set: a backdrop, clutter, objects that may hide each other, and a camera."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from fsdet.data.drawing.backdrops import backdrop
from fsdet.data.drawing.catalogue import KINDS
from fsdet.data.drawing.clutter import random_clutter
from fsdet.data.drawing.stickers import Patch, Pose, draw_sticker, random_pose

SIDE = 192  # px
SIZES = (22.0, 110.0)  # px, longest side of an object
SLIMMEST = 11.0  # px, shorter side of the smallest object: a spoon is never a hair
VISIBLE = 0.5  # share of an object's pixels that must stay in sight
OVERLAP = 0.3  # largest IoU of two boxes
TRIES = 14


@dataclass(frozen=True, eq=False)
class Instance:
    """An object of class `label` (index into KINDS) whose patch has its corner at (left, top) px."""

    label: int
    pose: Pose
    left: int
    top: int


@dataclass(frozen=True, eq=False)
class Scene:
    """image [S, S, 3] uint8 RGB; boxes [m, 4] int64 xyxy px around the visible pixels; labels [m];
    masks [m, S, S] bool, visible pixels; instances in the order of drawing, as labels."""

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    masks: np.ndarray
    instances: tuple[Instance, ...]


@dataclass(eq=False)
class _Item:
    patch: Patch
    left: int
    top: int
    pose: Pose
    label: int = -1
    area: float = 0.0  # px of the whole object, also outside the image
    mask: np.ndarray | None = None


def draw_scene(rng: np.random.Generator, labels: Sequence[int], side: int = SIDE) -> Scene:
    """A picture holding the objects `labels` (indices into KINDS), as far as there is room; a function of `rng`."""
    canvas = backdrop(rng, side)
    for _ in range(int(rng.integers(2, 8))):
        _paste(canvas, _clutter(rng, side, np.exp(rng.uniform(np.log(12), np.log(100)))))
    placed: list[_Item] = []
    for label in labels:
        _place(rng, placed, label, side)
    cover = []
    for _ in range(int(rng.integers(0, 3))):
        item = _clutter(rng, side, rng.uniform(12, 36))
        if _spared(placed, _mask(item, side), VISIBLE):
            _hide(placed, _mask(item, side))
            cover.append(item)
    for item in placed + cover:
        _paste(canvas, item)
    return _scene(_photographed(rng, canvas), placed, side)


def _scene(image: np.ndarray, placed: list[_Item], side: int) -> Scene:
    masks = np.stack([i.mask for i in placed]) if placed else np.zeros((0, side, side), bool)
    boxes = np.array([tight_box(m) for m in masks], np.int64).reshape(-1, 4)
    instances = tuple(Instance(i.label, i.pose, i.left, i.top) for i in placed)
    return Scene(image, boxes, np.array([i.label for i in placed], np.int64), masks, instances)


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """xyxy px of the smallest box around the set pixels of a non-empty mask [H, W]."""
    xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def _clutter(rng: np.random.Generator, side: int, size: float) -> _Item:
    pose = random_pose(rng, float(size))
    patch = draw_sticker(random_clutter(rng), pose)
    left, top = (int(v) for v in rng.integers(-size // 2, side - size // 2, 2))
    return _Item(patch, left, top, pose)


def _place(rng: np.random.Generator, placed: list[_Item], label: int, side: int) -> None:
    """Try to put one more object on top; smaller and smaller when there is no room, then leave it out."""
    kind = KINDS[label]
    smallest = max(SIZES[0], SLIMMEST / kind.slimness)
    size, visible = float(np.exp(rng.uniform(np.log(smallest), np.log(SIZES[1])))), rng.uniform(VISIBLE, 1)
    for attempt in range(TRIES):
        if attempt % 5 == 0:
            pose = random_pose(rng, max(size * 0.75 ** (attempt // 5), smallest))
            patch = draw_sticker(kind, pose)
            area = float((patch.alpha > 0.5).sum())
            visible = max(visible * 0.85, VISIBLE)
        item = _Item(patch, *_corner(rng, patch, side), pose, label, area)
        mask = item.mask = _mask(item, side)
        if mask.sum() >= VISIBLE * area and _spared(placed, mask, visible) and not _crowded(placed, mask):
            _hide(placed, mask)
            placed.append(item)
            return


def _corner(rng: np.random.Generator, patch: Patch, side: int) -> tuple[int, int]:
    """A random (left, top) inside the image; one time in five the patch may stick out of it."""
    out = rng.uniform(0, 0.4) if rng.random() < 0.2 else 0.0
    h, w = patch.alpha.shape
    left, top = (rng.uniform(*sorted((-out * n, side - n + out * n))) for n in (w, h))
    return round(left), round(top)


def _mask(item: _Item, side: int) -> np.ndarray:
    out = np.zeros((side, side), bool)
    (y0, y1, x0, x1), inner = _window(item, side)
    out[y0:y1, x0:x1] = item.patch.alpha[inner] > 0.5
    return out


def _window(item: _Item, side: int) -> tuple[tuple[int, int, int, int], tuple[slice, slice]]:
    h, w = item.patch.alpha.shape
    y0, y1 = (min(max(v, 0), side) for v in (item.top, item.top + h))
    x0, x1 = (min(max(v, 0), side) for v in (item.left, item.left + w))
    return (y0, y1, x0, x1), (slice(y0 - item.top, y1 - item.top), slice(x0 - item.left, x1 - item.left))


def _spared(placed: list[_Item], mask: np.ndarray, share: float) -> bool:
    """Whether something over `mask` would leave every object in sight: VISIBLE of it, and `share` of what shows now."""
    for item in placed:
        left = np.count_nonzero(item.mask & ~mask)
        if left < VISIBLE * item.area or left < share * np.count_nonzero(item.mask):
            return False
    return True


def _hide(placed: list[_Item], mask: np.ndarray) -> None:
    for item in placed:
        item.mask = item.mask & ~mask


def _crowded(placed: list[_Item], mask: np.ndarray) -> bool:
    a = tight_box(mask)
    return any(_iou(a, tight_box(i.mask & ~mask)) > OVERLAP for i in placed)


def _iou(a: tuple[int, ...], b: tuple[int, ...]) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0) * max(h, 0)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def _paste(canvas: np.ndarray, item: _Item) -> None:
    """Blend the shadow, then the patch, into canvas [S, S, 3] float32."""
    side = canvas.shape[0]
    _shadow(canvas, item)
    (y0, y1, x0, x1), inner = _window(item, side)
    if y0 < y1 and x0 < x1:
        under = canvas[y0:y1, x0:x1]
        under *= 1 - item.patch.alpha[inner][..., None]
        under += item.patch.rgb[inner]


def _shadow(canvas: np.ndarray, item: _Item) -> None:
    if item.pose.shadow < 0.08:
        return
    reach = max(round(item.pose.size * 0.05), 1)
    soft = cv2.blur(cv2.copyMakeBorder(item.patch.alpha, *[2 * reach] * 4, cv2.BORDER_CONSTANT), (2 * reach + 1,) * 2)
    a = np.radians(item.pose.light)
    dx, dy = round(-1.5 * reach * np.cos(a)), round(-1.5 * reach * np.sin(a))
    shade = _Item(Patch(soft, soft), item.left - 2 * reach + dx, item.top - 2 * reach + dy, item.pose)
    (y0, y1, x0, x1), inner = _window(shade, canvas.shape[0])
    if y0 < y1 and x0 < x1:
        canvas[y0:y1, x0:x1] *= 1 - np.float32(item.pose.shadow) * soft[inner][..., None]


def _photographed(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Exposure, colour cast, blur and sensor noise; uint8."""
    cast = rng.uniform(0.88, 1.1) * rng.uniform(0.95, 1.05, 3)
    out = canvas * cast.astype(np.float32) + np.float32(rng.uniform(-10, 14))
    if rng.random() < 0.5:
        out = cv2.GaussianBlur(out, (0, 0), float(rng.uniform(0.3, 0.9)))
    grain = rng.integers(0, 256, (3, *out.shape), np.uint8)  # the sum of three uniforms is bell-shaped enough
    out += (grain.sum(0, dtype=np.int16) - 382).astype(np.float32) * np.float32(rng.uniform(0, 7) / 128)
    return out.clip(0, 255).astype(np.uint8)
