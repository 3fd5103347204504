# SPDX-License-Identifier: AGPL-3.0-or-later
"""Boxes land on the pixels they name, in the colour of their class, and labels stay on the image."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fsdet.errors import ShapeError
from fsdet.pictures import TRUTH, Picture, colour, draw_detections, save_jpeg
from fsdet.pictures.drawing import readable_on

GREY = np.full((120, 160, 3), 128, np.uint8)


def changed(image: np.ndarray, before: np.ndarray = GREY) -> np.ndarray:
    return (image != before).any(-1)


def test_the_outline_covers_exactly_the_boxs_border_pixels():
    image = draw_detections(GREY, [[20, 30, 60, 70]], colours=[3])
    where = np.zeros((120, 160), bool)
    where[30:70, 20:60] = True  # half-open: columns 20..59
    where[32:68, 22:58] = False  # two px wide
    assert (image[where] == colour(3)).all() and (changed(image) == where).all()


def test_the_callers_image_is_not_drawn_on():
    image = GREY.copy()
    drawn = draw_detections(image, [[20, 30, 60, 70]], ["king 0.9"])
    assert (image == GREY).all() and drawn.dtype == np.uint8 and drawn.shape == GREY.shape


def test_the_label_is_a_filled_strip_above_the_box_with_readable_letters():
    bare = draw_detections(GREY, [[20, 60, 100, 110]], colours=[1])
    labelled = draw_detections(GREY, [[20, 60, 100, 110]], ["queen 0.87"], [1])
    rows, columns = np.nonzero(changed(labelled, bare))
    assert rows.max() == 59 and columns.min() == 20  # flush with the box
    strip = labelled[rows.min() : 60, 20 : columns.max() + 1]
    assert 0.4 < (strip == colour(1)).all(-1).mean() < 0.95
    assert (strip == readable_on(colour(1))).all(-1).any()


@pytest.mark.parametrize("box", [[0, 0, 160, 120], [0, 0, 30, 10], [140, 100, 160, 120], [-50, -50, 20, 20]])
def test_labels_at_every_border_stay_inside(box):
    bare, labelled = draw_detections(GREY, [box]), draw_detections(GREY, [box], ["jack"])
    rows, columns = np.nonzero(changed(labelled, bare))
    assert rows.max() - rows.min() >= 11 and columns.max() - columns.min() >= 25


def test_labels_of_one_place_do_not_cover_each_other():
    box = [20, 50, 140, 90]
    one, other = (draw_detections(GREY, [box] * 2, texts, [2, 2]) for texts in (["left", ""], ["left", "right"]))
    assert (one[changed(one)] == other[changed(one)]).all(-1).mean() == 1
    assert changed(other).sum() > changed(one).sum() + 200


def test_truth_is_dashed_green_and_a_prediction_on_it_shows_between_the_dashes():
    image = draw_detections(GREY, [[20, 30, 100, 90]], colours=[0], truth=[[20, 30, 100, 90]])
    top = image[31, 20:100]
    green, red = (top == TRUTH).all(-1), (top == colour(0)).all(-1)
    assert 0.4 < green.mean() < 0.65 and (green | red).all() and red.any()


def test_small_images_are_enlarged_and_boxes_with_them():
    small = np.full((60, 80, 3), 128, np.uint8)
    image = draw_detections(small, [[10, 15, 30, 35]], colours=[5], long_side=640)
    assert image.shape == (480, 640, 3)
    assert tuple(image[120, 80]) == tuple(image[279, 239]) == colour(5)  # 8 times as large
    assert tuple(image[119, 79]) == tuple(image[280, 240]) == (128, 128, 128)
    assert draw_detections(GREY, [], long_side=100).shape == GREY.shape  # never made smaller


def test_empty_outside_and_degenerate_boxes_draw_nothing():
    nothing = [[200, 10, 220, 20], [-30, -30, -10, -10], [50, 50, 50, 60], [60, 60, 40, 80]]
    assert not changed(draw_detections(GREY, nothing, ["x"] * 4)).any()
    assert not changed(draw_detections(GREY, np.empty((0, 4)))).any()


def test_colours_differ_from_each_other_and_from_truth():
    table = np.array([colour(i) for i in range(40)], float)
    assert len({tuple(row) for row in table}) == 40
    assert np.linalg.norm(table[:14, None] - table[None, :14] + 999 * np.eye(14)[..., None], axis=-1).min() > 40
    assert np.linalg.norm(table - TRUTH, axis=-1).min() > 80


@pytest.mark.parametrize(
    "arguments",
    [
        (GREY[..., 0], [[0, 0, 1, 1]]),
        (GREY.astype(float), [[0, 0, 1, 1]]),
        (GREY[:0], [[0, 0, 1, 1]]),
        (GREY, [[0, 0, 1, 1]], ["a", "b"]),
        (GREY, [[0, 0, 1, 1]], [], [1, 2]),
    ],
)
def test_what_does_not_fit_is_refused(arguments):
    with pytest.raises(ShapeError, match="Picture expects"):
        draw_detections(*arguments)


def test_non_latin_names_are_drawn_as_themselves():
    cyrillic, boxes = draw_detections(GREY, [[20, 60, 150, 110]], ["ферзь"]), [[20, 60, 150, 110]]
    assert (cyrillic != draw_detections(GREY, boxes, ["\ufffd" * 5])).any()


def test_jpeg_is_written_whole_into_a_new_folder(tmp_path):
    path = save_jpeg(tmp_path / "episodes" / "1.jpg", Picture(GREY, [[20, 30, 60, 70]]).draw())
    with Image.open(path) as image:
        assert (image.format, image.size) == ("JPEG", (160, 120))
    assert [p.name for p in path.parent.iterdir()] == ["1.jpg"]


def test_importing_pictures_loads_neither_torch_nor_matplotlib_nor_cv2():
    code = "import sys, fsdet.pictures; print([m for m in ('torch', 'matplotlib', 'cv2') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
