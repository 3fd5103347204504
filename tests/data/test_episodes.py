# SPDX-License-Identifier: AGPL-3.0-or-later
"""Plans are pure functions of (seed, i) and keep their promises about ways, shots, queries and negatives."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fsdet.data.episodes import BalancedPlanner, EpisodePlanner, EpisodeSettings, EpochPlanner, support_instances
from fsdet.errors import DataError
from fsdet.types import ImageRecord


def records(images=60, classes=10):
    rng = np.random.default_rng(0)
    out = []
    for i in range(images):
        labels = rng.integers(0, classes, rng.integers(1, 4))
        corner = rng.uniform(0, 50, (len(labels), 2))
        out.append(ImageRecord(Path(f"{i}.jpg"), (100, 100), np.concatenate((corner, corner + 20), 1), labels))
    return out


def planner(seed=0, **change):
    settings = EpisodeSettings(**{"ways": 3, "shots": (1, 4), "queries": 8, "negatives": 0.25, **change})
    return EpisodePlanner(records(), range(10), settings, seed)


def test_a_plan_is_the_same_from_any_planner_in_any_order():
    a, b = planner(), planner()
    later = [b.plan(i) for i in (7, 3, 5)]
    assert [a.plan(i) for i in (7, 3, 5)] == later
    assert a.plan(3) != planner(seed=1).plan(3) and a.plan(3) != a.plan(4)


@pytest.mark.parametrize("index", range(20))
def test_ways_shots_and_queries(index):
    source, p = records(), planner().plan(index)
    assert len(set(p.class_ids)) == 3 and len(p.queries) == 8
    per_way = Counter(way for way, _, _ in p.supports)
    assert set(per_way) == {0, 1, 2} and all(1 <= k <= 4 for k in per_way.values())
    assert len(set(p.supports)) == len(p.supports)
    for way, image, box in p.supports:
        assert source[image].labels[box] == p.class_ids[way]
    with_ways = [bool(set(source[q].labels.tolist()) & set(p.class_ids)) for q in p.queries]
    assert sum(not w for w in with_ways) == 2, "a quarter of 8 queries holds none of the ways"
    assert not {image for _, image, _ in p.supports} & set(p.queries)


def test_a_negative_keeps_negative_partners():
    source, plan = records(), planner().plan(0)
    p = planner()
    negative = next(q for q in plan.queries if not set(source[q].labels.tolist()) & set(plan.class_ids))
    rng = np.random.default_rng(0)
    partners = [p.partner(rng, plan, negative) for _ in range(30)]
    assert not any(set(source[q].labels.tolist()) & set(plan.class_ids) for q in partners)


def test_every_class_is_drawn_about_equally_often():
    p = planner()
    drawn = Counter(c for i in range(600) for c in p.plan(i).class_ids)
    assert set(drawn) == set(range(10)) and max(drawn.values()) < 1.4 * min(drawn.values())


def test_crowds_and_specks_are_no_supports():
    boxes = np.array([[0, 0, 20, 20], [0, 0, 20, 20], [0, 0, 20, 5]], np.float32)
    record = ImageRecord(Path("a"), (50, 50), boxes, [1, 1, 1], [False, True, False])
    assert support_instances([record], [1]) == {1: [(0, 0)]}


def test_an_image_without_boxes_is_no_support_and_may_be_a_negative_query():
    empty = ImageRecord(Path("e"), (50, 50), np.zeros((0, 4)), [])
    p = EpisodePlanner([*records(), empty], range(10), EpisodeSettings(3, (1, 1), 4, 1.0), 0)
    assert any(60 in p.plan(i).queries for i in range(40))


@pytest.mark.parametrize(
    ("asked", "there", "ways"), [(11, 10, 5), (15, 3, 2), (15, 2, 2), (15, 1, 1), (10, 10, 10), (3, 10, 3)]
)
def test_with_fewer_classes_than_ways_an_episode_takes_half_of_them(asked, there, ways, caplog):
    p = EpisodePlanner(records(classes=there), range(there), EpisodeSettings(asked, (1, 2), 4, 0.25), 0)
    plans = [p.plan(i) for i in range(30)]
    assert all(len(set(plan.class_ids)) == ways for plan in plans)
    assert {c for plan in plans for c in plan.class_ids} == set(range(there))
    classes = f"{there} base class{'es' * (there != 1)}"
    told = f"episode.ways is {asked}, and there are instances of {classes}: episodes of {ways}"
    assert (told in caplog.text) == (ways != asked)


def test_no_class_at_all_is_told():
    with pytest.raises(DataError, match=r"expected base classes with instances of 8 px or more, .*got none"):
        EpisodePlanner(records(), [], EpisodeSettings(3, (1, 1), 4, 0.0), 0)


def test_an_epoch_shows_every_image_once_and_each_epoch_its_own_order():
    p = EpochPlanner(records(40), 8, seed=0)
    assert p.per_epoch == 5
    epochs = [[q for i in range(5 * e, 5 * e + 5) for q in p.plan(i).queries] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(40)) and epochs[0] != epochs[1]
    assert p.plan(7) == EpochPlanner(records(40), 8, seed=0).plan(7)


def test_fewer_images_than_a_batch_are_repeated():
    plan = EpochPlanner(records(3), 8, seed=0).plan(5)
    assert len(plan.queries) == 8 and set(plan.queries) == {0, 1, 2}


def test_no_images_is_told():
    with pytest.raises(DataError, match="at least one training image"):
        EpochPlanner([], 4, 0)


def test_balanced_plans_show_a_rare_class_as_often_as_a_common_one():
    many = [ImageRecord(Path(f"{i}"), (50, 50), [[0, 0, 20, 20]], [0]) for i in range(99)]
    rare = ImageRecord(Path("rare"), (50, 50), [[0, 0, 20, 20]], [1])
    p = BalancedPlanner([*many, rare], 10, seed=0)
    drawn = [q for i in range(100) for q in p.plan(i).queries]
    assert 0.45 < drawn.count(99) / len(drawn) < 0.55
    assert p.plan(3) == BalancedPlanner([*many, rare], 10, seed=0).plan(3)
    assert BalancedPlanner([ImageRecord(Path("e"), (9, 9), [], [])], 2, 0).plan(0).queries == (0, 0)
