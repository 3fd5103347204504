# SPDX-License-Identifier: AGPL-3.0-or-later
"""Instances cut out of one image and laid over another: along their box, or along their silhouette.

A rectangle brings its own background along, and its straight edges tell what was pasted; a silhouette (GrabCut, Rother
et al. 2004, started from the box) has neither, where it can be trusted.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np

from fsdet.data.transforms import GREY, Jitter, Sample, colour, move_boxes

MARGIN = 4.0  # px around the box that a rectangle takes along
CONTEXT = 0.25  # share of the box's longer side around it that GrabCut learns the background from
ROUNDS = 4  # of GrabCut
LOOKED_AT = 160  # px of the longer side that GrabCut sees at most: it costs seconds at 640
FILLED = (0.2, 0.97)  # a silhouette covers such a share of its box,
REACH = 0.85  # and spans at least so much of its width and height; anything else is not believed
MOST = 0.9  # of the canvas' side that a pasted instance may take
NEAR_SIZE = 0.25  # a matched size is that of an object, give or take a quarter,
ZOOM = 4.0  # and at most so many times the shot's own, or its own so many times it
HIDDEN = 0.5  # share of a box of the canvas under what is pasted, from which on it is no longer an object to find


@dataclass(frozen=True, eq=False)
class Cutout:
    """image uint8 [h, w, 3] RGB; alpha uint8 [h, w], 255 where it is the instance; box [4] xyxy px in it; label."""

    image: np.ndarray
    alpha: np.ndarray
    box: np.ndarray
    label: int
    outlined: bool = False  # alpha follows the instance, not its box


def rectangle(sample: Sample, index: int, margin: float = MARGIN) -> Cutout:
    """Instance `index` with its box and `margin` px around it, as far as the image goes."""
    left, top, right, bottom = _window(sample, index, margin)
    image = np.ascontiguousarray(sample.image[top:bottom, left:right])
    box = (sample.boxes[index] - np.array([left, top, left, top], np.float32)).astype(np.float32)
    return Cutout(image, np.full(image.shape[:2], 255, np.uint8), box, int(sample.labels[index]))


def silhouette(sample: Sample, index: int) -> Cutout | None:
    """Instance `index` along its outline; None where GrabCut finds none that fills its box plausibly. Deterministic."""
    side = float((sample.boxes[index, 2:] - sample.boxes[index, :2]).max())
    around = rectangle(sample, index, max(MARGIN, CONTEXT * side))
    mask = _grabbed(around.image, around.box)
    if mask is None:
        return None
    h, w = around.alpha.shape
    if mask.shape != (h, w):
        mask = cv2.resize(mask, (w, h), interpolation=cv2.INTER_LINEAR)
    return replace(around, alpha=cv2.GaussianBlur(mask, (3, 3), 0), outlined=True)


def _grabbed(image: np.ndarray, box: np.ndarray) -> np.ndarray | None:
    """uint8 [h, w] of `image` or of a smaller copy of it, 255 on the object in `box`; None as for a silhouette."""
    factor = min(1.0, LOOKED_AT / max(image.shape[:2]))
    if factor < 1:
        image, box = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA), box * factor
    h, w = image.shape[:2]
    x0, y0 = np.floor(box[:2]).astype(int).clip(0)
    x1, y1 = np.ceil(box[2:]).astype(int)
    x1, y1 = min(x1, w), min(y1, h)
    if min(x1 - x0, y1 - y0) < 8 or (x1 - x0) * (y1 - y0) >= 0.98 * h * w:
        return None  # too small for colour models, or no background to learn from
    found = np.zeros((h, w), np.uint8)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.setRNGSeed(0)
    cv2.grabCut(image, found, (int(x0), int(y0), int(x1 - x0), int(y1 - y0)), *models, ROUNDS,
                cv2.GC_INIT_WITH_RECT)  # fmt: skip
    mask = np.isin(found, (cv2.GC_FGD, cv2.GC_PR_FGD)).astype(np.uint8)
    inside = mask[y0:y1, x0:x1]
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows) or not FILLED[0] <= inside.mean() <= FILLED[1]:
        return None
    if np.ptp(rows) + 1 < REACH * (y1 - y0) or np.ptp(columns) + 1 < REACH * (x1 - x0):
        return None
    return mask * 255


def alone(sample: Sample, index: int) -> Sample:
    """The image with instance `index` as its only object: other boxes are grey as far as they do not cover it.

    What the image does not label exhaustively it still may show.
    """
    image = sample.image.copy()
    x0, y0, x1, y1 = _window(sample, index, 0.0)
    kept = image[y0:y1, x0:x1].copy()
    for other in range(len(sample.boxes)):
        left, top, right, bottom = _window(sample, other, 1.0)
        image[top:bottom, left:right] = GREY
    image[y0:y1, x0:x1] = kept
    return replace(sample, image=image, boxes=sample.boxes[index : index + 1], labels=sample.labels[index : index + 1])


def _window(sample: Sample, index: int, margin: float) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = sample.boxes[index]
    h, w = sample.image.shape[:2]
    return (round(max(0, x0 - margin)), round(max(0, y0 - margin)),
            round(min(w, x1 + margin)), round(min(h, y1 + margin)))  # fmt: skip


def paste(
    rng: np.random.Generator, canvas: Sample, cutout: Cutout, jitter: Jitter, *, match_size: bool = False
) -> Sample:
    """`cutout` laid over `canvas` at a random place, scale, colour and mirroring; a silhouette turns as well.

    Boxes of the canvas of which less than half stays visible are dropped.
    match_size: as large as a random object of the canvas. How large a shot is says little of its class: another
    photograph shows it from nearer or farther away.
    """
    size = canvas.image.shape[0]
    turn = jitter.degrees if cutout.outlined else 0.0
    angle, wanted = np.deg2rad(rng.uniform(-turn, turn)), rng.uniform(1 - jitter.scale, 1 + jitter.scale)
    if match_size and len(canvas.boxes):
        wanted = _matching(rng, canvas.boxes, cutout.box)
    mirror = -1.0 if rng.random() < jitter.flip else 1.0
    linear = np.array([[np.cos(angle) * mirror, -np.sin(angle)], [np.sin(angle) * mirror, np.cos(angle)]])
    h, w = cutout.alpha.shape
    span = np.abs(linear) @ [w, h]
    factor = min(wanted, MOST * size / span.max())
    pw, ph = np.maximum(np.rint(span * factor), 1).astype(int)
    linear = linear * factor
    matrix = np.concatenate((linear, (np.array([pw, ph]) / 2 - linear @ [w / 2, h / 2])[:, None]), 1)
    patch, alpha = _warped(colour(rng, cutout.image, jitter), matrix, pw, ph), _warped(cutout.alpha, matrix, pw, ph)
    at = np.array([rng.integers(0, size - pw + 1), rng.integers(0, size - ph + 1)])
    image = canvas.image.copy()
    under = image[at[1] : at[1] + ph, at[0] : at[0] + pw]
    weight = alpha[..., None].astype(np.float32) / 255
    under[:] = np.rint(under + weight * (patch.astype(np.float32) - under)).astype(np.uint8)
    box = _extent(alpha) if cutout.outlined else move_boxes(cutout.box[None], matrix, pw, ph)[0][0]
    return _with_box(replace(canvas, image=image), box + np.tile(at, 2), cutout.label)


def _matching(rng: np.random.Generator, boxes: np.ndarray, box: np.ndarray) -> float:
    """The factor that makes the longer side of `box` about as long as that of one of `boxes`."""
    like = boxes[rng.integers(len(boxes))]
    side = (like[2:] - like[:2]).max() * rng.uniform(1 / (1 + NEAR_SIZE), 1 + NEAR_SIZE)
    return float(np.clip(side / (box[2:] - box[:2]).max(), 1 / ZOOM, ZOOM))


def _warped(image: np.ndarray, matrix: np.ndarray, width: int, height: int) -> np.ndarray:
    """`image` under a 2x3 matrix of pixel edges, nothing where it does not reach."""
    centres = matrix.copy()
    centres[:, 2] += matrix[:, :2].sum(1) / 2 - 0.5
    edge = cv2.BORDER_REPLICATE if image.ndim == 3 else cv2.BORDER_CONSTANT
    return cv2.warpAffine(image, centres, (int(width), int(height)), flags=cv2.INTER_LINEAR, borderMode=edge)


def _extent(alpha: np.ndarray) -> np.ndarray:
    """[4] xyxy px of what is at least half opaque."""
    rows, columns = np.flatnonzero((alpha > 127).any(1)), np.flatnonzero((alpha > 127).any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float32)


def _with_box(canvas: Sample, box: np.ndarray, label: int) -> Sample:
    covered = np.concatenate((np.maximum(canvas.boxes[:, :2], box[:2]), np.minimum(canvas.boxes[:, 2:], box[2:])), 1)
    hidden = (covered[:, 2:] - covered[:, :2]).clip(0).prod(1) / (canvas.boxes[:, 2:] - canvas.boxes[:, :2]).prod(1)
    keep = hidden < HIDDEN
    return replace(canvas, boxes=np.concatenate((canvas.boxes[keep], box[None])).astype(np.float32),
                   labels=np.concatenate((canvas.labels[keep], [label])))  # fmt: skip
