# SPDX-License-Identifier: AGPL-3.0-or-later
"""Shot draws are nested, repeatable, independent per class; a shot file that was touched is refused."""

import hashlib
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dataset_files import data_yaml, no_utf_8, voc
from fsdet.data import sources
from fsdet.data.report import Report
from fsdet.data.shots import Shot, ShotFile, draw_shots, load_picks, match, possible
from fsdet.errors import DataError
from fsdet.types import ImageRecord

NAMES = ("ant", "bee", "cow")


def record(name, labels, crowd=None, folder="/data/train"):
    boxes = [[10 * j, 0, 10 * j + 9, 9] for j in range(len(labels))]
    return ImageRecord(Path(folder) / name, (100, 100), np.array(boxes), np.array(labels), crowd)


RECORDS = [record(f"{i}.jpg", [i % 3, 0, (i + 1) % 3], [False, i % 5 == 0, False]) for i in range(30)]


def named(picks, records):
    return {c: [(str(records[i].path), records[i].boxes[j].tolist()) for i, j in rows] for c, rows in picks.items()}


@pytest.mark.parametrize("seed", range(5))
def test_nested_repeatable_right_class_no_crowd_no_repeat(seed):
    ten = draw_shots(RECORDS, [0, 1, 2], [1, 3, 10], seed, NAMES)
    assert ten == draw_shots(RECORDS, [0, 1, 2], [10], seed, NAMES)
    three = draw_shots(RECORDS, [0, 1, 2], [3], seed, NAMES)
    for c, rows in ten.items():
        assert len(rows) == len(set(rows)) == 10 and rows[:3] == three[c]
        assert all(RECORDS[i].labels[j] == c and not RECORDS[i].crowd[j] for i, j in rows)


def test_a_class_is_drawn_the_same_whatever_stands_beside_it_or_wherever_it_lies():
    want = named(draw_shots(RECORDS, [1], [5], 0, NAMES), RECORDS)[1]
    assert named(draw_shots(RECORDS, [2, 1, 0], [5], 0, NAMES), RECORDS)[1] == want
    backwards = RECORDS[::-1]
    assert named(draw_shots(backwards, [1], [5], 0, NAMES), backwards)[1] == want
    renumbered = [ImageRecord(r.path, r.size, r.boxes, 2 - r.labels, r.crowd) for r in RECORDS]
    assert named(draw_shots(renumbered, [1], [5], 0, NAMES[::-1]), renumbered)[1] == want
    moved = [ImageRecord(Path("/mnt/x/train") / r.path.name, r.size, r.boxes, r.labels, r.crowd) for r in RECORDS]
    assert draw_shots(moved, [1], [5], 0, NAMES) == draw_shots(RECORDS, [1], [5], 0, NAMES)


def test_seeds_and_classes_have_their_own_streams():
    draws = {tuple(draw_shots(RECORDS, [0], [5], seed, NAMES)[0]) for seed in range(20)}
    assert len(draws) == 20
    same = [record(f"{i}.jpg", [0, 1]) for i in range(30)]
    both = draw_shots(same, [0, 1], [5], 0, NAMES)
    assert [i for i, _ in both[0]] != [i for i, _ in both[1]]


def test_every_image_is_about_equally_often_the_first_shot():
    records = [record(f"{i}.jpg", [0] * (1 + i)) for i in range(5)]
    first = Counter(draw_shots(records, [0], [1], seed, NAMES)[0][0][0] for seed in range(500))
    assert all(60 <= first[i] <= 140 for i in range(5))  # 100 expected, sigma 9


def test_images_give_one_instance_each_before_any_gives_a_second():
    records = [record(f"{i}.jpg", [0] * 4) for i in range(3)]
    rows = draw_shots(records, [0], [12], 0, NAMES)[0]
    assert [Counter(i for i, _ in rows[k : k + 3]) for k in (0, 3, 6, 9)] == [Counter(range(3))] * 4


