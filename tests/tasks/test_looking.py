# SPDX-License-Identifier: AGPL-3.0-or-later
"""A store of images looked at in batches: every image once, in order, as if it were alone, in px of its file."""

from dataclasses import replace

import pytest
import torch

from fsdet.data.sources import load
from fsdet.data.store import ImageStore
from fsdet.detect.predictor import Predictor
from fsdet.detect.scoring import Scoring
from fsdet.tasks import loading, looking


@pytest.fixture
def sure(best):
    """`best` whose base classes are found for certain: two steps of training leave nothing above a threshold."""
    trained = loading.load_trained(best)
    trained.model.head.bias.data.fill_(5)
    for level in trained.model.head.standard:
        level.bias.data[0] += 14
    return trained


@pytest.fixture
def store(small_demo, sure):
    return ImageStore(load(small_demo).split("test"), sure.spec["image_size"])


def found_in(trained, store, words, threshold=0.001):
    with torch.inference_mode():
        for seen in looking.dense_batches(trained.model, store, trained.preprocessing):
            yield from looking.detect_batch(trained.model, seen, words, threshold)


@pytest.mark.parametrize("batch", [1, 3, 100])
def test_every_image_is_looked_at_once_in_order(sure, store, monkeypatch, batch):
    monkeypatch.setattr(looking, "BATCH", batch)
    with torch.inference_mode():
        seen = list(looking.dense_batches(sure.model, store, sure.preprocessing))
    assert [r.path for s in seen for r in s.records] == [r.path for r in store.records]
    assert all(len(s.records) == len(s.images) == len(s.placed) == len(s.dense.boxes) <= batch for s in seen)
    assert {s.side for s in seen} == {sure.spec["support_size"]}


@pytest.mark.parametrize("rescore", [False, True])
def test_an_image_is_judged_as_if_it_were_alone(sure, store, monkeypatch, rescore):
    words = replace(sure.own(range(len(sure.spec["base"]))), scoring=Scoring(rescore=rescore))
    monkeypatch.setattr(looking, "BATCH", 1)
    alone = list(found_in(sure, store, words))
    monkeypatch.setattr(looking, "BATCH", 5)
    together = list(found_in(sure, store, words))
    assert len(alone) == len(store.records) and sum(map(len, alone))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.boxes, other.boxes, atol=1e-2, rtol=0)
        torch.testing.assert_close(one.scores, other.scores, atol=1e-4, rtol=0)


def test_boxes_are_those_of_a_predictor_that_opens_the_file(sure, store):
    """Two ways from file to box: the store keeps a copy at the network's size, Predictor reads the photograph."""
    predictor = Predictor(sure.model, sure.classes, sure.preprocessing)
    words = sure.own(range(len(sure.spec["base"])))
    for record, found in zip(store.records, found_in(sure, store, words, 0.3), strict=True):
        known = predictor.predict(record.path, threshold=0.3)
        assert len(found) == len(known) > 0
        torch.testing.assert_close(found.boxes, known.boxes, atol=1e-2, rtol=0)
