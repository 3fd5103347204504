# SPDX-License-Identifier: AGPL-3.0-or-later
"""Sheets hold every picture at its place and say whose it is."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fsdet.errors import ShapeError
from fsdet.pictures import Picture, colour, contact_sheet, episode_sheet
from fsdet.pictures.sheets import GAP, PAPER


def flat(shade, h=40, w=60) -> np.ndarray:
    return np.full((h, w, 3), shade, np.uint8)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "JPEG"
        return np.asarray(image)


def near(image: np.ndarray, shade) -> np.ndarray:
    """Pixels of `shade`, as far as JPEG keeps it."""
    return (np.abs(image.astype(int) - np.array(shade)) < 12).all(-1)


def test_contact_sheet_places_pictures_row_by_row():
    images = [flat(s) for s in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    sheet = contact_sheet(images, 2, cell=90)  # 60 x 40 becomes 90 x 60
    assert sheet.shape == (GAP + 2 * (60 + GAP), GAP + 2 * (90 + GAP), 3)
    centres = [(GAP + 30, GAP + 45), (GAP + 30, 2 * GAP + 135), (2 * GAP + 90, GAP + 45)]
    assert [tuple(sheet[c]) for c in centres] == [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    assert tuple(sheet[2 * GAP + 90, 2 * GAP + 135]) == PAPER  # the last place is empty


def test_contact_sheet_fits_any_shape_into_its_cell_and_prints_titles():
    images = [flat((9, 9, 9), 400, 40), flat((9, 9, 9), 7, 500)]
    bare, titled = (contact_sheet(images, 5, cell=100, titles=t) for t in ((), ("a long name " * 9, "b")))
    assert bare.shape[1] == GAP + 2 * (100 + GAP) and titled.shape[0] > bare.shape[0] == 100 + 2 * GAP
    strip = titled[GAP : GAP + 18]
    assert (strip != PAPER).any() and not (strip[:, : GAP - 1] != PAPER).any()


def test_contact_sheet_refuses_nothing_and_wrong_titles():
    for images, columns, titles in (([], 2, ()), ([flat(0)], 0, ()), ([flat(0)], 1, ("a", "b"))):
        with pytest.raises(ShapeError, match="contact_sheet expects"):
            contact_sheet(images, columns, titles=titles)


def test_episode_sheet_shows_supports_in_their_class_colour_beside_queries(tmp_path):
    supports = [Picture(flat((90, 90, 90)), [[5, 5, 50, 35]], title=n) for n in ("king", "king", "queen")]
    query = Picture(flat((60, 60, 60), 60, 60), [[10, 10, 40, 40]], ["king 0.9"], [0], [[12, 12, 42, 42]], ["king"])
    path = episode_sheet(supports, [query] * 4, tmp_path / "e" / "0.jpg", title="step 40", query_cell=200)
    sheet = read(path)
    left = sheet.shape[1] - (GAP + 2 * (200 + GAP))
    assert left > 2 * 136 and sheet.shape[0] > 2 * 200
    king, queen = (near(sheet[:, :left], colour(i)) for i in (0, 1))
    assert king.sum() > 2000 and queen.sum() > 2000
    assert np.nonzero(king)[0].max() < np.nonzero(queen)[0].min()  # class below class
    dashed = (sheet[:, left:].astype(int) @ np.array([-1, 2, -1])) > 150  # green, whatever JPEG made of it
    for rows in (slice(30, 260), slice(260, None)):
        for columns in (slice(0, 210), slice(210, None)):
            assert dashed[rows, columns].sum() > 100


def test_episode_sheet_without_supports_or_with_more_shots_than_it_shows(tmp_path):
    query = Picture(flat((60, 60, 60)))
    without = read(episode_sheet([], [query], tmp_path / "a.jpg"))
    ten, thirty = (
        read(episode_sheet([Picture(flat(90), title="ace")] * n, [query], tmp_path / "b.jpg")) for n in (10, 30)
    )
    assert without.shape[1] == GAP + 420 + GAP and ten.shape[1] > without.shape[1] + 5 * 136
    assert thirty.shape == ten.shape and (thirty != ten).any()  # "+ 20 more"
    with pytest.raises(ShapeError):
        episode_sheet([], [], tmp_path / "c.jpg")


def test_a_sheet_tells_what_boxes_mean_where_there_are_any(tmp_path):
    """Colours of boxes stand above pictures with boxes, true or found; above others only the title does."""
    bare, true, found = Picture(flat(60)), Picture(flat(60), truth=[[5, 5, 9, 9]]), Picture(flat(60), [[5, 5, 9, 9]])
    for queries, told in (([bare] * 9, False), ([bare] * 8 + [true], True), ([found] + [bare] * 8, True)):
        sheet = read(episode_sheet([], queries, tmp_path / "a.jpg", title="step 1"))
        assert (near(sheet[: GAP + 20, sheet.shape[1] // 2 :], PAPER).mean() < 0.99) == told