@pytest.mark.parametrize("seed", range(3))
def test_the_unit_image_is_one_instance_from_each_of_k_images(seed):
    records = [record(f"{i}.jpg", [0, 0, 1], [i == 7, i == 7, False]) for i in range(8)]
    rows = draw_shots(records, [0, 1], [2, 7], seed, NAMES, "image")
    assert sorted(i for i, _ in rows[0]) == list(range(7))  # image 7 has crowds alone
    assert draw_shots(records, [0, 1], [2], seed, NAMES, "image") == {c: picks[:2] for c, picks in rows.items()}
    with pytest.raises(DataError, match=r"8 images with an instance of each class, got class 'ant': have 7, need 8"):
        draw_shots(records, [0, 1], [8], seed, NAMES, "image")
    assert len(draw_shots(records, [0], [8], seed, NAMES)[0]) == 8  # which instances do not lack
    with pytest.raises(DataError, match="Did you mean 'image'"):
        draw_shots(records, [0], [1], 0, NAMES, "images")


def sha(picks, records):
    return hashlib.sha256(repr(named(picks, records)).encode()).hexdigest()[:16]


def test_a_draw_is_the_same_for_ever():
    """A constant: notebooks and results name draws by their seed alone."""
    assert sha(draw_shots(RECORDS, [0, 1, 2], [10], 7, NAMES), RECORDS) == "bfee6df7ff39d49e"


def test_an_image_in_two_records_is_one_image_and_its_instance_comes_once():
    both = [*RECORDS, *RECORDS]  # a source listed twice
    want = named(draw_shots(RECORDS, [0, 1, 2], [10], 0, NAMES), RECORDS)
    assert named(draw_shots(both, [0, 1, 2], [10], 0, NAMES), both) == want
    with pytest.raises(DataError, match="class 'ant': have 44, need 45"):
        draw_shots(both, [0], [45], 0, NAMES)
    halves = [record("a.jpg", [0]), record("a.jpg", [1, 0]), record("b.jpg", [0])]  # two sources label one image
    for seed in range(10):
        rows = draw_shots(halves, [0], [2, 3], seed, NAMES)[0]
        assert {halves[i].path.name for i, _ in rows[:2]} == {"a.jpg", "b.jpg"}
        assert len(draw_shots(halves, [0], [2], seed, NAMES, "image")[0]) == 2
    with pytest.raises(DataError, match="class 'ant': have 2, need 3"):
        draw_shots(halves, [0], [3], 0, NAMES, "image")


def test_images_of_one_name_in_equal_folders_are_drawn_apart_and_in_any_order_of_sources():
    """a/images/0.jpg and b/images/0.jpg: equal in their last two parts."""
    records = [record(f"{i}.jpg", [0], folder=f"/data/{s}/images") for s in "ab" for i in range(20)]
    backwards, neighbours = records[::-1], 0
    for seed in range(20):
        want = named(draw_shots(records, [0], [40], seed, NAMES), records)
        assert named(draw_shots(backwards, [0], [40], seed, NAMES), backwards) == want
        stems = [Path(path).stem for path, _ in want[0]]
        neighbours += sum(a == b for a, b in pairwise(stems))
    assert neighbours < 60  # 20 draws x 39 pairs / 39 = 20 expected; 400 were they drawn together


def test_a_zero_is_a_zero():
    """-0.0 and 0.0 are one place: formats differ in how they arrive at it."""
    signed = [ImageRecord(r.path, r.size, np.where(r.boxes == 0, -0.0, r.boxes), r.labels, r.crowd) for r in RECORDS]
    assert draw_shots(signed, [0], [10], 0, NAMES) == draw_shots(RECORDS, [0], [10], 0, NAMES)


def test_too_few_instances_name_class_have_and_need():
    records = [record("a.jpg", [0, 0, 1], [False, True, False])]
    with pytest.raises(DataError, match=r"class 'ant': have 1, need 2; class 'cow': have 0, need 2"):
        draw_shots(records, [0, 2], [2], 0, NAMES)
    for ks in ([], [0], [-1, 2]):
        with pytest.raises(DataError, match="at least 1"):
            draw_shots(records, [0], ks, 0, NAMES)


