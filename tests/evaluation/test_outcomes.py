# SPDX-License-Identifier: AGPL-3.0-or-later
"""Each object is found or missed once, each sure detection is a hit or false, and the reason is the one drawn here."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fsdet.errors import ShapeError
from fsdet.evaluation.confusion import confusion_matrix
from fsdet.evaluation.outcomes import FALSE, HIT, MISS, outcomes
from fsdet.types import Detections, ImageRecord

CUP, JAR = 0, 1
LIMITS = {CUP: 0.25, JAR: 0.25}


def square(x, y=0, side=10):
    return [x, y, x + side, y + side]


def found(*rows):
    """Rows of (box, score, label)."""
    boxes, scores, labels = zip(*rows, strict=True) if rows else ([], [], [])
    return Detections(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), torch.tensor(scores),
                      torch.tensor(labels, dtype=torch.int64), torch.zeros(len(rows), dtype=torch.uint8))  # fmt: skip


def image(*boxes, labels, **more):
    return ImageRecord(Path("a.jpg"), (100, 100), boxes, labels, **more)


def told(record, *rows, limits=LIMITS):
    return [(o.kind, o.label, round(o.score, 2), o.why, o.other) for o in outcomes([record], [found(*rows)], limits)]


def test_every_reason_by_falling_score():
    record = image(square(0), square(20), square(40), square(60), labels=[CUP, CUP, CUP, JAR])
    rows = [
        (square(0), 0.9, CUP),  # hit
        (square(1), 0.8, CUP),  # the same object again
        (square(26), 0.7, CUP),  # IoU 4 / 16 with the second cup
        (square(60), 0.6, CUP),  # on a jar
        (square(80), 0.5, CUP),  # on nothing
        (square(20), 0.2, CUP),  # below the limit
    ]
    assert told(record, *rows) == [
        (HIT, CUP, 0.9, "", -1), (FALSE, CUP, 0.8, "second", -1), (FALSE, CUP, 0.7, "loose", -1),
        (FALSE, CUP, 0.6, "other", JAR), (FALSE, CUP, 0.5, "nothing", -1), (MISS, CUP, 0.2, "weak", -1),
        (MISS, CUP, 0.0, "unseen", -1), (MISS, JAR, 0.0, "called", CUP),
    ]  # fmt: skip


def test_boxes_are_those_of_the_detection_and_of_the_missed_object():
    record = image(square(0), square(50), labels=[CUP, CUP])
    hit, miss = outcomes([record], [found((square(1), 0.9, CUP))], LIMITS)
    assert hit.box.tolist() == square(1) and miss.box.tolist() == square(50)


def test_the_better_of_two_detections_claims_the_object():
    record = image(square(0), labels=[CUP])
    assert told(record, (square(2), 0.5, CUP), (square(0), 0.4, CUP)) == [
        (HIT, CUP, 0.5, "", -1),
        (FALSE, CUP, 0.4, "second", -1),
    ]


def test_one_detection_on_two_objects_finds_one_and_is_no_other_name_for_the_second():
    record = image(square(0), square(2), labels=[CUP, CUP])
    assert told(record, (square(0), 0.9, CUP)) == [(HIT, CUP, 0.9, "", -1), (MISS, CUP, 0.0, "unseen", -1)]


def test_classes_without_a_limit_are_not_judged_and_a_limit_is_a_class_s_own():
    record = image(square(0), square(20), labels=[CUP, JAR])
    rows = [(square(0), 0.5, CUP), (square(20), 0.5, JAR)]
    assert told(record, *rows, limits={JAR: 0.6}) == [(MISS, JAR, 0.5, "weak", -1)]


def test_a_crowd_and_a_class_that_is_not_labelled_throughout_make_nothing_false():
    crowded = image(square(0, side=50), labels=[CUP], crowd=[True])
    assert told(crowded, (square(5), 0.9, CUP)) == []
    known = image(labels=[], exhaustive=frozenset({JAR}))
    assert told(known, (square(5), 0.9, CUP), (square(5), 0.8, JAR)) == [(FALSE, JAR, 0.8, "nothing", -1)]


def test_nothing_is_found_in_nothing():
    assert told(image(labels=[])) == []
    with pytest.raises(ShapeError, match="1 images, got 0"):
        outcomes([image(labels=[])], [], LIMITS)


def test_hits_are_as_many_as_the_confusion_matrix_counts_when_classes_lie_apart():
    rng = np.random.default_rng(0)
    records, all_found = [], []
    for _ in range(20):
        places = rng.permutation(9)[:5] * 11
        records.append(image(*[square(x) for x in places], labels=rng.integers(0, 2, 5)))
        near = [(square(x + rng.uniform(-4, 4)), float(rng.uniform(0.2, 1)), label)
                for x, label in zip(places, records[-1].labels.tolist(), strict=True)]  # fmt: skip
        all_found.append(found(*near))
    got = [o for o in outcomes(records, all_found, LIMITS) if o.kind == HIT]
    matrix = confusion_matrix(records, all_found, 2, 0.25, 0.5)
    assert len(got) == matrix[0, 0] + matrix[1, 1] > 20
