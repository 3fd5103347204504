# SPDX-License-Identifier: AGPL-3.0-or-later
"""One object, drawn once: a class and a pose make a patch with an alpha mask."""

import colorsys
from dataclasses import dataclass

import cv2
import numpy as np

from fsdet.data.drawing.catalogue import PALETTE, Kind
from fsdet.data.drawing.patterns import PATTERNS

Colour = tuple[int, int, int]
SHIFT = 4  # fractional bits of cv2's polygon coordinates


@dataclass(frozen=True)
class Pose:
    """How an instance differs from its class. Lengths in px, angles in degrees; `size` is the longest side.

    bend, bend_phase: amplitude (unit coordinates) and phases of a slow wave that moves the vertices.
    outline: width as a share of the size, 0 for none. light: direction of the shading, degrees.
    """

    size: float
    angle: float = 0.0
    flip: bool = False
    aspect: float = 1.0
    shear: float = 0.0
    tilt: tuple[float, float] = (0.0, 0.0)
    bend: float = 0.0
    bend_phase: tuple[float, float] = (0.0, 0.0)
    periods: float = 1.0
    phase: float = 0.1
    pattern_angle: float = 0.0
    hue: float = 0.0
    saturation: float = 1.0
    value: float = 1.0
    outline: float = 0.03
    light: float = 225.0
    shade: float = 0.18
    shadow: float = 0.35
    nudge: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True, eq=False)
class Patch:
    """rgb [h, w, 3] float32 0..255, already multiplied by alpha [h, w] float32 0..1."""

    rgb: np.ndarray
    alpha: np.ndarray


def random_pose(rng: np.random.Generator, size: float) -> Pose:
    """A pose with every jitter of the demo set drawn from `rng`."""
    u = rng.uniform
    return Pose(
        size=size,
        angle=float(np.clip(rng.normal(0, 17), -35, 35)),
        flip=bool(rng.random() < 0.5),
        aspect=float(np.exp(u(-0.15, 0.15))),
        shear=u(-0.1, 0.1),
        tilt=(u(-0.12, 0.12), u(-0.12, 0.12)),
        bend=u(0, 0.035),
        bend_phase=(u(0, 6.28), u(0, 6.28)),
        periods=float(np.exp(u(-0.18, 0.18))),
        phase=rng.random(),
        pattern_angle=u(-8, 8),
        hue=u(-0.02, 0.02),
        saturation=u(0.78, 1.12),
        value=u(0.8, 1.06),
        outline=0.0 if rng.random() < 0.3 else u(0.018, 0.04),
        light=u(0, 360),
        shade=u(0.05, 0.3),
        shadow=u(0, 0.5),
        nudge=(rng.random(), rng.random()),
    )


def draw_sticker(kind: Kind, pose: Pose) -> Patch:
    """The object on a transparent patch that holds it with a margin of 2 px."""
    scale = 4 if pose.size < 56 else 3 if pose.size < 84 else 2
    outlines = [o for p in kind.parts for r in p.regions for o in r]
    ink = pattern(kind, pose)
    placed, inked, (w, h) = _placed(outlines, ink, pose, scale)
    canvas = _painted(kind, pose, placed, inked, (h, w), pose.size * scale)
    small = cv2.resize(canvas, (w // scale, h // scale), interpolation=cv2.INTER_AREA).astype(np.float32)
    return Patch(small[..., :3] * _shading(small.shape[:2], pose), small[..., 3] / 255)


def pattern(kind: Kind, pose: Pose) -> np.ndarray:
    """[k, n, 2] polygons of ink in unit coordinates, turned to the class's angle."""
    ink = PATTERNS[kind.pattern](kind.periods * pose.periods, pose.phase)
    a = np.radians(kind.angle + pose.pattern_angle)
    return ink @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]], np.float32)