def test_the_numbers_of_shots_that_can_be_had_are_those_that_can_be_drawn():
    """By drawing them: crowds and doubled instances count for none."""
    assert possible([RECORDS[0], RECORDS[0]], [1], [1, 2], NAMES)[0] == [1], "one bee, seen by two records"
    scarce = [*RECORDS[:4], RECORDS[0], record("crowd.jpg", [2, 2], [True, True])]
    kept, why = possible(scarce, [0, 1, 2], [1, 2, 3, 5, 30], NAMES)
    assert kept and kept == [k for k in (1, 2, 3, 5, 30) if drawable(scarce, k)]
    gone = ", ".join(str(k) for k in (1, 2, 3, 5, 30) if k not in kept)
    assert why.startswith(f"no figures at {gone} shots: of support instances, class 'ant' has ")
    assert possible(RECORDS, [0, 1, 2], [1, 3], NAMES) == ([1, 3], "") == possible(RECORDS, [], [1, 3], NAMES)


def drawable(records, k: int) -> bool:
    try:
        return bool(draw_shots(records, [0, 1, 2], [k], 0, NAMES))
    except DataError:
        return False


@pytest.fixture
def data(tmp_path):
    voc(tmp_path)
    return sources.load(data_yaml(tmp_path, support=".", base=["dog"], novel=["cat"]))


def test_file_round_trip_and_picks(data, tmp_path):
    drawn = ShotFile.draw(data, [1], 3)
    drawn.save(tmp_path / "deep/shots.json")
    loaded = ShotFile.load(tmp_path / "deep/shots.json")
    assert loaded == drawn and loaded.sha256 == drawn.sha256
    head = json.loads((tmp_path / "deep/shots.json").read_text())
    assert (head["version"], head["unit"], head["nested"], head["seed"]) == (2, "instance", True, 3)
    assert head["shots"] == {"cat": [{"image": "a.jpg", "box": [10, 5, 30, 25]}]} and head["names"] == ["dog", "cat"]
    picks = load_picks(tmp_path / "deep/shots.json", data, 1)
    assert picks == {1: [(0, 0)]} == draw_shots(data.split("support"), [1], [1], 3, data.names)


def test_picks_survive_another_order_of_classes_and_records(data, tmp_path):
    shots = ShotFile.draw(data, [1], 0)
    other = sources.load(data_yaml(tmp_path, support=".", base=["cat", "dog"]))
    other.split("support").reverse()
    assert shots.picks(other) == {0: [(1, 0)]}


def test_picks_that_do_not_fit_are_told(data, tmp_path):
    shots = ShotFile.draw(data, [1], 0)
    with pytest.raises(DataError, match="class 'cat': have 1 shot, need 5"):
        shots.picks(data, 5)
    (tmp_path / "a.xml").write_text((tmp_path / "a.xml").read_text().replace("<xmax>30<", "<xmax>31<"))
    with pytest.raises(DataError, match="1 shot is not in split 'support'"):
        shots.picks(sources.load(tmp_path))
    with pytest.raises(DataError, match="class 'cat' is not in the data set"):
        shots.picks(sources.load(data_yaml(tmp_path, support=".", base=["dog"])))
    with pytest.raises(DataError, match="Did you mean 'cat'"):
        ShotFile.draw(data, [1], 0, classes=["cut"])


def test_a_file_of_another_data_set_is_refused(data, tmp_path):
    """Same class, other pictures; same pictures, another novel class; boxes of another class in the same place."""
    shots = ShotFile.draw(data, [1], 0)
    elsewhere = sources.load(data_yaml(tmp_path / "other", support=str(voc(tmp_path / "other/deep")), novel=["cat"]))
    with pytest.raises(DataError, match="class 'cat': 1 shot is not in split 'support'"):
        shots.picks(elsewhere, 1)
    with pytest.raises(DataError, match="class 'dog' is novel and has no shots"):
        shots.picks(sources.load(data_yaml(tmp_path, support=".", novel=["cat", "dog"])), 1)
    (tmp_path / "a.xml").write_text((tmp_path / "a.xml").read_text().replace("cat", "dog"))
    with pytest.raises(DataError, match="class 'cat': 1 shot is not in split 'support'"):
        shots.picks(sources.load(data_yaml(tmp_path, support=".", base=["dog"], novel=["cat"])), 1)


