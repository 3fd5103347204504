# SPDX-License-Identifier: AGPL-3.0-or-later
"""Objects that move in known ways keep their numbers, are steadier than they were seen, and no blink is an object."""

import pytest
import torch

from fsdet.boxes import iou_pairs
from fsdet.detect.tracks import UNSURE, Tracked, Tracker
from fsdet.types import Detections

SIZE = (200, 400)
LIMITS = torch.tensor([0.5, 0.3])


def seen(*rows: tuple[float, float, float, float], scores=None, labels=None) -> Detections:
    """Detections at centres (x, y) of (w, h) px."""
    x, y, w, h = torch.tensor(rows).reshape(-1, 4).unbind(1)
    boxes = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2), 1)
    n = len(boxes)
    return Detections(boxes, torch.tensor(scores or [0.9] * n), torch.tensor(labels or [0] * n, dtype=torch.int64),
                      torch.ones(n, dtype=torch.uint8))  # fmt: skip


def follow(frames: dict[int, Detections], rate: float = 10.0) -> dict[int, Tracked]:
    tracker = Tracker(LIMITS, rate)
    return {number: tracker.update(number, found, SIZE) for number, found in frames.items()}


def test_two_objects_that_pass_each_other_keep_their_numbers():
    """They come towards each other at 8 px a frame, 30 px apart in height, and overlap for some frames."""
    out = follow({t: seen((40 + 8 * t, 90, 60, 60), (360 - 8 * t, 120, 60, 60)) for t in range(40)})
    for t in range(2, 40):
        found = dict(zip(out[t].track.tolist(), out[t].boxes, strict=True))
        assert set(found) == {1, 2}
        assert abs(float(found[1][1]) - 60) < 1 and abs(float(found[2][1]) - 90) < 1, t
        assert abs(float(found[1][0]) - (10 + 8 * t)) < 1, "a constant velocity is followed without lag"


def test_boxes_are_steadier_than_they_were_seen_and_nearer_to_the_truth():
    truth = {t: seen((60 + 4 * t, 100, 50, 40)) for t in range(60)}
    noise = torch.randn(60, 4, generator=torch.Generator().manual_seed(0)) * 4
    shaken = {t: Detections(d.boxes + noise[t], d.scores, d.labels, d.branch) for t, d in truth.items()}
    out = follow(shaken)
    means = [torch.stack([iou_pairs(of[t].boxes, truth[t].boxes)[0] for t in range(10, 60)]).mean()
             for of in (shaken, out)]  # fmt: skip
    assert means[1] > means[0] + 0.01
    jumps = [torch.stack([of[t + 1].boxes - of[t].boxes for t in range(10, 59)]).std(0).mean() for of in (shaken, out)]
    assert jumps[1] < 0.8 * jumps[0]


def test_an_object_that_fades_goes_on_but_none_begins_so():
    faint = 1.1 * UNSURE * float(LIMITS[0])
    steady = [0.9, 0.9, faint, faint, 0.9]
    out = follow({t: seen((100, 100, 40, 40), (300, 100, 40, 40), scores=[s, faint]) for t, s in enumerate(steady)})
    assert [len(o) for o in out.values()] == [1] * 5 and all(o.track.tolist() == [1] for o in out.values())
    torch.testing.assert_close(out[3].scores, torch.tensor([(0.9 + 0.9 + 2 * faint) / 4]))
    fainter = 0.9 * UNSURE * float(LIMITS[0])
    assert len(follow({0: seen((100, 100, 40, 40)), 1: seen((100, 100, 40, 40), scores=[fainter])})[1]) == 0


def test_limits_are_those_of_the_class_and_classes_do_not_mix():
    assert Tracker(LIMITS, 10).least == pytest.approx(UNSURE * 0.3)
    out = follow({t: seen((100, 100, 40, 40), (102, 100, 40, 40), scores=[0.4, 0.4], labels=[0, 1]) for t in range(3)})
    assert [o.labels.tolist() for o in out.values()] == [[1]] * 3
    out = follow({0: seen((100, 100, 40, 40)), 1: seen((100, 100, 40, 40), labels=[1])})
    assert len(out[1]) == 0, "another class is another object, seen once"


def test_what_is_seen_once_is_not_shown_but_in_the_first_frame():
    frames = {t: seen((100, 100, 40, 40)) for t in range(6)}
    frames[3] = seen((100, 100, 40, 40), (300, 50, 40, 40))
    assert [len(o) for o in follow(frames).values()] == [1] * 6
    late = {t: seen() for t in range(2)} | {t: seen((100, 100, 40, 40)) for t in (2, 3, 4)}
    assert [len(o) for o in follow(late).values()] == [0, 0, 0, 1, 1]


def test_out_of_sight_for_less_than_a_second_is_the_same_object():
    moving = {t: seen((40 + 6 * t, 100, 60, 60)) for t in range(40)}
    short = {t: seen() if 10 <= t < 18 else d for t, d in moving.items()}
    out = follow(short)
    assert len(out[12]) == 0 and out[18].track.tolist() == out[39].track.tolist() == [1]
    long = {t: seen() if 10 <= t < 24 else d for t, d in moving.items()}
    assert follow(long)[39].track.tolist() == [2]


def test_frames_that_are_left_out_count_as_time():
    out = follow({t: seen((40 + 6 * t, 100, 30, 30)) for t in (0, 1, 2, 3, 9, 10)})
    assert out[10].track.tolist() == [1] and abs(float(out[10].boxes[0, 0]) - 85) < 1


def test_boxes_stay_in_the_frame_and_nothing_gives_nothing():
    out = follow({t: seen((10 - 4 * t, 100, 40, 40)) for t in range(5)})
    assert (out[4].boxes >= 0).all()
    empty = follow({0: seen()})[0]
    assert len(empty) == 0 and empty.boxes.shape == (0, 4) and empty.track.dtype == torch.int64
