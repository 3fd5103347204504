# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pictures of the demo set for people: every class with its name, and scenes with their boxes. uint8 RGB."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from fsdet.data.drawing.catalogue import KINDS, Kind
from fsdet.data.drawing.scenes import Scene
from fsdet.data.drawing.stickers import draw_sticker, random_pose

PAPER, INK, FRAME = (238, 239, 234), (50, 52, 60), (214, 40, 60)
CELL, COLUMNS, GAP = 92, 16, 8  # px, per row, px
FONT = cv2.FONT_HERSHEY_SIMPLEX


def class_sheet(kinds: Sequence[Kind], seed: int) -> np.ndarray:
    """One instance of every class above its name."""
    cells = [_cell(kind, np.random.default_rng([seed, n])) for n, kind in enumerate(kinds)]
    return tiled(cells, COLUMNS, gap=0)


def framed(scene: Scene) -> np.ndarray:
    """The scene with its boxes and class names."""
    out = scene.image.copy()
    for (x0, y0, x1, y1), label in zip(scene.boxes.tolist(), scene.labels.tolist(), strict=True):
        at = (x0 + 1, max(y0 - 2, 8))
        cv2.rectangle(out, (x0, y0), (x1 - 1, y1 - 1), FRAME, 1)
        cv2.putText(out, KINDS[label].name, at, FONT, 0.28, INK, 3, cv2.LINE_AA)
        _write(out, KINDS[label].name, at, 0.28, (255, 255, 255))
    return out


def tiled(cells: Sequence[np.ndarray], columns: int, gap: int = GAP) -> np.ndarray:
    """Equal pictures [h, w, 3] side by side in rows on paper."""
    h, w = (n + gap for n in cells[0].shape[:2])
    out = np.full((-(-len(cells) // columns) * h, columns * w, 3), PAPER, np.uint8)
    for k, cell in enumerate(cells):
        y, x = k // columns * h, k % columns * w
        out[y : y + h - gap, x : x + w - gap] = cell
    return out


def stacked(parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Pictures of any width under their headings."""
    width = max(p.shape[1] for p in parts.values()) + 2 * GAP
    rows = []
    for title, picture in parts.items():
        head = np.full((30, width, 3), PAPER, np.uint8)
        _write(head, title, (GAP, 22), 0.6, INK)
        row = np.full((picture.shape[0], width, 3), PAPER, np.uint8)
        row[:, GAP : GAP + picture.shape[1]] = picture
        rows += [head, row]
    return np.concatenate(rows)


def _cell(kind: Kind, rng: np.random.Generator) -> np.ndarray:
    out = np.full((CELL + 14, CELL, 3), PAPER, np.uint8)
    patch = draw_sticker(kind, random_pose(rng, CELL - 22.0))
    h, w = patch.alpha.shape
    y, x = (CELL - h) // 2, (CELL - w) // 2
    out[y : y + h, x : x + w] = out[y : y + h, x : x + w] * (1 - patch.alpha[..., None]) + patch.rgb
    width = cv2.getTextSize(kind.name, FONT, 0.32, 1)[0][0]
    _write(out, kind.name, (max((CELL - width) // 2, 0), CELL + 8), 0.32, INK)
    return out


def _write(image: np.ndarray, text: str, at: tuple[int, int], size: float, colour: tuple[int, int, int]) -> None:
    cv2.putText(image, text, at, FONT, size, colour, 1, cv2.LINE_AA)
