# SPDX-License-Identifier: AGPL-3.0-or-later
"""Outlines as COCO writes them - polygons in px, or run lengths down the columns - to masks and back."""

import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from fsdet.errors import DataError, explain

SHIFT = 4  # fractional bits of a polygon's corners


def is_shape(value: Any) -> bool:
    """Whether a `segmentation` can be read: polygons of at least three finite corners, or run lengths with a size."""
    if isinstance(value, dict):
        size = value.get("size")
        sized = isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)
        counts = value.get("counts")
        whole = isinstance(counts, list) and all(isinstance(n, int) and n >= 0 for n in counts)
        return sized and (isinstance(counts, str) or (whole and sum(counts) == size[0] * size[1]))
    return isinstance(value, list) and bool(value) and all(map(_is_polygon, value))


def _is_polygon(value: Any) -> bool:
    numbers = isinstance(value, list) and all(isinstance(n, int | float) and math.isfinite(n) for n in value)
    return numbers and len(value) >= 6 and len(value) % 2 == 0


def mask_of(shape: Any, size: tuple[int, int]) -> np.ndarray:
    """bool [H, W] of a `segmentation` in an image of `size` (height, width) px.

    Raises:
        DataError: run lengths of another size, or that cannot be read.
    """
    if isinstance(shape, dict):
        return _unrolled(shape, size)
    canvas = np.zeros(size, np.uint8)
    corners = [(np.asarray(p, np.float64).reshape(-1, 2) - 0.5) * 2**SHIFT for p in shape]  # edges to pixel centres
    for polygon in corners:  # one by one: the parts of an object may overlap
        cv2.fillPoly(canvas, [polygon.round().astype(np.int32)], 1, shift=SHIFT)
    return canvas.astype(bool)


def _unrolled(shape: dict, size: tuple[int, int]) -> np.ndarray:
    counts = shape["counts"] if isinstance(shape["counts"], list) else _spelt_out(shape["counts"])
    if tuple(shape["size"]) != tuple(size) or sum(counts) != size[0] * size[1] or min(counts, default=0) < 0:
        got = f"size {shape['size']}, {sum(counts)} pixels"
        raise DataError(explain(f"run lengths of {size[0]} x {size[1]} pixels", got, "segmentation", "export it again"))
    values = np.arange(len(counts)) % 2 == 1
    return np.repeat(values, counts).reshape(size[1], size[0]).T


def _spelt_out(text: str) -> list[int]:
    """COCO's compressed run lengths: six bits a character, every run from the third on as a difference to the last
    but one."""
    counts: list[int] = []
    value, bits = 0, 0
    for character in text.encode("ascii", "replace"):
        part = character - 48
        value |= (part & 31) << bits
        bits += 5
        if not part & 32:
            value -= (1 << bits) if part & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, bits = 0, 0
    return counts


def runs_of(mask: np.ndarray) -> dict[str, Any]:
    """A mask [H, W] as uncompressed run lengths, which every reader of COCO knows."""
    flat = np.asarray(mask, bool).T.ravel()
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if len(flat) and flat[0] else counts}


def moved(mask: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """uint8 [size, size] of 0 and 1: a mask under an affine 2x3 matrix of pixel edges, as `transforms.warp` moves."""
    centres = matrix.astype(np.float64).copy()
    centres[:, 2] += matrix[:, :2].sum(1) / 2 - 0.5
    grey = cv2.warpAffine(mask.astype(np.uint8) * 255, centres, (size, size), flags=cv2.INTER_LINEAR)
    return (grey > 127).astype(np.uint8)


def tight(masks: Sequence[np.ndarray]) -> np.ndarray:
    """[n, 4] float32 xyxy px around the set pixels of masks that have some."""
    out = []
    for mask in masks:
        xs, ys = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
        out.append((xs[0], ys[0], xs[-1] + 1, ys[-1] + 1))
    return np.array(out, np.float32).reshape(-1, 4)
