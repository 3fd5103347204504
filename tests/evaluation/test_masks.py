# SPDX-License-Identifier: AGPL-3.0-or-later
"""Mask AP is pycocotools' own, on polygons, run lengths and crowds."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fsdet.data.shapes import mask_of, runs_of, tight
from fsdet.errors import FsdetError, ShapeError
from fsdet.evaluation.masks import MaskScorer
from fsdet.types import Detections, ImageRecord

SIZE = (60, 80)


def disc(x, y, r):
    ys, xs = np.mgrid[: SIZE[0], : SIZE[1]]
    return (xs - x) ** 2 + (ys - y) ** 2 <= r**2


def truth(seed):
    """Six images of discs in three classes; one a polygon, one a crowd."""
    rng, records = np.random.default_rng(seed), []
    for image in range(6):
        masks = [disc(rng.uniform(10, 70), rng.uniform(10, 50), rng.uniform(5, 14)) for _ in range(3)]
        shapes = [runs_of(m) for m in masks]
        if image == 0:
            shapes[0] = [[10, 10, 40, 12, 30, 40]]
            masks[0] = mask_of(shapes[0], SIZE)
        crowd = np.array([False, False, image == 1])
        records.append(
            ImageRecord(f"{image}.jpg", SIZE, tight(masks), rng.integers(0, 3, 3), crowd, None, tuple(shapes))
        )
    return records


def found(records, seed):
    """The true masks, shifted by up to three px, and some that are nothing."""
    rng, detections, masks = np.random.default_rng(seed), [], []
    for r in records:
        bits = [np.roll(mask_of(s, SIZE), rng.integers(-3, 4, 2), (0, 1)) for s in r.shapes] + [disc(40, 30, 6)]
        labels = [*r.labels.tolist(), int(rng.integers(0, 3))]
        scores = torch.from_numpy(rng.random(len(bits)))
        detections.append(Detections(torch.from_numpy(tight(bits)), scores, torch.tensor(labels),
                                     torch.zeros(len(bits), dtype=torch.uint8)))  # fmt: skip
        masks.append(np.stack(bits))
    return detections, masks


def oracle(records, detections, masks):
    rows = [(i, *o) for i, r in enumerate(records) for o in zip(r.labels, r.shapes, r.crowd, strict=True)]
    annotations = [
        {"id": k, "image_id": i, "category_id": int(c), "segmentation": s, "iscrowd": int(crowd), "bbox": [0, 0, 1, 1],
         "area": float(mask_of(s, SIZE).sum())}
        for k, (i, c, s, crowd) in enumerate(rows, 1)
    ]  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {"images": [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(len(records))],
                        "annotations": annotations, "categories": [{"id": c} for c in range(3)]}  # fmt: skip
        coco.createIndex()
        results = [
            {"image_id": i, "category_id": int(c), "score": float(s),
             "segmentation": coco_mask.encode(np.asfortranarray(m, np.uint8))}
            for i, (d, bits) in enumerate(zip(detections, masks, strict=True))
            for c, s, m in zip(d.labels, d.scores, bits, strict=True)
        ]  # fmt: skip
        run = COCOeval(coco, coco.loadRes(results), "segm")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats[:2]


@pytest.mark.parametrize("seed", range(3))
def test_mask_ap_is_that_of_pycocotools(seed):
    records = truth(seed)
    detections, masks = found(records, seed + 10)
    scores = MaskScorer(records, 3).score_masks(detections, masks)
    ap, ap50 = oracle(records, detections, masks)
    assert 0.05 < ap < 0.95
    assert scores.ap() == pytest.approx(ap, abs=1e-9) and scores.ap50() == pytest.approx(ap50, abs=1e-9)


def test_the_true_masks_score_one_and_boxes_are_scored_beside_them():
    records = [r.kept(~r.crowd) for r in truth(0)[1:]]  # COCO draws the border of a polygon differently from us
    masks = [np.stack([mask_of(s, SIZE) for s in r.shapes]) for r in records]
    perfect = [Detections(torch.from_numpy(r.boxes), torch.ones(len(r.labels)), torch.from_numpy(r.labels),
                          torch.zeros(len(r.labels), dtype=torch.uint8)) for r in records]  # fmt: skip
    scorer = MaskScorer(records, 3)
    assert scorer.score_masks(perfect, masks).ap() == 1.0 == scorer.score(perfect).ap()
    empty = [m & False for m in masks]
    assert scorer.score_masks(perfect, empty).ap50() == 0.0 and scorer.score(perfect).ap50() == 1.0


def test_objects_without_a_shape_and_masks_that_do_not_match_are_refused():
    records = truth(0)
    bare = ImageRecord("x.jpg", SIZE, np.float32([[0, 0, 5, 5]]), np.array([0]))
    with pytest.raises(FsdetError, match="a shape of every object"):
        MaskScorer([*records, bare], 3)
    detections, masks = found(records, 0)
    with pytest.raises(ShapeError, match="as many each"):
        MaskScorer(records, 3).score_masks(detections, [m[:1] for m in masks])