def jittered(colour: Colour, pose: Pose) -> Colour:
    """The colour with the pose's shift of hue, saturation and value."""
    h, s, v = colorsys.rgb_to_hsv(*(c / 255 for c in colour))
    rgb = colorsys.hsv_to_rgb((h + pose.hue) % 1, min(s * pose.saturation, 1), min(v * pose.value, 1))
    return tuple(round(255 * c) for c in rgb)  # type: ignore[return-value]


def _warp(p: np.ndarray, pose: Pose) -> np.ndarray:
    x, y = p[:, 0], p[:, 1]
    x, y = x + pose.bend * np.sin(3 * y + pose.bend_phase[0]), y + pose.bend * np.sin(3 * x + pose.bend_phase[1])
    x = (-x if pose.flip else x) * pose.aspect + pose.shear * y
    a = np.radians(pose.angle)
    x, y = np.cos(a) * x - np.sin(a) * y, np.sin(a) * x + np.cos(a) * y
    depth = 1 + pose.tilt[0] * x + pose.tilt[1] * y
    return np.stack([x / depth, y / depth], -1)


def _placed(outlines: list, ink: np.ndarray, pose: Pose, scale: int) -> tuple[list, list, tuple[int, int]]:
    """Outlines and ink in fixed-point px of a supersampled canvas, and the canvas's (width, height)."""
    shape = _warp(np.concatenate(outlines), pose)
    low, high = shape.min(0), shape.max(0)
    zoom = pose.size / float((high - low).max())
    margin = 2 + pose.outline * pose.size / 2
    start = low - (margin + np.float32(pose.nudge)) / zoom
    w, h = (int(np.ceil(v)) for v in (high - low) * zoom + 2 * margin + 1)
    unit = zoom * scale * 2**SHIFT
    fixed = np.round((shape - start) * unit).astype(np.int32)
    placed = np.split(fixed, np.cumsum([len(o) for o in outlines])[:-1])
    inked = np.round((_warp(ink.reshape(-1, 2), pose) - start) * unit).astype(np.int32).reshape(ink.shape)
    return placed, list(inked), (w * scale, h * scale)


def _painted(kind: Kind, pose: Pose, placed: list, inked: list, shape: tuple[int, int], size: float) -> np.ndarray:
    """[H, W, 4] uint8, supersampled; alpha is 0 or 255."""
    paints = PALETTE | {"body": kind.body, "accent": kind.accent, "ink": kind.ink}
    rgba = {n: (*jittered(paints[n], pose), 255) for n in {p.paint for p in kind.parts} | {"body", "ink", "dark"}}
    filling = np.empty((*shape, 4), np.uint8)
    filling[:] = rgba["body"]
    if inked:
        cv2.fillPoly(filling, inked, rgba["ink"], shift=SHIFT)
    canvas, mask, at = np.zeros((*shape, 4), np.uint8), np.zeros(shape, np.uint8), 0
    width = max(round(2 * pose.outline * size), 1)
    for part in kind.parts:
        regions = []
        for region in part.regions:
            regions.append(placed[at : at + len(region)])
            at += len(region)
        if part.outlined and pose.outline > 0:
            cv2.polylines(canvas, [o for r in regions for o in r], True, rgba["dark"], width, shift=SHIFT)
        for region in regions:
            if part.paint == "body":
                cv2.fillPoly(mask, region, 255, shift=SHIFT)
            else:
                cv2.fillPoly(canvas, region, rgba[part.paint], shift=SHIFT)
        if part.paint == "body":
            cv2.copyTo(filling, mask, canvas)
            mask[:] = 0
    return canvas


def _shading(shape: tuple[int, int], pose: Pose) -> np.ndarray:
    """[h, w, 1] factor that darkens the side away from the light."""
    a = np.radians(pose.light)
    y = np.linspace(-1, 1, shape[0], dtype=np.float32)[:, None] * np.float32(np.sin(a))
    x = np.linspace(-1, 1, shape[1], dtype=np.float32)[None] * np.float32(np.cos(a))
    return (1 - np.float32(pose.shade) * (0.5 - 0.5 * (x + y)).clip(0, 1))[..., None]
