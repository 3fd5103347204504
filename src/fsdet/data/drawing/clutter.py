# SPDX-License-Identifier: AGPL-3.0-or-later
"""Things that belong to no class, in the colours and patterns of the classes: what a detector must leave alone."""

import numpy as np

from fsdet.data.drawing.catalogue import PALETTE, Kind
from fsdet.data.drawing.geometry import Outline, Part, box, curve, disc, fitted, mark, paint, stroke
from fsdet.data.drawing.patterns import PATTERNS

Rng = np.random.Generator
NAMES = tuple(PATTERNS)
COLOURS = tuple(c for c in PALETTE.values())


def blob(rng: Rng) -> list[Outline]:
    n = int(rng.integers(5, 10))
    return [curve(_around(rng, n, 0.45, 1.0))]


def shard(rng: Rng) -> list[Outline]:
    return [_around(rng, int(rng.integers(4, 8)), 0.5, 1.0)]


def plate(rng: Rng) -> list[Outline]:
    return [disc(0, 0, 100, float(rng.uniform(60, 100)))]


def tablet(rng: Rng) -> list[Outline]:
    h = float(rng.uniform(30, 100))
    return [box(-100, -h, 100, h, float(rng.uniform(0, 0.8)) * h)]


def hoop(rng: Rng) -> list[Outline]:
    r = float(rng.uniform(45, 80))
    return [disc(0, 0, 100), disc(0, 0, r)]


def worm(rng: Rng) -> list[Outline]:
    x = np.linspace(-1, 1, int(rng.integers(3, 6)))
    path = np.stack([x, rng.uniform(-0.6, 0.6, len(x))], 1).astype(np.float32)
    return [stroke(path, float(rng.uniform(8, 34)), True)]


def pile(rng: Rng) -> list[Outline]:
    """Two or three simple shapes overlapping, so that many parts are no sign of an object."""
    out = []
    for _ in range(int(rng.integers(2, 4))):
        shape = (blob, shard, plate, tablet)[int(rng.integers(4))](rng)[0]
        out.append(shape * np.float32(rng.uniform(0.4, 0.8)) + rng.uniform(-0.5, 0.5, 2).astype(np.float32))
    return out


SHAPES = (blob, blob, shard, shard, plate, tablet, hoop, worm, pile, pile)


def random_clutter(rng: Rng) -> Kind:
    """A nameless thing, to be drawn like an object."""
    if rng.random() < 0.15:
        return _kind(rng, _scribble(rng))
    shape = SHAPES[int(rng.integers(len(SHAPES)))]
    outlines = shape(rng)
    if shape is hoop:
        return _kind(rng, [paint("body", outlines)])
    parts = [paint("body" if k == 0 else "accent", o) for k, o in enumerate(outlines)]
    if rng.random() < 0.35:
        parts.append(mark("accent", blob(rng)[0] * np.float32(0.35) + rng.uniform(-0.2, 0.2, 2).astype(np.float32)))
    return _kind(rng, parts)


def _around(rng: Rng, n: int, low: float, high: float) -> Outline:
    t = np.sort((np.arange(n) + rng.uniform(-0.35, 0.35, n)) * 2 * np.pi / n)
    r = rng.uniform(low, high, n)
    return np.stack([r * np.cos(t), r * np.sin(t)], 1).astype(np.float32)


def _scribble(rng: Rng) -> list[Part]:
    """Lines of strokes that look like writing from afar."""
    lines = []
    for row in range(int(rng.integers(1, 4))):
        starts = np.arange(-1, 0.9, 0.22) + rng.uniform(-0.04, 0.04, 9)
        for x in starts[rng.random(9) < 0.9]:
            path = np.stack([x + np.float32([0, 0.07, 0.14]), row * 0.42 + rng.uniform(-0.13, 0.13, 3)], 1)
            lines.append(stroke(path.astype(np.float32), 6))
    return [mark("body", *lines)]


def _kind(rng: Rng, parts: list[Part]) -> Kind:
    body, ink, accent = (COLOURS[int(i)] for i in rng.integers(len(COLOURS), size=3))
    pattern = NAMES[int(rng.integers(len(NAMES)))]
    return Kind("", "", fitted(parts), pattern, float(rng.uniform(3, 7)), float(rng.uniform(0, 180)), body, ink, accent)
