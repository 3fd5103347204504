# SPDX-License-Identifier: AGPL-3.0-or-later
"""Outlines become the masks that COCO's own reader makes of them, and come through a reader of the json unharmed."""

import json

import numpy as np
import pytest
from faster_coco_eval.core import mask as oracle

from dataset_files import coco, coco_document
from fsdet.data import sources
from fsdet.data.shapes import is_shape, mask_of, moved, runs_of, tight
from fsdet.errors import DataError


def blob(seed, size=(37, 23)):
    rng = np.random.default_rng(seed)
    return rng.random(size) < rng.uniform(0, 1)


@pytest.mark.parametrize("seed", range(6))
def test_run_lengths_are_cocos_in_both_spellings_and_come_back(seed):
    mask = blob(seed)
    packed = oracle.encode(np.asfortranarray(mask, np.uint8))
    spelt = {"size": [int(n) for n in packed["size"]], "counts": packed["counts"].decode()}
    runs = runs_of(mask)
    assert is_shape(spelt) and is_shape(runs)
    assert (mask_of(spelt, mask.shape) == mask).all() and (mask_of(runs, mask.shape) == mask).all()
    assert (oracle.decode(oracle.frPyObjects(runs, *mask.shape)) == mask).all()


def test_the_mask_of_nothing_and_of_everything():
    for mask in (np.zeros((4, 3), bool), np.ones((4, 3), bool)):
        assert (mask_of(runs_of(mask), (4, 3)) == mask).all()


def test_polygons_are_cocos_but_for_their_border():
    for polygon in ([10, 5, 50, 8, 40, 44, 12, 30], [3.5, 3.5, 30.5, 3.5, 30.5, 20.5, 3.5, 20.5]):
        ours = mask_of([polygon], (48, 64))
        theirs = oracle.decode(oracle.merge(oracle.frPyObjects([polygon], 48, 64))).astype(bool)
        union, common = (ours | theirs).sum(), (ours & theirs).sum()
        border = (
            np.abs(np.diff(np.pad(theirs.astype(int), 1), axis=0)).sum() + np.abs(np.diff(theirs.astype(int))).sum()
        )
        assert union - common <= border and common / union > 0.9
    two = mask_of([[0, 0, 9, 0, 9, 9, 0, 9], [20, 20, 29, 20, 29, 29, 20, 29]], (40, 40))
    assert two[5, 5] and two[25, 25] and not two[15, 15]


@pytest.mark.parametrize(
    "value",
    [None, [], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5, float("nan")]], [[1, 2, 3, 4, 5, 6, 7]], "polygon",
     {"size": [4, 4], "counts": [3, 4]}, {"size": [4, -4], "counts": "12"}, {"counts": [16]}, [[1, 2, 3, 4, 5, "6"]]],
)  # fmt: skip
def test_what_is_no_outline_is_seen_before_it_is_drawn(value):
    assert not is_shape(value)


def test_run_lengths_of_another_size_are_refused():
    with pytest.raises(DataError, match="run lengths of 5 x 5 pixels"):
        mask_of(runs_of(np.ones((4, 4), bool)), (5, 5))


def test_a_mask_moves_as_its_box_does():
    mask = np.zeros((40, 40), bool)
    mask[10:20, 5:25] = True
    assert (moved(mask, np.float64([[1, 0, 0], [0, 1, 0]]), 40) == mask).all()
    mirrored = moved(mask, np.float64([[-1, 0, 40], [0, 1, 3]]), 40)
    assert tight([mirrored]).tolist() == [[15, 13, 35, 23]], "no pixel beside the mirrored box"
    doubled = moved(mask, np.float64([[2, 0, 0], [0, 2, 0]]), 80)
    assert tight([doubled]).tolist() == [[10, 20, 50, 40]]


def test_a_coco_json_keeps_its_outlines_when_asked_through_cleaning_and_reordering(tmp_path):
    document = coco_document()
    rows = document["annotations"]
    for row in rows:
        row["segmentation"] = [[row["id"], 1, 30, 1, 30, 20]]
    rows[1]["segmentation"] = [[1, 2]]  # no polygon
    rows.insert(0, {**rows[2], "id": 9, "bbox": [1, 1, 0, 0]})  # no area: dropped
    rows.reverse()  # the last image's objects first
    path = coco(tmp_path, document)
    plain, full = sources.load(path), sources.load(path, shapes=True)
    assert all(r.shapes == () for r in plain.split("train"))
    shapes = {r.path.name: r.shapes for r in full.split("train")}
    assert shapes == {"a.jpg": (None, [[1, 1, 30, 1, 30, 20]]), "b.jpg": ([[3, 1, 30, 1, 30, 20]],)}
    assert full.report.counts["no outline that can be read"] == 1
    kept = full.split("train")[0].kept(np.array([True, False]))
    assert kept.shapes == (None,) and len(kept.labels) == 1
    assert json.loads(path.read_text())["annotations"][1]["segmentation"], "the file is as it was"
