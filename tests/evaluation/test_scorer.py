# SPDX-License-Identifier: AGPL-3.0-or-later
"""Scorer gives pycocotools' figures on every class and on any subset of classes, and defined values on empty input."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from evaluation.scenes import found, record, scene
from fsdet.errors import ConfigError, FsdetError, ShapeError
from fsdet.evaluation.scorer import Scorer, fp_per_image


def xywh(box):
    x1, y1, x2, y2 = (float(v) for v in box)
    return [x1, y1, x2 - x1, y2 - y1]


def pycocotools(records, detections, classes, ids=None):
    """(AP, AP50, recall at .5 with 100 detections) over `ids` as pycocotools restricts them."""
    truth, results = COCO(), []
    annotations = [
        {"image_id": i, "category_id": int(c), "bbox": xywh(b), "area": xywh(b)[2] * xywh(b)[3], "iscrowd": int(crowd)}
        for i, r in enumerate(records)
        for b, c, crowd in zip(r.boxes, r.labels, r.crowd, strict=True)
    ]
    truth.dataset = {
        "info": {},
        "images": [{"id": i, "height": 320, "width": 320} for i in range(len(records))],
        "categories": [{"id": c} for c in range(classes)],
        "annotations": [{**a, "id": k} for k, a in enumerate(annotations, 1)],
    }
    for i, d in enumerate(detections):
        for k in d.scores.argsort(descending=True, stable=True)[:100]:
            box, label, score = xywh(d.boxes[k]), int(d.labels[k]), float(d.scores[k])
            results.append({"image_id": i, "category_id": label, "bbox": box, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        run = COCOeval(truth, truth.loadRes(results) if results else COCO(), "bbox")
        run.params.catIds = list(range(classes)) if ids is None else list(ids)
        run.evaluate()
        run.accumulate()
        run.summarize()
    recall = run.eval["recall"][0, :, 0, -1]
    return run.stats[0], run.stats[1], recall[recall > -1].mean() if (recall > -1).any() else -1


@pytest.mark.parametrize("seed", range(6))
def test_equals_pycocotools_on_all_classes_and_on_any_subset(seed):
    classes = 5
    records, detections = scene(np.random.default_rng(seed), images=12, classes=classes, levels=8 * (seed % 2))
    scores = Scorer(records, classes).score(detections)
    for ids in (None, [0], [1, 3], [4, 2, 0]):
        want = pycocotools(records, detections, classes, ids and sorted(ids))
        assert (scores.ap(ids), scores.ap50(ids), scores.recall(ids)) == pytest.approx(want, abs=1e-12)


def test_more_than_100_detections_of_an_image_are_cut_over_all_classes_before_scoring():
    records, detections = scene(np.random.default_rng(3), images=4, classes=2, noise=400)
    assert max(map(len, detections)) > 200
    scores, want = Scorer(records, 2).score(detections), pycocotools(records, detections, 2)
    assert (scores.ap(), scores.ap50(), scores.recall()) == pytest.approx(want, abs=1e-12)

    late = found(np.tile([0, 0, 9, 9], (101, 1)), [0.9] * 100 + [0.1], [0] * 100 + [1])
    assert Scorer([record(0, [[0, 0, 9, 9]], [1])], 2).score([late]).ap50() == 0


@pytest.mark.parametrize("metric", ["coco", "voc07"])
def test_no_detections_score_zero_and_no_ground_truth_nan(metric):
    records = [record(0, [[0, 0, 50, 50], [9, 9, 80, 80]], [1, 2], crowd=[False, True]), record(1, [], [])]
    none = [found([], [], [])] * 2
    scores = Scorer(records, 4, metric).score(none)
    assert (scores.ap(), scores.ap50(), scores.recall()) == (0, 0, 0)
    assert np.isnan(scores.class_ap).tolist() == [True, False, True, True]
    assert np.isnan([scores.ap([0, 2]), scores.ap50([3]), scores.recall([0]), scores.ap([])]).all()
    assert scores.class_precision.shape == (4, 101) and not scores.class_precision[1].any()


@pytest.mark.parametrize("metric", ["coco", "voc07"])
def test_a_split_without_images_scores_nan(metric):
    assert np.isnan(Scorer([], 3, metric).score([]).class_ap50).all()


@pytest.mark.parametrize("metric", ["coco", "voc07"])
def test_perfect_detections_score_one_and_the_truth_can_be_used_again(metric):
    records, noisy = scene(np.random.default_rng(5), images=8, classes=3)
    perfect = [found(r.boxes[~r.crowd], np.ones((~r.crowd).sum()), r.labels[~r.crowd]) for r in records]
    scorer = Scorer(records, 3, metric)
    before = scorer.score(noisy)
    assert scorer.score(perfect).class_ap == pytest.approx([1, 1, 1])
    assert scorer.score(noisy).class_ap.tolist() == before.class_ap.tolist() and before.ap() < 0.9


@pytest.mark.parametrize("metric", ["coco", "voc07"])
def test_order_of_detections_within_an_image_is_of_no_importance(metric):
    records, detections = scene(np.random.default_rng(7), images=6, classes=3)
    mixed = [found(d.boxes.flip(0), d.scores.flip(0).tolist(), d.labels.flip(0).tolist()) for d in detections]
    scorer = Scorer(records, 3, metric)
    assert scorer.score(mixed).class_ap.tolist() == scorer.score(detections).class_ap.tolist()


@pytest.mark.parametrize("metric", ["coco", "voc07"])
def test_unmatched_detections_are_no_errors_where_a_class_is_not_exhaustively_labelled(metric):
    truth, far = [10, 10, 60, 60], [200, 200, 260, 260]
    detection = found([far, truth], [0.9, 0.8], [0, 0])
    full = Scorer([record(0, [truth], [0])], 2, metric).score([detection])
    partial = Scorer([record(0, [truth], [0], exhaustive=frozenset({1}))], 2, metric).score([detection])
    assert full.ap50([0]) == pytest.approx(0.5, abs=0.01)  # 1 right of 2 at every recall
    assert partial.ap50([0]) == pytest.approx(1)


def test_precision_curve_is_what_ap50_averages():
    records, detections = scene(np.random.default_rng(11), images=10, classes=3)
    scores = Scorer(records, 3).score(detections)
    assert scores.class_precision.mean(1) == pytest.approx(scores.class_ap50)
    assert (np.diff(scores.class_precision, axis=1) <= 0).all()


@pytest.mark.parametrize(
    ("detections", "error", "says"),
    [
        ([], ShapeError, "1 images, got 0"),
        ([found([[0, 0, float("nan"), 1]], [0.5], [0])], FsdetError, "finite"),
        ([found([[0, 0, 1, 1]], [float("inf")], [0])], FsdetError, "finite"),
        ([found([[0, 0, 1, 1]], [float("nan")], [0])], FsdetError, "finite"),
        ([found([[0, 0, 1, 1]], [0.5], [2])], FsdetError, r"0\.\.1"),
        ([found([[0, 0, 1, 1]], [0.5], [-1])], FsdetError, r"0\.\.1"),
    ],
)
def test_detections_that_cannot_be_scored_are_refused(detections, error, says):
    with pytest.raises(error, match=says):
        Scorer([record(0, [[0, 0, 9, 9]], [0])], 2).score(detections)


def test_unknown_metric_and_stray_labels_of_records_are_refused():
    with pytest.raises(ConfigError, match="voc07"):
        Scorer([], 1, "voc7")
    with pytest.raises(FsdetError, match=r"0\.\.0"):
        Scorer([record(0, [[0, 0, 9, 9]], [1])], 1)


def test_false_positives_are_counted_on_images_without_registered_classes_only():
    records = [
        record(0, [[0, 0, 9, 9]], [0]),  # registered class: left out
        record(1, [[0, 0, 9, 9]], [2]),  # clean
        record(2, [], []),  # clean
        record(3, [], [], exhaustive=frozenset({1})),  # class 0 may be there unlabelled: left out
    ]
    detections = [found(np.zeros((3, 4)), [0.9, 0.5, 0.2], [0, 1, 2]) for _ in records]
    # two clean images; at .3 each has one detection of class 0 and one of class 1
    assert fp_per_image(records, detections, [0, 1], 0.3) == 2
    assert fp_per_image(records, detections, [0, 1], {0: 0.95, 1: 0.5}) == 1
    assert fp_per_image(records, [found([], [], [])] * 4, [0, 1], 0.3) == 0
    assert np.isnan(fp_per_image(records[:1], detections[:1], [0], 0.3))
    with pytest.raises(ShapeError):
        fp_per_image(records, detections[:1], [0], 0.3)
    broken = [found(np.zeros((1, 4)), [float("nan")], [0])] * 4
    with pytest.raises(FsdetError, match="nan"):
        fp_per_image(records, broken, [0], 0.3)


def test_false_positives_by_hand_on_random_images():
    records, detections = scene(np.random.default_rng(2), images=30, classes=6)
    clean = [i for i, r in enumerate(records) if not {1, 4} & set(r.labels.tolist())]
    assert 3 < len(clean) < 30
    said = [s for i in clean for s, c in zip(detections[i].scores, detections[i].labels, strict=True) if c in (1, 4)]
    assert fp_per_image(records, detections, [1, 4], 0.5) == sum(s >= 0.5 for s in said) / len(clean) > 0


@pytest.mark.parametrize("seed", range(3))
def test_awkward_boxes_score_as_pycocotools_has_them(seed):
    """Boxes without area, exact copies of the truth, all scores equal, images without truth or detections."""
    rng = np.random.default_rng(seed)
    records, detections = scene(rng, images=8, classes=3, levels=1 + seed)
    records[0], detections[1] = record(0, [], []), found([], [], [])
    for i, (r, d) in enumerate(zip(records, detections, strict=True)):
        xyxy, extra = d.boxes.numpy().copy(), r.boxes[~r.crowd]
        xyxy[:2, 2:] = xyxy[:2, :2]
        scores = [*d.scores.tolist(), *[0.5] * len(extra)]
        detections[i] = found(np.concatenate([xyxy, extra]), scores, [*d.labels.tolist(), *r.labels[~r.crowd]])
    scores = Scorer(records, 4).score(detections)  # class 3 is in no image
    for ids in (None, [0, 3], [2]):
        want = pycocotools(records, detections, 4, ids)
        assert (scores.ap(ids), scores.ap50(ids), scores.recall(ids)) == pytest.approx(want, abs=1e-12)
    assert np.isnan(scores.class_ap50[3])


def test_classes_by_another_number_score_the_same():
    """Base and novel numbers of one data set are the categories of another: figures follow the names."""
    records, detections = scene(np.random.default_rng(4), images=8, classes=4)
    other = np.array([2, 0, 3, 1])
    there = [record(i, r.boxes, other[r.labels], r.crowd) for i, r in enumerate(records)]
    said = [found(d.boxes.numpy(), d.scores.tolist(), other[d.labels.numpy()]) for d in detections]
    for metric in ("coco", "voc07"):
        here, moved = Scorer(records, 4, metric).score(detections), Scorer(there, 4, metric).score(said)
        assert moved.class_ap[other].tolist() == here.class_ap.tolist()
        assert moved.ap50([2, 0]) == pytest.approx(here.ap50([0, 1]), abs=1e-12)


def test_half_precision_detections_on_a_graph_are_scored():
    d = found([[0, 0, 9, 9]], [0.5], [0])
    half = type(d)(d.boxes.half(), d.scores.half().requires_grad_(), d.labels, d.branch)
    assert Scorer([record(0, [[0, 0, 9, 9]], [0])], 1).score([half]).ap() == pytest.approx(1)
    assert half.scores.dtype is torch.float16
