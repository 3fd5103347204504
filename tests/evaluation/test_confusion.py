# SPDX-License-Identifier: AGPL-3.0-or-later
"""confusion_matrix counts as Ultralytics' ConfusionMatrix does, and leaves crowd boxes out of it."""

import numpy as np
import pytest
import torch
from ultralytics.utils.metrics import ConfusionMatrix

from evaluation.scenes import found, record, scene
from fsdet.errors import FsdetError, ShapeError
from fsdet.evaluation.confusion import confusion_matrix


@pytest.mark.parametrize("seed", range(5))
def test_equals_ultralytics(seed):
    records, detections = scene(np.random.default_rng(seed), images=15, classes=4)
    records = [record(i, r.boxes, r.labels) for i, r in enumerate(records)]
    oracle = ConfusionMatrix(names=dict(enumerate("abcd")))
    for r, d in zip(records, detections, strict=True):
        oracle.process_batch(
            {"cls": d.labels, "conf": d.scores, "bboxes": d.boxes},
            {"cls": torch.from_numpy(r.labels), "bboxes": torch.from_numpy(r.boxes)},
        )
    got = confusion_matrix(records, detections, 4)
    assert got.tolist() == oracle.matrix.astype(int).tolist() and np.trace(got) > 0


def test_by_hand():
    truth = record(0, [[0, 0, 20, 20], [50, 50, 90, 90], [200, 200, 240, 240]], [0, 1, 1])
    detections = found(
        [[0, 0, 20, 20], [0, 0, 20, 20], [50, 50, 90, 90], [120, 0, 140, 20], [200, 200, 240, 240]],
        [0.9, 0.8, 0.7, 0.6, 0.2],
        [0, 0, 0, 1, 1],
    )
    # right; the same again: false alarm of 0; class 0 said of a 1; false alarm of 1; too unsure: the last 1 is missed
    assert confusion_matrix([truth], [detections], 2).tolist() == [[1, 1, 1], [0, 0, 1], [0, 1, 0]]


def test_empty_images_and_crowds():
    empty, none = record(0, [], []), found([], [], [])
    assert not confusion_matrix([empty], [none], 2).any()
    crowd = record(1, [[0, 0, 100, 100]], [0], crowd=[True])
    inside, outside = found([[10, 10, 30, 30]], [0.9], [0]), found([[90, 90, 130, 130]], [0.9], [0])
    assert confusion_matrix([crowd, crowd], [inside, outside], 1).tolist() == [[0, 1], [0, 0]]
    assert confusion_matrix([empty], [inside], 1).tolist() == [[0, 1], [0, 0]]


def test_an_unused_detection_of_a_class_that_the_image_does_not_label_is_no_false_alarm():
    truth = record(0, [[0, 0, 20, 20]], [0], exhaustive=frozenset({0}))
    detections = found([[0, 0, 20, 20], [50, 50, 70, 70], [80, 80, 99, 99]], [0.9, 0.8, 0.7], [0, 1, 0])
    assert confusion_matrix([truth], [detections], 2).tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]
    said_wrong = found([[0, 0, 20, 20]], [0.9], [1])  # on a labelled object it is a confusion all the same
    assert confusion_matrix([truth], [said_wrong], 2).tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_wrong_input_is_refused():
    with pytest.raises(ShapeError):
        confusion_matrix([record(0, [], [])], [], 1)
    with pytest.raises(FsdetError, match=r"0\.\.0"):
        confusion_matrix([record(0, [[0, 0, 9, 9]], [1])], [found([], [], [])], 1)
