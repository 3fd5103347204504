# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is around a box in an image."""

import numpy as np

ROOM = 0.35  # of the box's longer side, on each side of it
SMALLEST = 40  # px, so that a tiny box still has something around it


def around(image: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the square around `box` [4] px as far as the image goes, the box in px of it) of a uint8 [H, W, 3] image."""
    height, width = image.shape[:2]
    x0, y0, x1, y1 = np.clip(np.asarray(box, np.float64), 0, [width, height, width, height])
    side = max((1 + 2 * ROOM) * max(x1 - x0, y1 - y0), SMALLEST)
    left, top = _start((x0 + x1) / 2, side, width), _start((y0 + y1) / 2, side, height)
    right, bottom = min(width, left + max(1, round(side))), min(height, top + max(1, round(side)))
    shift = np.array([left, top, left, top])
    return np.ascontiguousarray(image[top:bottom, left:right]), np.asarray(box, np.float64) - shift


def _start(middle: float, side: float, limit: int) -> int:
    """Where a stretch of `side` px about `middle` starts, moved into 0..limit."""
    return round(max(0.0, min(middle - side / 2, limit - side)))
