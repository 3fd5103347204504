# SPDX-License-Identifier: AGPL-3.0-or-later
"""Textured backgrounds. Every function is (rng, side) -> [side, side, 3] float32 RGB, 0..255."""

import cv2
import numpy as np

Rng = np.random.Generator


def noise(rng: Rng, side: int, octaves: tuple[int, ...] = (3, 6, 12, 24, 48), stretch: float = 1.0) -> np.ndarray:
    """[side, side] smooth noise of several octaves, 0..1; `stretch` draws it out vertically."""
    out = np.zeros((side, side), np.float32)
    for k, cells in enumerate(octaves):
        small = rng.random((max(round(cells / stretch), 2), cells), np.float32)
        out += cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC) * np.float32(0.6**k)
    low, high = out.min(), out.max()
    return (out - low) / (high - low)


Span = tuple[float, float]


def colour(rng: Rng, saturation: Span = (0.05, 0.5), value: Span = (0.4, 1.0)) -> np.ndarray:
    """A random RGB colour, mostly muted, [3] float32."""
    hsv = np.float32([[[rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(*value)]]])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0] * 255


def near(rng: Rng, base: np.ndarray, spread: float = 45) -> np.ndarray:
    return np.clip(base + rng.uniform(-spread, spread) + rng.uniform(-14, 14, 3), 0, 255).astype(np.float32)


