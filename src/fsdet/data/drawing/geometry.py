# SPDX-License-Identifier: AGPL-3.0-or-later
"""Outlines in unit coordinates: x to the right, y down, an object fills [-1, 1].

Coordinates are written as text in hundredths, "x,y x,y ...", because eighty drawings have to stay readable.
"""

from dataclasses import dataclass

import numpy as np

Outline = np.ndarray  # [n, 2] float32, closed
Region = list[Outline]  # an outer outline and its holes, filled even-odd


@dataclass(frozen=True, eq=False)
class Part:
    """Regions of one paint, drawn as their union. `paint` is "body", "accent" or a palette colour."""

    paint: str
    regions: tuple[Region, ...]
    outlined: bool


def points(text: str) -> Outline:
    """[n, 2] from "x,y x,y ..." in hundredths."""
    return np.array([[float(v) for v in pair.split(",")] for pair in text.split()], np.float32) / 100


def curve(text: str | Outline, steps: int = 5) -> Outline:
    """A closed Catmull-Rom curve through the points; a point written twice is a corner."""
    p = points(text) if isinstance(text, str) else text
    before, after, after2 = np.roll(p, 1, 0), np.roll(p, -1, 0), np.roll(p, -2, 0)
    t = (np.arange(steps, dtype=np.float32) / steps)[None, :, None]
    a, b, c, d = (q[:, None] for q in (before, p, after, after2))
    out = 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)
    return out.reshape(-1, 2)


def mirrored(text: str) -> Outline:
    """The right half of a symmetric outline, from top to bottom, completed with its mirror image."""
    right = points(text)
    left = right[::-1] * np.float32([-1, 1])
    return np.concatenate([right, left[left[:, 0] != 0]])


def symmetric(text: str) -> Outline:
    """`mirrored`, rounded by `curve`."""
    return curve(mirrored(text))


def flipped(outline: Outline) -> Outline:
    return outline * np.float32([-1, 1])


def both(outline: Outline) -> tuple[Outline, Outline]:
    """The outline and its mirror image."""
    return outline, flipped(outline)


def disc(x: float, y: float, rx: float, ry: float | None = None, count: int = 28) -> Outline:
    """An ellipse, in hundredths like the texts."""
    t = np.linspace(0, 2 * np.pi, count, endpoint=False)
    ry = rx if ry is None else ry
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], 1).astype(np.float32) / 100


def box(x0: float, y0: float, x1: float, y1: float, r: float = 0) -> Outline:
    """A rectangle with corner radius `r`, in hundredths."""
    if r <= 0:
        return np.float32([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]) / 100
    t = np.linspace(0, np.pi / 2, 5)
    corners = [(x1 - r, y1 - r, 0), (x0 + r, y1 - r, 1), (x0 + r, y0 + r, 2), (x1 - r, y0 + r, 3)]
    arcs = [[cx + r * np.cos(t + k * np.pi / 2), cy + r * np.sin(t + k * np.pi / 2)] for cx, cy, k in corners]
    return (np.concatenate(arcs, 1).T / 100).astype(np.float32)


def wedge(x: float, y: float, r: float, start: float, stop: float, ry: float | None = None) -> Outline:
    """The part of an ellipse between two angles in degrees (clockwise from the right), closed by its chord."""
    t = np.radians(np.linspace(start, stop, 20))
    ry = r if ry is None else ry
    return np.stack([x + r * np.cos(t), y + ry * np.sin(t)], 1).astype(np.float32) / 100


def stroke(text: str | Outline, width: float, rounded: bool = False) -> Outline:
    """A thick line through the points; `rounded` bends it smoothly through them."""
    p = points(text) if isinstance(text, str) else text
    if rounded:
        ends = np.concatenate([2 * p[:1] - p[1:2], p, 2 * p[-1:] - p[-2:-1]])
        p = np.concatenate([_span(ends[i : i + 4]) for i in range(len(p) - 1)] + [p[-1:]])
    tangent = np.gradient(p, axis=0)
    tangent /= np.linalg.norm(tangent, axis=1, keepdims=True) + 1e-9
    side = np.stack([-tangent[:, 1], tangent[:, 0]], 1) * (width / 200)
    return np.concatenate([p + side, (p - side)[::-1]]).astype(np.float32)


def _span(four: Outline, steps: int = 6) -> Outline:
    a, b, c, d = (four[i][None] for i in range(4))
    t = (np.arange(steps, dtype=np.float32) / steps)[:, None]
    return 0.5 * (2 * b + (c - a) * t + (2 * a - 5 * b + 4 * c - d) * t**2 + (3 * b - a - 3 * c + d) * t**3)


def spikes(count: int, inner: float, outer: float = 100, x: float = 0, y: float = 0, turn: float = -90) -> Outline:
    """A star of `count` points, radii in hundredths, the first point at `turn` degrees."""
    t = np.radians(turn) + np.arange(2 * count) * np.pi / count
    r = np.where(np.arange(2 * count) % 2 == 0, outer, inner)
    return np.stack([x + r * np.cos(t), y + r * np.sin(t)], 1).astype(np.float32) / 100


def cog(count: int, inner: float, outer: float) -> Outline:
    """A gear wheel with `count` flat teeth."""
    step = 2 * np.pi / count
    t = (np.arange(count)[:, None] * step + np.float32([-0.34, -0.2, 0.2, 0.34]) * step).reshape(-1)
    r = np.tile([inner, outer, outer, inner], count)
    return np.stack([r * np.cos(t), r * np.sin(t)], 1).astype(np.float32) / 100


def turned(outline: Outline, degrees: float, x: float = 0, y: float = 0) -> Outline:
    """Rotated clockwise about (x, y) in hundredths."""
    a = np.radians(degrees)
    spin = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]], np.float32)
    about = np.float32([x, y]) / 100
    return (outline - about) @ spin.T + about


def paint(colour: str, *regions: Outline | Region, outlined: bool = True) -> Part:
    """A part; a bare outline is a region without holes."""
    return Part(colour, tuple(r if isinstance(r, list) else [r] for r in regions), outlined)


def body(*regions: Outline | Region) -> Part:
    """The patterned part of an object."""
    return paint("body", *regions)


def accent(*regions: Outline | Region) -> Part:
    """The part in the class's third colour."""
    return paint("accent", *regions)


def mark(colour: str, *regions: Outline | Region) -> Part:
    """A detail without outline."""
    return paint(colour, *regions, outlined=False)


def eyes(x: float, y: float, r: float = 12, apart: float = 0) -> tuple[Part, Part]:
    """White eyes with dark pupils: one at (x, y), or a pair `apart` to both sides of x."""
    at = [(x - apart, y), (x + apart, y)] if apart else [(x, y)]
    white = mark("white", *(disc(a, b, r) for a, b in at))
    return white, mark("dark", *(disc(a, b + r * 0.1, r * 0.55) for a, b in at))


def fitted(parts: list[Part]) -> tuple[Part, ...]:
    """The drawing centred, its longest side scaled to 2."""
    every = np.concatenate([o for p in parts for r in p.regions for o in r])
    low, high = every.min(0), every.max(0)
    centre, scale = (low + high) / 2, 2 / (high - low).max()
    return tuple(Part(p.paint, tuple([(o - centre) * scale for o in r] for r in p.regions), p.outlined) for p in parts)
