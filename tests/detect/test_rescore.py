# SPDX-License-Identifier: AGPL-3.0-or-later
"""A second look: what it looks at, what it hears, and what it makes of both scores."""

import math

import cv2
import numpy as np
import pytest
import torch

from fsdet.boxes import iou_matrix
from fsdet.data.transforms import support_matrix
from fsdet.detect import rescore
from fsdet.detect.rescore import first_threshold, rescored
from fsdet.detect.scoring import Vocabulary, class_scores
from fsdet.models.build import build_model, model_spec
from fsdet.models.heads import unit
from fsdet.types import Detections

D, SIDE = 8, 64


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_model(model_spec("yolov8n", "P3-P5", 3, D, 16, "anchors", True, 3)).eval()


@pytest.fixture(scope="module")
def words():
    torch.manual_seed(1)
    return Vocabulary((0, 1, 2), (0, 1, 2), unit(torch.randn(2, D)), (7, 5))


def image(seed=0, size=96):
    return np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)


def detections(boxes, scores, labels):
    branch = [int(label > 2) for label in labels]
    return Detections(torch.tensor(boxes).float().reshape(-1, 4), torch.tensor(scores, dtype=torch.float32),
                      torch.tensor(labels, dtype=torch.int64), torch.tensor(branch, dtype=torch.uint8))  # fmt: skip


class Network:
    """Stands in for the head: every window holds the same places, whose scores `class_scores` is made to give."""

    def __init__(self, places, scores):
        self.places, self.scores, self.windows = torch.tensor(places).float(), torch.tensor(scores), []

    def install(self, monkeypatch, model):
        def dense(windows):
            self.windows.append(windows)
            return type("Dense", (), {"boxes": self.places[None].expand(len(windows), -1, -1)})

        monkeypatch.setattr(model, "dense", dense, raising=False)
        monkeypatch.setattr(rescore, "class_scores", lambda m, d, w: self.scores[None].expand(len(d.boxes), -1, -1))


def by_hand(model, words, picture, box, label):
    """The second look at one detection, by OpenCV's warp and one forward pass of one window."""
    matrix = support_matrix(np.asarray(box, np.float32), SIDE, rescore.ZOOM)
    window = cv2.warpAffine(picture, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR, borderValue=(114,) * 3)
    corners = np.asarray(box, np.float64).reshape(2, 2) @ matrix[:, :2].T + matrix[:, 2]
    with torch.inference_mode():
        dense = model.dense(torch.from_numpy(window).permute(2, 0, 1)[None].float() / 255)
        column = [0, 1, 2, 7, 5].index(label)
        scores = class_scores(model, dense, words)[0, :, column]
    overlap = iou_matrix(torch.tensor(corners.reshape(1, 4)).float(), dense.boxes[0])[0]
    return sum(sorted((scores * overlap).tolist())[-4:]) / 4


def test_a_score_is_the_geometric_mean_of_both_looks(model, words):
    boxes, labels, scores = [[20, 20, 50, 60], [5, 40, 30, 80], [60, 10, 90, 40]], [0, 7, 5], [0.9, 0.5, 0.3]
    pictures = [image(0), image(1)]
    found = [detections(boxes, scores, labels), detections(boxes[1:], scores[1:], labels[1:])]
    with torch.inference_mode():
        got = rescored(model, words, found, pictures, SIDE)
    for before, after, picture in zip(found, got, pictures, strict=True):
        assert len(after) == len(before) and after.scores.tolist() == sorted(after.scores.tolist(), reverse=True)
        for box, label, score in zip(before.boxes, before.labels.tolist(), before.scores.tolist(), strict=True):
            second = by_hand(model, words, picture, box.tolist(), label)
            [k] = (after.labels == label).nonzero()[:, 0].tolist()
            assert after.scores[k] == pytest.approx(math.sqrt(score * second), rel=2e-3, abs=1e-6)
            assert torch.equal(after.boxes[k], box) and after.branch[k] == int(label > 2)


