# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pixels and boxes move together: a bright rectangle is found again where its box says it is."""

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from fsdet.data.transforms import (
    GREY,
    Disguise,
    Jitter,
    Sample,
    augment,
    colour,
    letterbox,
    mosaic,
    move_boxes,
    random_affine,
    resize_long,
    support_window,
    warp,
)

FULL = Jitter(1.0, 10.0, 0.1, 0.5, 0.5, (0.015, 0.7, 0.4), 0.5)


def rectangle(height=80, width=120, box=(30, 20, 70, 50), label=3, shade=255):
    image = np.zeros((height, width, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = shade
    return Sample(image, np.array([box], np.float32), np.array([label]))


def bright_extent(image):
    ys, xs = np.nonzero((image > 200).all(-1))
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


@pytest.mark.parametrize("mirror", [False, True])
def test_a_mirrored_or_shifted_image_stays_exactly_under_its_boxes(mirror):
    matrix = np.array([[-1.0, 0, 125], [0, 1, 3]]) if mirror else np.array([[1.0, 0, 7], [0, 1, 3]])
    out = warp(rectangle(), matrix, 160)
    assert out.boxes[0].tolist() == bright_extent(out.image).tolist()


def test_doubling_covers_exactly_the_doubled_box():
    out = warp(rectangle(), np.array([[2.0, 0, -20], [0, 2, 0]]), 160)
    np.testing.assert_allclose(out.boxes[0], bright_extent(out.image), atol=1.0)
    centre = (out.boxes[0, :2] + out.boxes[0, 2:]) / 2
    np.testing.assert_allclose(centre, (bright_extent(out.image)[:2] + bright_extent(out.image)[2:]) / 2, atol=0.01)


@pytest.mark.parametrize("seed", range(8))
def test_affine_moves_the_box_with_its_pixels(seed):
    rng = np.random.default_rng(seed)
    sample = rectangle()
    matrix = random_affine(rng, Jitter(translate=0.1, scale=0.5, flip=0.5), (60, 40), 160)
    out = warp(sample, matrix, 160)
    np.testing.assert_allclose(out.boxes[0], bright_extent(out.image), atol=1.6)


def test_rotation_encloses_what_torchvision_encloses():
    sample = rectangle(100, 100)
    centre, angle = 50.0, 30.0
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    matrix = np.array([[c, -s, centre - c * centre + s * centre], [s, c, centre - s * centre - c * centre]])
    boxes, _ = move_boxes(sample.boxes, matrix, 100, 100)
    given = tv_tensors.BoundingBoxes(torch.from_numpy(sample.boxes), format="XYXY", canvas_size=(100, 100))
    theirs = v2.functional.rotate(given, -angle, center=[centre, centre])
    np.testing.assert_allclose(boxes, theirs.numpy(), atol=1e-3)


def test_a_box_leaving_the_canvas_is_clipped_then_dropped():
    boxes = np.array([[-10, 10, 10, 30], [-95, 10, 5, 30], [200, 200, 220, 220], [10, 10, 11, 40]], np.float32)
    moved, keep = move_boxes(boxes, np.eye(2, 3), 100, 100)
    assert keep.tolist() == [True, False, False, False]
    assert moved[0].tolist() == [0, 10, 10, 30]


def test_no_boxes_stay_no_boxes():
    empty = Sample(np.zeros((40, 40, 3), np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    for samples in ([empty], [empty] * 4):
        out = augment(np.random.default_rng(0), samples, FULL, 64)
        assert out.boxes.shape == (0, 4) and out.image.shape == (64, 64, 3)


@pytest.mark.parametrize("seed", range(6))
def test_mosaic_puts_each_tiles_box_on_its_own_pixels(seed):
    shades = (60, 120, 180, 240)
    tiles = [rectangle(96, 96, (20, 20, 70, 76), label=i, shade=s) for i, s in enumerate(shades)]
    out = mosaic(np.random.default_rng(seed), tiles, Jitter(scale=0.3, translate=0.1, flip=0.5), 96)
    assert len(out.boxes)
    for box, label in zip(out.boxes, out.labels, strict=True):
        x0, y0, x1, y1 = np.round(box + np.array([2, 2, -2, -2])).astype(int)
        inner = out.image[y0:y1, x0:x1]
        assert (np.abs(inner.astype(int) - shades[label]) <= 2).mean() > 0.98


def test_mosaic_knows_only_what_every_tile_knows():
    a, b = rectangle(), rectangle()
    tiles = [
        a,
        Sample(b.image, b.boxes, b.labels, frozenset({1, 2})),
        a,
        Sample(a.image, a.boxes, a.labels, frozenset({2, 3})),
    ]
    assert mosaic(np.random.default_rng(0), tiles, Jitter(), 96).known == {2}
    assert mosaic(np.random.default_rng(0), [a] * 4, Jitter(), 96).known is None


def test_augmentation_is_a_function_of_its_generator():
    tiles = [rectangle(label=i) for i in range(4)]
    first, again, other = (augment(np.random.default_rng(s), tiles, FULL, 96) for s in (5, 5, 6))
    assert (first.image == again.image).all() and (first.boxes == again.boxes).all()
    assert not (first.image == other.image).all()


def test_augmentation_leaves_the_cached_image_alone():
    sample = rectangle()
    before = sample.image.copy()
    augment(np.random.default_rng(1), [sample], FULL, 96)
    support_window(sample, 0, 64, np.random.default_rng(1), FULL)
    colour(np.random.default_rng(1), sample.image, FULL)
    assert (sample.image == before).all()


@pytest.mark.parametrize(("height", "width"), [(50, 100), (100, 50), (64, 64), (1, 300)])
def test_letterbox_keeps_proportions_and_can_be_undone(height, width):
    image = np.full((height, width, 3), 255, np.uint8)
    out, factor, (left, top) = letterbox(image, 64)
    assert out.shape == (64, 64, 3) and factor == 64 / max(height, width)
    extent = bright_extent(out)
    np.testing.assert_allclose((extent - [left, top, left, top]) / factor, [0, 0, width, height], atol=1 / factor)
    if height != width:
        assert (out[0, 0] == GREY).all() or (out[:, 0] == GREY).all()


def test_resize_long_at_size_is_the_same_array():
    image = np.zeros((30, 64, 3), np.uint8)
    assert resize_long(image, 64)[0] is image


@pytest.mark.parametrize("box", [(30, 20, 70, 50), (0, 0, 120, 80), (118, 78, 120, 80), (2, 3, 9, 8)])
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_support_window_holds_the_whole_instance(box, seed):
    sample = rectangle(box=box)
    rng = None if seed is None else np.random.default_rng(seed)
    jitter = None if seed is None else Jitter(scale=0.25, flip=0.5)
    window, moved = support_window(sample, 0, 64, rng, jitter)
    assert window.shape == (64, 64, 3)
    assert moved[0] >= 0 and moved[1] >= 0 and moved[2] <= 64 and moved[3] <= 64
    np.testing.assert_allclose(moved, bright_extent(window), atol=2.1)


def test_support_window_without_a_generator_is_centred_at_native_scale():
    _, moved = support_window(rectangle(), 0, 64)
    assert moved.tolist() == [12, 17, 52, 47]


@pytest.mark.parametrize("turns", range(4))
def test_a_disguise_turns_boxes_with_their_pixels(turns):
    sample = rectangle(64, 64, (5, 10, 25, 50))
    change = Disguise((2, 0, 1), 40, turns)
    np.testing.assert_allclose(change.boxes(sample.boxes, 64)[0], bright_extent(change.image(sample.image)))


def test_a_disguise_changes_colours_alike_in_every_image():
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 200
    change = Disguise((1, 0, 2), 0, 0)  # red becomes green
    assert change.image(red)[0, 0].tolist() == [0, 200, 0]
    assert (change.image(red) == change.image(red)).all() and red[0, 0, 0] == 200
