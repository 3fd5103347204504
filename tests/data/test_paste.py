# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is pasted lies where its box says, whole or along its outline, and hides what it covers."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from fsdet.data.paste import LOOKED_AT, MARGIN, alone, paste, rectangle, silhouette
from fsdet.data.transforms import GREY, Jitter, Sample

FULL = Jitter(degrees=40.0, scale=0.4, flip=0.5)


def bright(height=80, width=120, box=(30, 20, 70, 50), label=9):
    image = np.zeros((height, width, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return Sample(image, np.array([box], np.float32), np.array([label]))


def disc(size=100, centre=(48, 52), axes=(30, 18), seed=0):
    """A textured blue ellipse on noisy green: (sample, true mask)."""
    rng = np.random.default_rng(seed)
    image = np.stack([rng.integers(20, 60, (size, size)), rng.integers(120, 180, (size, size)),
                      rng.integers(20, 60, (size, size))], -1).astype(np.uint8)  # fmt: skip
    mask = cv2.ellipse(np.zeros((size, size), np.uint8), centre, axes, 0, 0, 360, 1, -1).astype(bool)
    image[mask] = np.stack([rng.integers(10, 50, mask.sum()), rng.integers(10, 50, mask.sum()),
                            rng.integers(180, 250, mask.sum())], -1)  # fmt: skip
    ys, xs = np.nonzero(mask)
    box = np.array([[xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]], np.float32)
    return Sample(image, box, np.array([9])), mask


def extent(mask):
    ys, xs = np.nonzero(mask)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


def black(size=96, boxes=((0, 0, 96, 96), (1, 1, 3, 3)), labels=(1, 2)):
    return Sample(np.zeros((size, size, 3), np.uint8), np.array(boxes, np.float32), np.array(labels))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("margin", [0.0, MARGIN])
def test_a_rectangle_lies_where_its_box_says(seed, margin):
    canvas = black()
    out = paste(np.random.default_rng(seed), canvas, rectangle(bright(), 0, margin), FULL)
    assert out.labels.tolist()[-1] == 9 and out.labels.tolist()[0] == 1
    np.testing.assert_allclose(out.boxes[-1], extent((out.image > 127).all(-1)), atol=1.1)
    assert (canvas.image == 0).all() and len(canvas.boxes) == 2


@pytest.mark.parametrize("seed", range(8))
def test_an_outline_brings_no_background_and_turns_with_its_box(seed):
    sample, _ = disc()
    out = paste(np.random.default_rng(seed), black(), silhouette(sample, 0), FULL)
    blue, green = out.image[..., 2] > 90, out.image[..., 1] > 90
    np.testing.assert_allclose(out.boxes[-1], extent(blue), atol=2.1)
    assert green.sum() < 0.05 * blue.sum()


def test_the_outline_is_that_of_the_object():
    sample, mask = disc()
    cut = silhouette(sample, 0)
    found = np.zeros_like(mask)
    left, top = (sample.boxes[0, :2] - cut.box[:2]).astype(int)
    found[top : top + cut.alpha.shape[0], left : left + cut.alpha.shape[1]] = cut.alpha > 127
    assert (found & mask).sum() / (found | mask).sum() > 0.95
    assert (silhouette(sample, 0).alpha == cut.alpha).all()


@pytest.mark.parametrize("what", ["nothing but noise", "the whole image", "a few px"])
def test_no_outline_is_believed_where_none_can_be_found(what):
    sample, _ = disc()
    if what == "nothing but noise":
        flat = np.full_like(sample.image, 90)
        assert silhouette(Sample(flat, sample.boxes, sample.labels), 0) is None
    elif what == "the whole image":
        assert silhouette(Sample(sample.image, np.array([[0, 0, 100, 100]], np.float32), sample.labels), 0) is None
    else:
        assert silhouette(Sample(sample.image, np.array([[50, 50, 54, 54]], np.float32), sample.labels), 0) is None


def test_a_box_mostly_under_the_paste_is_dropped_and_an_empty_canvas_gains_one():
    whole = bright(40, 40, (0, 0, 40, 40))
    out = paste(np.random.default_rng(0), black(44, ((10, 10, 30, 30),), (1,)), rectangle(whole, 0), Jitter())
    assert out.labels.tolist() == [9]
    empty = Sample(np.zeros((44, 44, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    assert paste(np.random.default_rng(0), empty, rectangle(whole, 0), Jitter()).labels.tolist() == [9]


@pytest.mark.parametrize("seed", range(4))
def test_a_cutout_larger_than_the_canvas_is_shrunk_into_it(seed):
    out = paste(
        np.random.default_rng(seed),
        black(32, ((0, 0, 32, 32),), (1,)),
        rectangle(bright(400, 300, (5, 5, 290, 390)), 0),
        FULL,
    )
    x0, y0, x1, y1 = out.boxes[-1]
    assert 0 <= x0 < x1 <= 32 and 0 <= y0 < y1 <= 32


@pytest.mark.parametrize("side", [12, 30, 90])
def test_a_matched_paste_is_as_large_as_one_of_the_objects_there_whatever_its_own_size(side):
    canvas = black(200, ((0, 0, 20, 10), (150, 100, 190, 180)), (1, 2))
    shot = rectangle(bright(120, 120, (5, 5, 5 + side, 5 + side // 2)), 0)
    sides = []
    for seed in range(60):
        out = paste(np.random.default_rng(seed), canvas, shot, Jitter(scale=0.4), match_size=True)
        sides.append((out.boxes[-1, 2:] - out.boxes[-1, :2]).max())
    small, large = sorted(s for s in sides if s < 40), sorted(s for s in sides if s > 40)
    assert len(small) > 15 and len(large) > 15, "each object is a measure now and then"
    # factor 4 at most: 12 px become 48, 90 become 22.5
    for found, (low, high) in ((small, (16, 25)), (large, (64, 100))):
        low, high = (np.clip(edge, side / 4, side * 4) for edge in (low, high))
        assert low - 1.1 <= found[0] and found[-1] <= high + 1.1
    empty = replace(canvas, boxes=canvas.boxes[:0], labels=canvas.labels[:0])
    out = paste(np.random.default_rng(0), empty, shot, Jitter(), match_size=True)
    assert (out.boxes[-1, 2:] - out.boxes[-1, :2]).max() == pytest.approx(side, abs=1.1), "nothing to match: as it was"


@pytest.mark.parametrize("known", [None, frozenset({9})])
def test_a_shot_alone_greys_what_else_is_labelled_and_keeps_what_the_image_leaves_open(known):
    sample = bright(80, 120, (30, 20, 70, 50))
    boxes = np.array([[30, 20, 70, 50], [60, 40, 100, 70]], np.float32)
    out = alone(Sample(sample.image, boxes, np.array([9, 2]), known), 0)
    assert out.known == known and out.labels.tolist() == [9] and out.boxes.tolist() == [[30, 20, 70, 50]]
    assert (out.image[20:50, 30:70] == 255).all(), "the shot is whole"
    assert (out.image[55:68, 62:98] == GREY).all() and (out.image[:15] == 0).all()
    assert (sample.image[55:68, 62:98] == 0).all(), "the image in the cache is not touched"


@pytest.mark.parametrize("scale", [3, 6])
def test_the_outline_of_a_large_image_is_found_on_a_small_copy(scale, monkeypatch):
    """As good as on the image itself, whatever its size; GrabCut never sees more than LOOKED_AT px."""
    sample, mask = disc()
    large = cv2.resize(sample.image, None, fx=scale, fy=scale, interpolation=cv2.INTER_CUBIC)
    truth = cv2.resize(mask.astype(np.uint8), None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST).astype(bool)
    seen, real = [], cv2.grabCut
    monkeypatch.setattr(cv2, "grabCut", lambda image, *rest: seen.append(image.shape) or real(image, *rest))
    cut = silhouette(Sample(large, sample.boxes * scale, sample.labels), 0)
    found = np.zeros_like(truth)
    left, top = (sample.boxes[0, :2] * scale - cut.box[:2]).astype(int)
    found[top : top + cut.alpha.shape[0], left : left + cut.alpha.shape[1]] = cut.alpha > 127
    assert (found & truth).sum() / (found | truth).sum() > 0.95
    assert max(seen[0][:2]) == LOOKED_AT
