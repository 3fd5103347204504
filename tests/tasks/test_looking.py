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
def sure(best, small_demo):
    """`best` with statistics of real images and classifiers at random, so that it says something else of each image."""
    trained, random = loading.load_trained(best), torch.Generator().manual_seed(0)
    for norm in trained.model.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.momentum = 1.0
    for level in trained.model.head.standard:
        level.weight.data.normal_(std=0.3, generator=random)
        level.bias.data.fill_(-2)
    pictures = ImageStore(load(small_demo).split("val"), trained.spec["image_size"])
    fitted = [trained.preprocessing.fitted(pictures.sample(i).image)[0] for i in range(6)]
    with torch.no_grad():
        trained.model.train().dense(trained.preprocessing.tensor(fitted))
    trained.model.eval()
    return trained


@pytest.fixture
def store(small_demo, sure):
    return ImageStore(load(small_demo).split("test"), sure.spec["image_size"])


def found_in(trained, store, words, threshold=0.001):
    with torch.inference_mode():
        for seen in looking.dense_batches(trained.model, store, trained.preprocessing):
            yield from looking.detect_batch(trained.model, seen, words, threshold)


def alike(one, other) -> None:
    """The ten surest of `one` are in `other`; what rounding decides, in NMS or at the last of a hundred, may differ."""
    assert len(one) >= 10 and abs(len(one) - len(other)) <= 2
    for box, score, label in zip(one.boxes[:10], one.scores[:10], one.labels[:10], strict=True):
        near = ((other.boxes - box).abs().amax(1) < 0.1) & (other.labels == label)
        assert near.any() and (other.scores[near] - score).abs().min() < 0.02 * score


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
    assert len(alone) == len(store.records) == len({float(d.scores[0]) for d in alone})
    for one, other in zip(alone, together, strict=True):
        alike(one, other)


def test_boxes_are_those_of_a_predictor_that_opens_the_file(sure, store):
    """Two ways from file to box: the store keeps a copy at the network's size, Predictor reads the photograph."""
    predictor = Predictor(sure.model, sure.classes, sure.preprocessing)
    words = sure.own(range(len(sure.spec["base"])))
    for record, found in zip(store.records, found_in(sure, store, words), strict=True):
        alike(found, predictor.predict(record.path, threshold=0.001))
