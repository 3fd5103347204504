# SPDX-License-Identifier: AGPL-3.0-or-later
"""voc07 follows the published evaluator's loop, one detection at a time, and hand-made cases."""

import numpy as np
import pytest

from evaluation.scenes import found, record, scene
from fsdet.evaluation.scorer import IOU_THRESHOLDS, Scorer
from fsdet.evaluation.voc07 import pixel_iou


def devkit(records, detections, label, threshold):
    """The VOC devkit's loop on its pixel indices: best detections first, each looks at its most overlapping box."""
    first = np.array([1, 1, 0, 0])  # [0, 10) is pixels 1 to 10
    rows = [
        (-float(s), i, b + first)
        for i, d in enumerate(detections)
        for s, b, c in sorted(zip(d.scores, d.boxes.double().numpy(), d.labels, strict=True), key=lambda x: -x[0])
        if c == label
    ]
    rows.sort(key=lambda row: row[0])
    taken, right, wrong = set(), [], []
    for _, i, (x1, y1, x2, y2) in rows:
        best, who = -1.0, None
        for j, (b, c) in enumerate(zip(records[i].boxes.astype(float), records[i].labels, strict=True)):
            if c != label:
                continue
            b = b + first
            w, h = min(x2, b[2]) - max(x1, b[0]) + 1, min(y2, b[3]) - max(y1, b[1]) + 1
            inter = w * h if w > 0 and h > 0 else 0.0
            union = (x2 - x1 + 1) * (y2 - y1 + 1) + (b[2] - b[0] + 1) * (b[3] - b[1] + 1) - inter
            if inter / union > best:
                best, who = inter / union, (i, j)
        if best > threshold and records[i].crowd[who[1]]:
            continue
        right.append(best > threshold and who not in taken)
        wrong.append(not right[-1])
        taken.add(who if best > threshold else None)
    npos = sum(int(((r.labels == label) & ~r.crowd).sum()) for r in records)
    recall, precision = np.cumsum(right) / npos, np.cumsum(right) / np.maximum(np.cumsum(right) + np.cumsum(wrong), 1)
    return np.mean([max(precision[recall >= t], default=0) for t in np.arange(0.0, 1.1, 0.1)])


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_devkit_loop(seed):
    records, detections = scene(np.random.default_rng(seed), images=14, classes=3)
    scores = Scorer(records, 3, "voc07").score(detections)
    for c in range(3):
        want = [devkit(records, detections, c, t) for t in IOU_THRESHOLDS]
        assert scores.class_ap50[c] == pytest.approx(want[0], abs=1e-12)
        assert scores.class_ap[c] == pytest.approx(np.mean(want), abs=1e-12)


def test_eleven_points_by_hand():
    # three boxes; detections by score: right, wrong, right, and the third box is never found
    boxes = [[0, 0, 19, 19], [50, 0, 69, 19], [100, 0, 119, 19]]
    detections = found([boxes[0], [0, 60, 9, 69], boxes[1]], [0.9, 0.8, 0.7], [0, 0, 0])
    scores = Scorer([record(0, boxes, [0, 0, 0])], 1, "voc07").score([detections])
    # recall 1/3 at precision 1 (levels 0, .1, .2, .3), recall 2/3 at precision 2/3 (levels .4, .5, .6), then 0
    assert scores.ap50() == pytest.approx((4 * 1 + 3 * 2 / 3) / 11)
    assert scores.recall() == pytest.approx(2 / 3)


def test_widths_count_the_last_pixel():
    assert pixel_iou(np.array([[1.0, 1, 10, 10]]), np.array([[1.0, 1, 5, 10], [21, 21, 30, 30]])).tolist() == [[0.5, 0]]


def test_iou_of_exactly_the_threshold_is_no_hit():
    # pixels 1 to 10 and 1 to 5: 50 of 100; without going over to pixel indices it would be 66 of 121
    ten = Scorer([record(0, [[0, 0, 10, 10]], [0])], 1, "voc07")
    assert ten.score([found([[0, 0, 5, 10]], [0.9], [0])]).ap50() == 0
    assert ten.score([found([[0, 0, 5.1, 10]], [0.9], [0])]).ap50() == 1


def test_recall_levels_are_those_of_the_published_evaluators():
    boxes = [[20 * i, 0, 20 * i + 10, 10] for i in range(10)]
    three = found(boxes[:3], [0.9, 0.8, 0.7], [0, 0, 0])
    # recall 3 / 10 does not reach numpy's arange level of .30000000000000004, so three of eleven levels count
    assert Scorer([record(0, boxes, [0] * 10)], 1, "voc07").score([three]).ap50() == pytest.approx(3 / 11)


def test_a_second_hit_is_wrong_and_a_hit_on_a_difficult_box_is_nothing():
    truth = [record(0, [[0, 0, 19, 19], [50, 0, 69, 19]], [0, 0], crowd=[False, True])]
    twice = found([[0, 0, 19, 19]] * 2 + [[50, 0, 69, 19]] * 2, [0.8, 0.7, 0.95, 0.9], [0] * 4)
    assert Scorer(truth, 1, "voc07").score([twice]).ap50() == 1  # the second hit comes after full recall
    counted = [record(0, truth[0].boxes, [0, 0])]
    # right (recall .5), wrong, right (recall 1, precision 2/3), wrong
    assert Scorer(counted, 1, "voc07").score([twice]).ap50() == pytest.approx((6 * 1 + 5 * 2 / 3) / 11)
