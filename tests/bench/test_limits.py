# SPDX-License-Identifier: AGPL-3.0-or-later
"""Which kind of mistake a detection is, on an image made by hand, and what taking a kind away leaves."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fsdet.types import Detections, ImageRecord

BASE = 2  # classes 0 and 1; 2 and 3 are novel
BOXES = np.array([[0, 0, 20, 20], [40, 40, 60, 60], [70, 0, 90, 20]], np.float32)
RECORD = ImageRecord(Path("a.png"), (100, 100), BOXES, np.array([2, 3, 0]))
ROWS = [  # box, label, kind, the novel object under it
    ([0, 0, 20, 20], 2, -1, 2),  # right
    ([0, 0, 20, 20], 3, 0, 2),  # class 3 on the object of class 2
    ([70, 0, 90, 20], 3, 1, -1),  # on a base object
    ([40, 40, 52, 60], 3, -1, 3),  # .6 of its object
    ([40, 40, 48, 60], 3, 2, -1),  # .4 of its object
    ([0, 70, 20, 90], 2, 3, -1),  # on nothing
    ([0, 0, 20, 20], 0, -1, 2),  # a base class is not looked at
]


@pytest.fixture
def limits(module):
    return module("limits")


def found(rows):
    boxes, labels = torch.tensor([r[0] for r in rows]).float(), torch.tensor([r[1] for r in rows])
    return Detections(boxes, torch.linspace(0.9, 0.1, len(rows)), labels, torch.ones(len(rows), dtype=torch.uint8))


def test_each_mistake_is_of_its_kind(limits):
    kind, name = limits.kinds(found(ROWS), RECORD, BASE)
    assert kind.tolist() == [r[2] for r in ROWS] and name.tolist() == [r[3] for r in ROWS]


def test_in_an_image_without_objects_every_novel_detection_is_on_nothing(limits):
    empty = ImageRecord(Path("b.png"), (100, 100), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))
    kind, name = limits.kinds(found(ROWS), empty, BASE)
    assert kind.tolist() == [3] * 6 + [-1] and set(name.tolist()) == {-1}


def test_what_is_taken_away_is_that_kind_and_no_other(limits):
    out = limits.mended([found(ROWS)], [RECORD], BASE)
    assert list(out) == list(limits.ROWS)
    assert {row: len(d) for row, [d] in out.items()} == dict(zip(limits.ROWS, [7, 6, 6, 6, 6, 7, 5], strict=True))
    [named] = out["named"]
    assert named.labels.tolist() == [2, 2, 3, 3, 3, 2, 0], "the second one takes the name of what it lies on"
