# SPDX-License-Identifier: AGPL-3.0-or-later
"""Batches of a data set with damaged files: others stand in their places, the same whatever makes the batches."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from fsdet import tasks
from fsdet.data import unusable
from fsdet.engine.checkpoint import load
from fsdet.engine.feed import Failed, Feed
from fsdet.errors import RunFailed
from fsdet.tasks import build_task, read_data
from tasks.conftest import small

EPISODIC = ("stage.name=episodic", "episode.ways=3", "episode.shots=[1, 2]", "episode.per_epoch=6")
STAGES = {"base": ("stage.name=base", "data.augment.mosaic=0.7"), "episodic": EPISODIC}


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


DAMAGE = {"truncated": truncate, "empty": empty, "html": lambda p: p.write_text("<html>404</html>"),
          "gone": lambda p: p.unlink()}  # fmt: skip


@pytest.fixture
def place(small_demo, tmp_path):
    """A copy of the demo set that a test may damage, and a function that builds the task of a stage on it."""
    shutil.copytree(small_demo.parent, tmp_path / "demo")

    def task(stage, *overrides):
        config = small(tmp_path / "demo/data.yaml", tmp_path / "run", *STAGES[stage], *overrides)
        return build_task(config, read_data(config), resume=True)[0]

    return tmp_path / "demo/train", task


def equal(a, b):
    """The same episode to the last bit."""
    parts = [(a.query, b.query), (a.targets.boxes, b.targets.boxes), (a.targets.base_labels, b.targets.base_labels),
             (a.support, b.support), (a.support_way, b.support_way)]  # fmt: skip
    return all(torch.equal(x, y) for x, y in parts) and (a.image_ids, a.replaced) == (b.image_ids, b.replaced)


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_file_is_replaced_in_every_place_and_named(place, stage, how):
    train, task = place
    built = task(stage)
    sound = [built.batch(i) for i in range(12)]
    bad = train / "000003.jpg"
    DAMAGE[how](bad)  # after the data set was read
    made = [built.batch(i) for i in range(12)]
    hit = [batch.index for batch in made if batch.replaced]
    assert hit, "the file is drawn in some of these batches"
    for before, after in zip(sound, made, strict=True):
        assert equal(before, after) or after.replaced, "a batch without the file is what it was"
        assert str(bad) not in after.image_ids and after.finite()
        assert {item.sample for item in after.replaced} <= {str(bad)}
        assert all("000003.jpg" in item.reason for item in after.replaced)
        assert (after.support_way == before.support_way).all() and after.query.shape == before.query.shape
        assert after.query.amin((1, 2, 3)).min() >= 0 and (after.targets.boxes[after.targets.valid] >= 0).all()


@pytest.mark.parametrize("stage", STAGES)
def test_the_stream_does_not_depend_on_workers_or_on_where_it_starts(place, stage):
    train, task = place
    for name in ("000001.jpg", "000005.jpg", "000011.jpg"):
        truncate(train / name)
    straight = list(Feed(task(stage), 0, 10, 0))
    assert sum(bool(batch.replaced) for batch in straight) > 1
    built = task(stage)
    for workers, start in ((1, 0), (2, 4)):
        again = list(Feed(built, start, 10, workers))
        assert all(map(equal, straight[start:], again))


def test_a_query_is_replaced_by_an_image_that_shows_a_way_where_it_did(place):
    _, task = place
    planner = task("episodic", "episode.negatives=0.5", "episode.queries=4").batches.planner
    kinds = set()
    for index in range(12):
        plan = planner.plan(index)
        shown = planner.present[:, list(plan.class_ids)].any(1)
        images = {int(i) for c in plan.class_ids for i in planner.images[c]} - {
            record for _, record, _ in plan.supports
        }
        for slot, query in enumerate(plan.queries):
            if shown[query] and images <= {query}:
                continue  # no other image shows one of these classes
            other = planner.substitute(np.random.default_rng((index, slot)), plan, query)
            assert other != query and shown[other] == shown[query]
            kinds.add(bool(shown[query]))
    assert kinds == {True, False}


def test_an_episode_of_a_class_without_a_usable_instance_is_one_of_other_classes(place):
    _, task = place
    made = task("episodic")
    ways = made.batches.planner.plan(0).class_ids
    for record in made.batches.store.records:
        if ways[0] in record.labels:
            empty(record.path)
    batch, again = made.batch(0), made.batch(0)
    assert ways[0] not in batch.class_ids.tolist() and equal(batch, again) and batch.replaced


def test_any_mistake_in_a_sample_is_quarantined_and_says_where_it_came_from(place, monkeypatch):
    _, task = place
    made = task("base", "data.augment.mosaic=0")
    name = made.batches.store.records[5].image_id
    sound = made.batches.store.sample

    def sample(index, wanted=None):
        if index == 5:
            raise IndexError("box 9 of 3")
        return sound(index, wanted)

    monkeypatch.setattr(made.batches.store, "sample", sample)
    (found,) = {item for i in range(24) for item in made.batch(i).replaced}
    assert found.sample == name and found.reason.startswith("IndexError: box 9 of 3 (sample, line ")


def test_a_data_set_that_is_gone_fails_its_batches_and_names_what_was_tried(place):
    train, task = place
    made = task("base")
    shutil.rmtree(train)
    (batch,) = Feed(made, 0, 1, 0)
    assert isinstance(batch, Failed) and len(batch.replaced) == unusable.TRIES
    assert "in a row cannot be used" in batch.reason


@pytest.mark.slow
def test_a_training_on_one_damaged_file_ends_well_and_on_many_with_a_report(place, tmp_path, caplog):
    train, _ = place
    config = small(tmp_path / "demo/data.yaml", tmp_path / "run", "optim.steps=12", "data.augment.mosaic=0",
                   "episode.queries=4")  # fmt: skip
    truncate(train / "000007.jpg")
    trainer = tasks.build(config)
    assert trainer.fit().steps == 12
    assert list(load(tmp_path / "run/last.pt")["quarantine"]["found"]) == [str(train / "000007.jpg")]
    assert sum("quarantined" in r.message for r in caplog.records) == 1
    empty(train / "000009.jpg")
    with pytest.raises(RunFailed, match=r"2 of 48 samples cannot be used.*\nlast: .*00000[79]\.jpg"):
        tasks.build(small(tmp_path / "demo/data.yaml", tmp_path / "two", "optim.steps=24")).fit()
    rows = [json.loads(line) for line in (tmp_path / "two/quarantine.jsonl").read_text().splitlines()]
    assert {row["sample"] for row in rows} == {str(train / name) for name in ("000007.jpg", "000009.jpg")}


def test_a_task_survives_being_handed_to_a_spawned_worker(place):
    _, task = place
    made = task("base")
    made.batches.warm(1)
    again = pickle.loads(pickle.dumps(made.batches))
    assert equal(made.batch(3), again.make(3)) and made.batches.store._kept and not again.store._kept


def test_an_episode_is_halved_with_all_its_supports(place):
    _, task = place
    batch = task("episodic", "episode.queries=5").batch(0)
    first, second = batch.halves()
    assert (len(first.image_ids), len(second.image_ids)) == (3, 2)
    assert torch.equal(torch.cat([first.query, second.query]), batch.query)
    assert torch.equal(torch.cat([first.targets.valid, second.targets.valid]), batch.targets.valid)
    assert first.support is batch.support and second.class_ids is batch.class_ids
    assert first.image_ids + second.image_ids == batch.image_ids