def test_a_list_that_is_longer_than_its_k_is_no_k_shot_set(data):
    cat, dog = ShotFile.draw(data, [1], 0).lists[1]["cat"][0], Shot("a.jpg", (0.0, 0.0, 60.0, 40.0))
    long = ShotFile(data.names, (1,), 0, "support", {1: {"cat": (cat,), "dog": (dog, dog)}}, nested=False)
    with pytest.raises(DataError, match="class 'dog': have 2 shots, need 1"):
        long.picks(data, 1)


def test_a_file_of_unit_image_says_so_and_is_read(data, tmp_path):
    drawn = ShotFile.draw(data, [1], 0, unit="image")
    drawn.save(tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text())["unit"] == "image"
    assert ShotFile.load(tmp_path / "s.json") == drawn and load_picks(tmp_path / "s.json", data, 1) == {1: [(0, 0)]}


def test_version_1_is_read_as_it_was_written(data, tmp_path):
    (tmp_path / "old.json").write_text(json.dumps(VERSION_1))
    old = ShotFile.load(tmp_path / "old.json")
    assert (old.unit, old.nested, old.ks, old.seed, old.classes) == ("instance", True, (1,), 3, ("cat",))
    assert old == ShotFile.draw(data, [1], 3) and old.picks(data, 1) == {1: [(0, 0)]}
    for change, told in (
        ({"unit": "image"}, "unit = instance, got 'image'"),
        ({"nested": False}, "nested = True, got "),
    ):
        (tmp_path / "old.json").write_text(json.dumps(VERSION_1 | change))
        with pytest.raises(DataError, match=told):
            ShotFile.load(tmp_path / "old.json")


def unnested(data) -> ShotFile:
    """The one-shot list is no part of the two-shot list."""
    cat, dog = Shot("a.jpg", (10.0, 5.0, 30.0, 25.0)), Shot("a.jpg", (0.0, 0.0, 60.0, 40.0))
    lists = {1: {"cat": (cat,), "dog": ()}, 2: {"cat": (), "dog": (dog,)}}
    return ShotFile(data.names, (1, 2), 4, "support", lists, nested=False, sampler="tfa-coco")


def test_lists_that_are_not_nested_are_kept_apart(data, tmp_path):
    unnested(data).save(tmp_path / "s.json")
    head = json.loads((tmp_path / "s.json").read_text())
    assert head["nested"] is False and sorted(head["shots"]) == ["1", "2"]
    loaded = ShotFile.load(tmp_path / "s.json")
    assert loaded == unnested(data)
    assert [row.box[0] for row in loaded.shots(1)["cat"]] == [10] and not loaded.shots(1)["dog"]
    assert not loaded.shots(2)["cat"] and loaded.shots() == loaded.shots(2)
    with pytest.raises(DataError, match=r"a list of 3 shots, got lists of 1, 2, which are not nested\. Next: "):
        loaded.picks(data, 3)


def test_shots_are_found_where_two_records_share_an_image(data):
    whole = data.split("support")[0]
    parts = [ImageRecord(whole.path, whole.size, whole.boxes[j : j + 1], whole.labels[j : j + 1]) for j in (0, 1)]
    apart = sources.DataSet(data.root, data.base, data.novel, {"support": parts}, data.report)
    shots = ShotFile.draw(data, [1], 0, classes=["cat"])
    assert shots.picks(apart, 1) == {1: [(list(whole.labels).index(1), 0)]}


def test_the_picks_of_k_are_the_first_k_of_a_nested_list():
    data = sources.DataSet(Path("/data"), NAMES[:1], NAMES[1:], {"support": RECORDS}, Report())
    shots = ShotFile.draw(data, [2, 5], 0)
    five = shots.picks(data)
    assert {c: len(rows) for c, rows in five.items()} == {1: 5, 2: 5} and shots.picks(data, 5) == five
    assert (
        shots.picks(data, 2) == {c: rows[:2] for c, rows in five.items()} == draw_shots(RECORDS, [1, 2], [2], 0, NAMES)
    )


