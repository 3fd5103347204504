# SPDX-License-Identifier: AGPL-3.0-or-later
"""Average precision of detections against a split's annotations; the only import of faster_coco_eval.

Detections are scored once for all classes; figures on base, novel or any other classes are means over per-class values,
which equals restricting pycocotools' `params.catIds` on the same detections.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from fsdet.errors import ConfigError, FsdetError, ShapeError, did_you_mean, explain
from fsdet.evaluation import voc07
from fsdet.evaluation.voc07 import Instances
from fsdet.types import Detections, ImageRecord

METRICS = ("coco", "voc07")
MAX_DETECTIONS = 100  # an image, over all classes
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_WEIGHTS = "check the weights and the decoding of the model that made them"


@dataclass(frozen=True, eq=False)
class Scores:
    """Per-class figures in [0, 1]; nan where a class has no ground truth that counts.

    class_ap [C]: mean over IoU .5:.05:.95. class_ap50 [C]. class_recall [C]: share of ground truth found at IoU .5.
    class_precision [C, 101]: interpolated precision at IoU .5 for recall 0, .01, ..., 1.
    """

    metric: str
    class_ap: np.ndarray
    class_ap50: np.ndarray
    class_recall: np.ndarray
    class_precision: np.ndarray

    def ap(self, ids: Sequence[int] | None = None) -> float:
        """Mean AP over `ids` (None: all) that have ground truth; nan when none has."""
        return _mean(self.class_ap, ids)

    def ap50(self, ids: Sequence[int] | None = None) -> float:
        """Mean AP50 over `ids` (None: all) that have ground truth; nan when none has."""
        return _mean(self.class_ap50, ids)

    def recall(self, ids: Sequence[int] | None = None) -> float:
        """Mean recall at IoU .5 over `ids` (None: all) that have ground truth; nan when none has."""
        return _mean(self.class_recall, ids)


def _mean(values: np.ndarray, ids: Sequence[int] | None) -> float:
    chosen = values if ids is None else values[np.asarray(ids, np.int64)]
    chosen = chosen[~np.isnan(chosen)]
    return float(chosen.mean()) if len(chosen) else float("nan")


class Scorer:
    """Holds the ground truth of one split and scores any number of detection sets against it.

    Crowd boxes neither count as misses nor make a detection on them wrong. A detection that hits nothing is not held
    against a class that the image does not label exhaustively.

    Args:
        records: the images, in the order in which detections will come.
        num_classes: C; labels of records and detections are in 0..C-1.
        metric: "coco" (101 points, pycocotools' figures) or "voc07" (11 points).
    Raises:
        ConfigError: unknown metric. FsdetError: a record's label is outside 0..C-1.
    """

    def __init__(self, records: Sequence[ImageRecord], num_classes: int, metric: str = "coco") -> None:
        if metric not in METRICS:
            raise ConfigError(
                explain(
                    f"one of {', '.join(METRICS)}",
                    repr(metric),
                    "eval.metric",
                    f"correct the name.{did_you_mean(metric, METRICS)}",
                )
            )
        self.metric, self.num_classes, self.num_images = metric, num_classes, len(records)
        self._truth = _truth(records)
        _check_labels(self._truth.label, num_classes, "Scorer: labels of the records")
        self._open = _partly_labelled(records, num_classes)
        self._coco = _coco_truth(self._truth, self._open, records, num_classes) if metric == "coco" else None

    def score(self, detections: Sequence[Detections]) -> Scores:
        """One Detections per record, in order, already cut at the caller's confidence; the best 100 of an image count.

        Raises:
            ShapeError: the number of images differs. FsdetError: a non-finite box or score, or a label outside 0..C-1.
        """
        if len(detections) != self.num_images:
            raise ShapeError(f"Scorer.score expects detections of {self.num_images} images, got {len(detections)}")
        found = _flatten(detections)
        _check_labels(found.label, self.num_classes, "Scorer.score: labels of the detections")
        if not (np.isfinite(found.boxes).all() and np.isfinite(found.score).all()):
            raise FsdetError(explain("finite boxes and scores", "nan or inf", "Scorer.score", _WEIGHTS))
        return self._score_coco(found) if self._coco is not None else self._score_voc(found)

    def _score_coco(self, found: Instances) -> Scores:
        return self._run(self._coco, _coco_found(found, self._coco), "bbox")

    def _run(self, truth: COCO, found: COCO, kind: str) -> Scores:
        """COCO's evaluation of boxes ("bbox") or masks ("segm"), every size of object together."""
        if not self.num_images:
            return self._collect(np.full((10, 101, self.num_classes), -1.0), np.full(self.num_classes, -1.0))
        run = COCOeval_faster(truth, found, iouType=kind, print_function=_silent)
        run.params.areaRng, run.params.areaRngLbl = run.params.areaRng[:1], ["all"]
        run.params.maxDets = [MAX_DETECTIONS]
        run.evaluate()
        run.accumulate()
        return self._collect(run.eval["precision"][:, :, :, 0, -1], run.eval["recall"][0, :, 0, -1])

    def _collect(self, precision: np.ndarray, recall: np.ndarray) -> Scores:
        precision = np.where(precision < 0, np.nan, precision)  # pycocotools says -1 for "no ground truth"
        return Scores(
            self.metric,
            precision.mean((0, 1)),
            precision[0].mean(0),
            np.where(recall < 0, np.nan, recall),
            precision[0].T,
        )

    def _score_voc(self, found: Instances) -> Scores:
        ap = np.full((len(IOU_THRESHOLDS), self.num_classes), np.nan)
        recall, precision = np.full(self.num_classes, np.nan), np.full((self.num_classes, 101), np.nan)
        for c in range(self.num_classes):
            truth, mine = self._truth.select(self._truth.label == c), found.select(found.label == c)
            if truth.crowd.all():
                continue
            match, undecided = voc07.best_match(mine, truth), self._open[mine.image, c]
            curves = [voc07.curve(mine, truth, t, match, undecided) for t in IOU_THRESHOLDS]
            ap[:, c] = [voc07.average_precision(*curve) for curve in curves]
            recall[c] = curves[0][0][-1] if len(curves[0][0]) else 0.0
            precision[c] = voc07.envelope(*curves[0], voc07.CURVE_STEPS)
        return Scores(self.metric, ap.mean(0), ap[0], recall, precision)


def fp_per_image(
    records: Sequence[ImageRecord],
    detections: Sequence[Detections],
    classes: Sequence[int],
    thresholds: float | Mapping[int, float],
) -> float:
    """Detections of `classes` at or above their threshold, per image that holds none of `classes`.

    An image counts when all of `classes` are exhaustively labelled in it and it has no box of theirs, crowd or not.
    nan when no image counts. Raises ShapeError unless there is one Detections per record; FsdetError for a score that
    is no number, which no threshold keeps.
    """
    if len(records) != len(detections):
        raise ShapeError(f"fp_per_image expects detections of {len(records)} images, got {len(detections)}")
    registered = set(classes)
    limit = {c: thresholds[c] if isinstance(thresholds, Mapping) else thresholds for c in registered}
    clean = [
        d
        for r, d in zip(records, detections, strict=True)
        if (r.exhaustive is None or registered <= r.exhaustive) and registered.isdisjoint(r.labels.tolist())
    ]
    if any(d.scores.isnan().any() for d in clean):
        raise FsdetError(explain("scores that are numbers", "nan", "fp_per_image", _WEIGHTS))
    wrong = sum(
        label in registered and score >= limit[label]
        for d in clean
        for label, score in zip(d.labels.tolist(), d.scores.tolist(), strict=True)
    )
    return wrong / len(clean) if clean else float("nan")


def _silent(*_: object) -> None:
    """faster_coco_eval's progress lines go nowhere."""


def _check_labels(labels: np.ndarray, num_classes: int, where: str) -> None:
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise FsdetError(
            explain(
                f"class indices 0..{num_classes - 1}",
                f"{sorted(set(wrong.tolist()))[:5]}",
                where,
                "give the Scorer as many classes as the data set has",
            )
        )


def _truth(records: Sequence[ImageRecord]) -> Instances:
    image = np.repeat(np.arange(len(records)), [len(r.labels) for r in records])
    label = np.concatenate([np.empty(0, np.int64), *(r.labels for r in records)])
    boxes = np.concatenate([np.empty((0, 4)), *(r.boxes.astype(np.float64) for r in records)])
    crowd = np.concatenate([np.empty(0, bool), *(r.crowd for r in records)])
    return Instances(image, label, boxes, np.ones(len(label)), crowd)


def _flatten(detections: Sequence[Detections]) -> Instances:
    """The best 100 of each image end to end, best first within an image."""
    arrays = [[x.detach().cpu().double().numpy() for x in (d.boxes, d.scores, d.labels)] for d in detections]
    best = [best_of(score) for _, score, _ in arrays]
    image = np.repeat(np.arange(len(arrays)), [len(b) for b in best])
    empty = (np.empty((0, 4)), np.empty(0), np.empty(0))
    boxes, score, label = (
        np.concatenate([empty[k], *(a[k][b] for a, b in zip(arrays, best, strict=True))]) for k in range(3)
    )
    return Instances(image, label.astype(np.int64), boxes, score, np.zeros(len(image), bool))


def best_of(scores: np.ndarray) -> np.ndarray:
    """Indices of the best 100, best first; of equal ones the first comes first."""
    return np.argsort(-scores, kind="stable")[:MAX_DETECTIONS]


def _partly_labelled(records: Sequence[ImageRecord], num_classes: int) -> np.ndarray:
    """[images, C] bool: where a class is not exhaustively labelled."""
    partly = np.zeros((len(records), num_classes), bool)
    for row, record in zip(partly, records, strict=True):
        if record.exhaustive is not None:
            row[[c for c in range(num_classes) if c not in record.exhaustive]] = True
    return partly


def _annotations(instances: Instances) -> list[dict]:
    sizes = instances.boxes[:, 2:] - instances.boxes[:, :2]
    xywh = np.concatenate([instances.boxes[:, :2], sizes], 1).tolist()
    columns = (instances.image, instances.label, sizes.prod(1), instances.score, instances.crowd.astype(int))
    rows = enumerate(zip(xywh, *(c.tolist() for c in columns), strict=True), 1)
    keys = ("id", "bbox", "image_id", "category_id", "area", "score", "iscrowd")
    return [dict(zip(keys, (i, *row), strict=True)) for i, row in rows]


def index(annotations: list[dict], images: list[dict], categories: list[dict]) -> COCO:
    """Annotations as faster_coco_eval looks things up in them."""
    coco = COCO(print_function=_silent)
    coco.dataset = {"images": images, "categories": categories, "annotations": annotations}
    coco.createIndex()
    return coco


def _coco_truth(truth: Instances, partly: np.ndarray, records: Sequence[ImageRecord], num_classes: int) -> COCO:
    """Ground truth as COCO sees it; a crowd box far around the image stands for "not exhaustively labelled"."""
    image, label = np.nonzero(partly)
    h, w = np.array([r.size for r in records], np.float64).reshape(-1, 2)[image].T
    crowd = np.ones(len(image), bool)
    around = Instances(image, label, np.stack([-w, -h, 2 * w, 2 * h], 1), np.ones(len(image)), crowd)
    annotations = _annotations(truth) + _annotations(around)
    for i, annotation in enumerate(annotations, 1):
        annotation["id"] = i
    images = [{"id": i, "height": r.size[0], "width": r.size[1]} for i, r in enumerate(records)]
    return index(annotations, images, [{"id": c, "name": str(c)} for c in range(num_classes)])


def _coco_found(found: Instances, truth: COCO) -> COCO:
    return index(_annotations(found), truth.dataset["images"], truth.dataset["categories"])
