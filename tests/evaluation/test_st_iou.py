# SPDX-License-Identifier: AGPL-3.0-or-later
"""ST-IoU by hand: frames in one track only count as zero, and every video weighs the same."""

import math

import pytest

from evaluation.scenes import found
from fsdet.errors import ShapeError
from fsdet.evaluation.st_iou import best_track, mean_st_iou, st_iou

BOX, HALF = (0, 0, 10, 10), (0, 0, 5, 10)  # IoU .5


def test_frames_in_either_are_the_denominator():
    truth = {0: BOX, 1: BOX, 2: BOX}
    assert st_iou(truth, truth) == pytest.approx(1)
    assert st_iou({1: HALF, 2: BOX, 7: BOX}, truth) == pytest.approx((0.5 + 1) / 4)  # missed 0, invented 7
    assert st_iou({9: BOX}, truth) == 0 and st_iou({}, truth) == 0 and st_iou(truth, {}) == 0
    assert math.isnan(st_iou({}, {}))


def test_mean_is_over_videos_not_frames():
    long, short = {i: BOX for i in range(9)}, {0: BOX}
    assert mean_st_iou([long, {}, {}], [long, short, {}]) == pytest.approx(0.5)  # the third has nothing to follow
    assert math.isnan(mean_st_iou([], []))
    with pytest.raises(ShapeError):
        mean_st_iou([], [short])


def test_the_best_box_of_the_class_is_followed():
    frames = {
        3: found([HALF, BOX, BOX], [0.4, 0.9, 0.5], [1, 0, 1]),
        4: found([BOX], [0.9], [0]),
        5: found([], [], []),
    }
    assert best_track(frames, 1) == {3: [0, 0, 10, 10]}