def test_a_box_is_matched_with_the_nearest_of_its_class_within_the_distance():
    boxes = [[0.6, 0, 9, 9], [0.3, 0, 9, 9], [0, 0, 9, 9], [50, 0, 59, 9]]
    records = [record("a.jpg", []), ImageRecord(Path("b.jpg"), (100, 100), np.array(boxes), np.array([1, 1, 0, 1]))]
    assert match(records, [0, 1], 1, (0, 0, 9, 9), 1.0) == (1, 1)
    assert match(records, [0, 1], 1, (0, 0, 9, 9), 0.25) is None is match(records, [0], 1, (0, 0, 9, 9), 1.0)
    assert match(records, [1], 1, (50, 1, 59, 9), 1.0) == (1, 3)  # the distance itself is within


VERSION_1 = {
    "version": 1, "unit": "instance", "nested": True, "sampler": "image-first-1",
    "sha256": hashlib.sha256(b'{"cat":[{"box":[10.0,5.0,30.0,25.0],"image":"a.jpg"}]}').hexdigest(),
    "names": ["dog", "cat"], "ks": [1], "seed": 3, "split": "support",
    "shots": {"cat": [{"image": "a.jpg", "box": [10.0, 5.0, 30.0, 25.0]}]},
}  # fmt: skip

DAMAGE = {
    "edited box": lambda d: d["shots"]["cat"][0]["box"].__setitem__(0, 11),
    "removed shot": lambda d: d["shots"]["cat"].clear(),
    "no hash": lambda d: d.pop("sha256"),
    "version": lambda d: d.update(version=3),
    "unit": lambda d: d.update(unit="box"),
    "nested": lambda d: d.update(nested=False),
    "no word on nesting": lambda d: d.pop("nested"),
    "no numbers of shots": lambda d: d.update(ks=[]),
    "words of shots": lambda d: d.update(ks=["one"]),
    "no list": lambda d: d.pop("shots"),
    "wrong list": lambda d: d.update(shots=[1]),
    "three numbers": lambda d: d["shots"]["cat"][0]["box"].pop(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_touched_file_is_refused(data, tmp_path, damage):
    path = tmp_path / "shots.json"
    ShotFile.draw(data, [1], 0).save(path)
    document = json.loads(path.read_text())
    DAMAGE[damage](document)
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=r"shots\.json"):
        ShotFile.load(path)


@pytest.mark.parametrize("key", ["names", "ks", "seed", "split", "unit", "nested", "sampler", "sha256", "shots"])
@pytest.mark.parametrize("value", [None, 1, 1.5, -1, True, "a", [], [None], ["1"], [[1]], {}, {"a": 1}, {"1": 1}])
def test_a_value_of_another_type_is_refused_or_harmless(data, tmp_path, key, value):
    path = tmp_path / "shots.json"
    ShotFile.draw(data, [1], 0).save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    try:
        assert ShotFile.load(path).picks(data, 1) == {1: [(0, 0)]}
    except DataError as error:
        assert "shots.json" in str(error) or "Next: " in str(error)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_what_is_no_shot_file_is_refused(tmp_path, text):
    (tmp_path / "shots.json").write_text(text)
    with pytest.raises(DataError, match="a shot file"):
        ShotFile.load(tmp_path / "shots.json")


def test_a_shot_in_a_file_whose_name_is_no_utf_8_is_drawn_and_found_again(tmp_path):
    data = sources.load(no_utf_8(tmp_path))
    drawn = ShotFile.draw(data, [1], 0, "train")
    drawn.save(tmp_path / "s.json")
    assert (tmp_path / "s.json").read_text(encoding="utf-8").count(r"\udcff.jpg") == 1
    picks = load_picks(tmp_path / "s.json", data, 1)
    assert picks == {data.names.index("cat"): [(1, 0)]}