def mixed(amount: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a + amount[..., None] * (b - a)


def clouds(rng: Rng, side: int) -> np.ndarray:
    return mixed(noise(rng, side), colour(rng), colour(rng))


def gradient(rng: Rng, side: int) -> np.ndarray:
    t = rng.uniform(0, 2 * np.pi)
    x, y = np.meshgrid(*[np.linspace(-0.5, 0.5, side, dtype=np.float32)] * 2)
    ramp = 0.5 + (x * np.cos(t) + y * np.sin(t)) * 0.7 + 0.15 * (noise(rng, side) - 0.5)
    return mixed(ramp.clip(0, 1).astype(np.float32), colour(rng), colour(rng))


def wood(rng: Rng, side: int) -> np.ndarray:
    grain = noise(rng, side, (4, 9, 30, 70), stretch=rng.uniform(5, 9))
    fine = 0.5 + 0.5 * np.sin(grain * rng.uniform(15, 40))
    board = rng.integers(24, 60)
    tone = rng.uniform(-0.15, 0.15, side // board + 2).astype(np.float32)[np.arange(side) // board]
    dark = np.float32([rng.uniform(95, 170), rng.uniform(62, 115), rng.uniform(30, 75)])
    out = mixed((0.55 * grain + 0.35 * fine + tone[None]).clip(0, 1), dark, dark * rng.uniform(1.25, 1.65))
    out[:, :: int(board)] *= 0.6
    return out if rng.random() < 0.5 else out.transpose(1, 0, 2)


def grass(rng: Rng, side: int) -> np.ndarray:
    ground = np.float32([rng.uniform(40, 120), rng.uniform(110, 185), rng.uniform(30, 90)])
    out = mixed(noise(rng, side), ground * 0.7, ground * 1.15).clip(0, 255).astype(np.uint8)
    for shade in (0.6, 0.85, 1.1, 1.3):
        foot = rng.integers(0, side, (90, 2))
        tip = foot + np.stack([rng.integers(-5, 6, 90), -rng.integers(5, 15, 90)], 1)
        blades = list(np.stack([foot, tip], 1).astype(np.int32))
        cv2.polylines(out, blades, False, _rgb(near(rng, ground * shade, 12)), 1, cv2.LINE_AA)
    return out.astype(np.float32)


def tiles(rng: Rng, side: int) -> np.ndarray:
    cell, joint = int(rng.integers(18, 56)), int(rng.integers(1, 4))
    count = side // cell + 2
    base = colour(rng)
    tone = base + rng.uniform(-28, 28, (count, count, 1)).astype(np.float32)
    if rng.random() < 0.4:
        tone[(np.indices((count, count)).sum(0) % 2) == 1] = near(rng, base, 70)
    at = np.arange(side) + int(rng.integers(0, cell))
    out = tone[at // cell][:, at // cell] + 26 * (noise(rng, side)[..., None] - 0.5)
    out[(at % cell) < joint] = out[:, (at % cell) < joint] = near(rng, base * 0.7, 30)
    return out


def bricks(rng: Rng, side: int) -> np.ndarray:
    high, wide = int(rng.integers(10, 24)), int(rng.integers(28, 60))
    base, mortar = colour(rng, (0.2, 0.6), (0.35, 0.75)), colour(rng, (0, 0.12), (0.5, 0.85))
    y = np.arange(side)[:, None] + int(rng.integers(0, high))
    x = np.arange(side)[None] + (y // high % 2) * (wide // 2)
    tone = rng.uniform(-30, 30, (side // high + 2, (side + wide) // wide + 2)).astype(np.float32)
    out = base + tone[y // high, x // wide][..., None] + 30 * (noise(rng, side)[..., None] - 0.5)
    return np.where(((y % high < 2) | (x % wide < 2))[..., None], mortar, out).astype(np.float32)


def fabric(rng: Rng, side: int) -> np.ndarray:
    y, x = np.mgrid[:side, :side].astype(np.float32)
    t, f = rng.uniform(0, np.pi), rng.uniform(0.8, 1.7)
    u, v = x * np.cos(t) + y * np.sin(t), -x * np.sin(t) + y * np.cos(t)
    weave = 0.5 + 0.25 * np.sin(u * f) + 0.25 * np.sin(v * f)
    base = colour(rng)
    out = mixed(0.6 * weave + 0.4 * noise(rng, side), base, near(rng, base, 60))
    if rng.random() < 0.6:
        band = 0.5 + 0.5 * np.sign(np.sin(u * rng.uniform(0.08, 0.3)))
        out = mixed(band * np.float32(rng.uniform(0.2, 0.7)), out, near(rng, base, 80))
    return out


def gravel(rng: Rng, side: int) -> np.ndarray:
    base = colour(rng, (0, 0.3), (0.35, 0.8))
    out = mixed(noise(rng, side), base * 0.7, base).astype(np.uint8)
    for _ in range(int(rng.integers(70, 160))):
        centre, axes = rng.integers(0, side, 2).tolist(), rng.integers(2, 9, 2).tolist()
        cv2.ellipse(out, centre, axes, float(rng.uniform(0, 180)), 0, 360, _rgb(near(rng, base, 50)), -1, cv2.LINE_AA)
    return out.astype(np.float32)


def streaks(rng: Rng, side: int) -> np.ndarray:
    out = clouds(rng, side).astype(np.uint8)
    for _ in range(int(rng.integers(4, 16))):
        ends = rng.integers(-20, side + 20, 4).tolist()
        cv2.line(out, ends[:2], ends[2:], _rgb(colour(rng)), int(rng.integers(1, 5)), cv2.LINE_AA)
    return out.astype(np.float32)


def patches(rng: Rng, side: int) -> np.ndarray:
    """Plain areas of colour with soft or hard borders, as in an illustration."""
    out, field = np.zeros((side, side, 3), np.float32), noise(rng, side, (2, 4, 7))
    edges = np.linspace(0, 1, int(rng.integers(3, 7)))
    for low in edges:
        out[field >= low] = colour(rng, (0.05, 0.6))
    return out + 18 * (noise(rng, side, (24, 60))[..., None] - 0.5)


STYLES = (clouds, gradient, wood, grass, tiles, bricks, fabric, gravel, streaks, patches)


def backdrop(rng: Rng, side: int) -> np.ndarray:
    """A background in one of STYLES, with uneven light."""
    out = STYLES[int(rng.integers(len(STYLES)))](rng, side)
    light = 1 + rng.uniform(0, 0.35) * (noise(rng, side, (2, 3)) - 0.5)
    return (out * light[..., None]).clip(0, 255).astype(np.float32)


def _rgb(c: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in np.clip(c, 0, 255))
