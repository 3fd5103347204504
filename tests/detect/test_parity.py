# SPDX-License-Identifier: AGPL-3.0-or-later
"""Parity is refused for the smallest difference that counts, and for no other."""

import json

import pytest
import torch

from fsdet.detect.parity import TOLERANCE, Comparison
from fsdet.types import Detections

BOXES = torch.tensor([[[0.0, 0.0, 100.0, 50.0], [10.0, 10.0, 20.0, 20.0]]])
SCORES = torch.tensor([[[0.9, 0.1], [0.2, 0.5]]])


def detections(boxes=BOXES[0], scores=(0.9, 0.5), labels=(0, 1), branch=(0, 1)):
    return Detections(
        boxes.clone(), torch.tensor(scores), torch.tensor(labels), torch.tensor(branch, dtype=torch.uint8)
    )


def compared(boxes=BOXES, scores=SCORES, found=None):
    comparison = Comparison()
    comparison.raw((BOXES, SCORES), (boxes, scores))
    comparison.found("a.jpg", detections(), detections() if found is None else found)
    return comparison.result()


def moved(tensor, index, by):
    out = tensor.clone()
    out[index] += by
    return out


def test_the_same_is_parity_and_says_so_as_json():
    parity = compared()
    assert parity.ok and parity.images == 1 and parity.detections == 2 and "parity with PyTorch" in parity.describe()
    assert json.loads(json.dumps(parity.values()))["ok"] is True


@pytest.mark.parametrize(
    ("boxes", "scores", "ok"),
    [
        (moved(BOXES, (0, 0, 0), 0.009), SCORES, True),  # a ten thousandth of 100 px
        (moved(BOXES, (0, 0, 0), 0.011), SCORES, False),
        (moved(BOXES, (0, 1, 3), 0.002), SCORES, False),  # of 10 px
        (BOXES, moved(SCORES, (0, 1, 0), 0.9 * TOLERANCE), True),
        (BOXES, moved(SCORES, (0, 1, 0), -1.1 * TOLERANCE), False),
        (moved(BOXES, (0, 0, 0), float("nan")), SCORES, False),
        (BOXES, moved(SCORES, (0, 0, 0), float("nan")), False),
        (BOXES, SCORES[..., :1], False),
    ],
)
def test_raw_outputs_may_differ_by_a_ten_thousandth(boxes, scores, ok):
    assert compared(boxes, scores).ok is ok


def test_a_nan_is_not_forgotten_by_the_images_that_follow():
    comparison = Comparison()
    comparison.raw((BOXES, SCORES), (BOXES, moved(SCORES, (0, 0, 0), float("nan"))))
    comparison.raw((BOXES, SCORES), (BOXES, SCORES))
    assert not comparison.result().ok


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (detections(BOXES[0][:1], (0.9,), (0,), (0,)), "1 detection instead of 2"),
        (detections(labels=(0, 0)), "none like detection 1 (class 1"),
        (detections(branch=(1, 1)), "none like detection 0 (class 0"),
        (detections(scores=(0.9, 0.5002)), "none like detection 1"),
        (detections(moved(BOXES[0], (1, 0), 0.01)), "none like detection 1"),
    ],
)
def test_another_object_is_told_with_its_image(found, told):
    parity = compared(found=found)
    assert not parity.ok and parity.different[0].startswith(f"a.jpg: {told}") and told in parity.describe()


def test_equal_scores_may_come_in_another_order():
    assert compared(found=detections(BOXES[0].flip(0), (0.5, 0.9), (1, 0), (1, 0))).ok
