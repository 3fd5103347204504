# SPDX-License-Identifier: AGPL-3.0-or-later
"""ST-IoU by hand: frames in one track only count as zero, and every video weighs the same."""

import math

import numpy as np
import pytest

from evaluation.scenes import boxes, found
from fsdet.errors import FsdetError, ShapeError
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


def by_the_book(found_track, truth):
    """Frame by frame, corner by corner."""
    total, frames = 0.0, 0
    for frame in range(50):
        a, b = found_track.get(frame), truth.get(frame)
        frames += a is not None or b is not None
        if a is None or b is None:
            continue
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        inter = w * h if w > 0 and h > 0 else 0.0
        total += inter / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter)
    return total / frames


@pytest.mark.parametrize("seed", range(5))
def test_equals_the_definition_on_random_tracks(seed):
    rng = np.random.default_rng(seed)
    tracks = []
    for _ in range(2):
        frames = sorted(rng.permutation(50)[: int(rng.integers(1, 40))].tolist())
        tracks.append(dict(zip(frames, boxes(rng, len(frames), span=30).tolist(), strict=True)))
    assert st_iou(*tracks) == pytest.approx(by_the_book(*tracks), abs=1e-6) and by_the_book(*tracks) > 0
    assert st_iou(*tracks) == pytest.approx(st_iou(*reversed(tracks)), abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_box_or_score_is_refused_and_does_not_take_its_video_out_of_the_mean(value):
    broken = {0: (0, 0, value, 10), 1: BOX}
    for pair in (({1: BOX}, broken), (broken, {1: BOX})):
        with pytest.raises(FsdetError, match="frame 0"):
            mean_st_iou([{0: BOX}, pair[0]], [{0: BOX}, pair[1]])
    with pytest.raises(FsdetError, match="frame 3"):
        best_track({3: found([BOX, BOX], [0.4, math.nan], [1, 1])}, 1)
    assert best_track({3: found([BOX, HALF], [0.4, math.nan], [1, 0])}, 1) == {3: [0, 0, 10, 10]}


def test_the_best_box_of_the_class_is_followed():
    frames = {
        3: found([HALF, BOX, BOX], [0.4, 0.9, 0.5], [1, 0, 1]),
        4: found([BOX], [0.9], [0]),
        5: found([], [], []),
    }
    assert best_track(frames, 1) == {3: [0, 0, 10, 10]}
