# SPDX-License-Identifier: AGPL-3.0-or-later
"""Patterns that fill the body of an object: polygons of ink in unit coordinates, shared by base and novel classes.

Every pattern is a function (count, phase) -> [k, n, 2]: `count` periods across the object, `phase` in [0, 1) of one.
"""

from collections.abc import Callable

import numpy as np

REACH = 1.6  # patterns cover [-REACH, REACH], so that a turned pattern still fills the object


def _starts(count: float, phase: float) -> tuple[np.ndarray, float]:
    period = 2 / count
    k = int(np.ceil(REACH / period))
    return (np.arange(-k - 1, k + 1, dtype=np.float32) + np.float32(phase)) * period, period


def _bars(starts: np.ndarray, width: float) -> np.ndarray:
    x0, x1 = starts, starts + width
    low, high = np.full_like(x0, -REACH), np.full_like(x0, REACH)
    return np.stack([np.stack(c, -1) for c in ((x0, low), (x1, low), (x1, high), (x0, high))], 1)


def _stamps(shape: np.ndarray, count: float, phase: float, staggered: bool) -> np.ndarray:
    starts, period = _starts(count, phase)
    x, y = np.meshgrid(starts, starts)
    if staggered:
        x = x + (np.arange(len(starts)) % 2)[:, None] * period / 2
    centres = np.stack([x.ravel(), y.ravel()], -1)[:, None]
    return (centres + shape[None] * period).astype(np.float32)


def _ellipse(rx: float, ry: float, n: int = 12) -> np.ndarray:
    t = np.arange(n) * 2 * np.pi / n
    return np.stack([rx * np.cos(t), ry * np.sin(t)], -1).astype(np.float32)


def _ribbons(profile: np.ndarray, count: float, phase: float, height: float) -> np.ndarray:
    starts, period = _starts(count, phase)
    x = np.linspace(-REACH, REACH, len(profile), dtype=np.float32)
    top = np.stack([x, profile * period * height], -1)
    ribbon = np.concatenate([top, (top + np.float32([0, period * 0.5]))[::-1]])
    return ribbon[None] + np.stack([np.zeros_like(starts), starts], -1)[:, None]


def plain(count: float, phase: float) -> np.ndarray:
    return np.zeros((0, 3, 2), np.float32)


def stripes(count: float, phase: float) -> np.ndarray:
    starts, period = _starts(count, phase)
    return _bars(starts, period * 0.5)


def pinstripes(count: float, phase: float) -> np.ndarray:
    starts, period = _starts(count, phase)
    return _bars(starts, period * 0.26)


def checks(count: float, phase: float) -> np.ndarray:
    starts, period = _starts(count, phase)
    k = np.arange(len(starts))
    x, y = np.meshgrid(starts, starts)
    odd = (k[:, None] + k[None]) % 2 == 1
    corner = np.stack([x[odd], y[odd]], -1)[:, None]
    return corner + np.float32([[0, 0], [1, 0], [1, 1], [0, 1]])[None] * period


def diamonds(count: float, phase: float) -> np.ndarray:
    return _stamps(np.float32([[0, -0.42], [0.28, 0], [0, 0.42], [-0.28, 0]]), count, phase, True)


def dots(count: float, phase: float) -> np.ndarray:
    return _stamps(_ellipse(0.27, 0.27), count, phase, True)


def spots(count: float, phase: float) -> np.ndarray:
    """Blotches of uneven size, as on a cow."""
    rng = np.random.default_rng(int(phase * 1e6))
    out = _stamps(_ellipse(0.36, 0.3), count * 0.8, phase, True)
    centre = out.mean(1, keepdims=True)
    size = rng.uniform(0.5, 1.25, (len(out), 1, 1))
    wobble = rng.uniform(0.75, 1.25, (len(out), out.shape[1], 1))
    return (centre + rng.uniform(-0.07, 0.07, centre.shape) + (out - centre) * size * wobble).astype(np.float32)


def pluses(count: float, phase: float) -> np.ndarray:
    a, b = 0.12, 0.36
    plus = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    return _stamps(np.float32(plus), count, phase, False)


def rings(count: float, phase: float) -> np.ndarray:
    """Nested circles for an even-odd fill."""
    radii = (np.arange(1, int(count * 1.8) + 1) - 0.5 * phase) / count
    return np.stack([_ellipse(r, r, 32) for r in radii])


def rays(count: float, phase: float) -> np.ndarray:
    t = (np.arange(round(count * 2)) + phase) * 2 * np.pi / round(count * 2)
    half = np.pi / round(count * 2) / 2
    edge = [np.stack([np.cos(t + s), np.sin(t + s)], -1) * 2.2 for s in (-half, half)]
    return np.stack([np.zeros_like(edge[0]), *edge], 1).astype(np.float32)


def zigzag(count: float, phase: float) -> np.ndarray:
    return _ribbons(np.float32(np.arange(17) % 2), count, phase, 0.5)


def waves(count: float, phase: float) -> np.ndarray:
    return _ribbons(np.sin(np.linspace(0, 7 * np.pi, 49)).astype(np.float32), count, phase, 0.22)


def grid(count: float, phase: float) -> np.ndarray:
    starts, period = _starts(count, phase)
    bars = _bars(starts, period * 0.22)
    return np.concatenate([bars, bars[..., ::-1]])


def halves(count: float, phase: float) -> np.ndarray:
    x = (phase - 0.5) * 0.3
    return np.float32([[[x, -REACH], [REACH, -REACH], [REACH, REACH], [x, REACH]]])


_ALL = (plain, stripes, pinstripes, checks, diamonds, dots, spots, pluses, rings, rays, zigzag, waves, grid, halves)
PATTERNS: dict[str, Callable[[float, float], np.ndarray]] = {p.__name__: p for p in _ALL}