def test_a_place_is_heard_by_what_it_says_and_how_far_it_speaks_of_the_box(model, words, monkeypatch):
    """The box 30 px wide is 48 px in the window, from 8 to 56; four places make its company."""
    places = [[8, 8, 56, 56], [8, 8, 56, 40], [8, 8, 56, 20], [8, 8, 56, 56], [8, 8, 56, 56], [0, 0, 4, 4]]
    said = [[0.0, 0, 0, s, 0.5] for s in (0.2, 0.6, 0.8, 0.1, 0.05, 0.9)]
    network = Network(places, said)
    network.install(monkeypatch, model)
    [got] = rescored(model, words, [detections([[30, 30, 60, 60]], [0.9], [7])], [image()], SIDE)
    assert got.scores.tolist() == pytest.approx([math.sqrt(0.9 * (0.2 + 0.4 + 0.2 + 0.1) / 4)])
    network.places, network.scores = network.places[5:], network.scores[5:]
    [got] = rescored(model, words, [detections([[30, 30, 60, 60]], [0.9], [7])], [image()], SIDE, threshold=-1)
    assert got.scores.tolist() == [0.0]  # nothing there at all


def test_only_the_surest_and_only_what_is_sure_enough_is_looked_at(model, words, monkeypatch):
    network = Network([[0, 0, 64, 64]], [[0.0] * 5])
    network.install(monkeypatch, model)
    many = rescore.LOOKS + 5
    boxes = [[10, 10, 50, 50]] * many
    sure = detections(boxes, np.linspace(0.9, 0.5, many).tolist(), [0] * many)
    faint = detections([*boxes[:3], [5, 5, 5, 40]], [0.9, rescore.LEAST / 2, 0.001, 0.0005], [1, 1, 1, 1])
    flat = detections([[5, 5, 5, 40]], [0.9], [1])
    sizes = [len(rescored(model, words, [d], [image()], SIDE)[0]) for d in (sure, faint, flat)]
    assert sum(len(w) for w in network.windows) == rescore.LOOKS + 1
    assert sizes == [5, 3, 1]  # what the second look does not see is gone; what it did not look at stays


def test_a_look_at_several_images_is_one_at_each(model, words):
    boxes = [[20, 20, 50, 60], [5, 40, 30, 80]]
    found = [detections(boxes, [0.9, 0.5], [0, 7]), detections([], [], []), detections(boxes, [0.6, 0.4], [5, 1])]
    pictures = [image(s) for s in range(3)]
    with torch.inference_mode():
        together = rescored(model, words, found, pictures, SIDE)
        alone = [rescored(model, words, [d], [p], SIDE)[0] for d, p in zip(found, pictures, strict=True)]
    assert [len(d) for d in together] == [2, 0, 2]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-6)
        assert torch.equal(one.labels, other.labels)


def test_more_windows_than_a_pass_holds_are_looked_at_in_several(model, words, monkeypatch):
    boxes, scores = [[20, 20, 50, 60], [5, 40, 30, 80], [60, 10, 90, 40]], [0.9, 0.5, 0.3]
    found = [detections(boxes, scores, [0, 7, 5])]
    with torch.inference_mode():
        [whole] = rescored(model, words, found, [image()], SIDE)
        monkeypatch.setattr(rescore, "PASS", 2)
        [parts] = rescored(model, words, found, [image()], SIDE)
    torch.testing.assert_close(whole.scores, parts.scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.0, 0.001, 0.02, 0.05, 0.25, 0.7, 1.0])
def test_nothing_below_the_first_threshold_can_reach_the_last_one(threshold):
    first = first_threshold(threshold)
    for score in np.linspace(0, 1, 401):
        best = math.sqrt(score) if score >= rescore.LEAST else score  # of all second looks
        if best > threshold:
            assert score >= first
    assert first <= threshold


@pytest.mark.parametrize("threshold", [0.01, 0.03, 0.1, 0.2])
def test_what_is_left_is_the_same_under_every_threshold(threshold, model, words):
    """As `select` and the least score of a first look leave it."""
    scores = torch.linspace(0.9, 0.004, 40)
    boxes = torch.rand(40, 4) * 40 + torch.tensor([0.0, 0, 40, 40])
    every = Detections(boxes, scores, torch.arange(40) % 3, torch.zeros(40, dtype=torch.uint8))
    kept = scores > first_threshold(threshold)
    fewer = Detections(boxes[kept], scores[kept], every.labels[kept], every.branch[kept])
    with torch.inference_mode():
        [whole], [part] = (rescored(model, words, [d], [image()], SIDE, t) for d, t in ((every, 0), (fewer, threshold)))
    sure = whole.scores > threshold
    assert 0 < len(part) < len(whole)
    torch.testing.assert_close(part.scores, whole.scores[sure], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(part.boxes, whole.boxes[sure])
