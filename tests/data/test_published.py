# SPDX-License-Identifier: AGPL-3.0-or-later
"""Published shot lists come out as they were published; every slip of a folder is told at once."""

import json
import logging
from collections import Counter
from pathlib import Path

import pytest

from dataset_files import data_yaml, image, voc_xml
from fsdet.cli.main import main
from fsdet.data import sources
from fsdet.data.published import read_published
from fsdet.data.shots import ShotFile
from fsdet.data.splits import COCO as COCO_NAMES
from fsdet.data.splits import VOC as VOC_NAMES
from fsdet.errors import DataError

# VOC: the layout of TFA ---------------------------------------------------------------------------------------------

OTHERS = ("bus", "cow", "motorbike", "sofa")
VOC = {  # file: [(class, xyxy px, difficult)]
    "VOC2007/000001": [("bird", (1, 1, 9, 9), False), ("person", (2, 2, 20, 20), False)],
    "VOC2007/000002": [("bird", (10 * i, 0, 10 * i + 8, 8), False) for i in range(3)],
    "VOC2012/2008_000003": [("bird", (1, 1, 9, 9), True), *((name, (5, 5, 30, 30), False) for name in OTHERS)],
    "VOC2012/2008_000004": [(name, (6, 6, 30, 30), False) for name in OTHERS],
    "VOC2012/2011_000005": [(name, (7, 7, 30, 30), False) for name in VOC_NAMES],  # in no list
}
BIRDS = {1: ["000001"], 2: ["000001", "000002"], 3: ["000002"]}


def line(stem: str, start: str = "") -> str:
    return f"{start}VOC{'2012' if '_' in stem else '2007'}/JPEGImages/{stem}.jpg"


def write_voc_lists(folder: Path, birds: dict[int, list[str]], start: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k, stems in birds.items():
        (folder / f"box_{k}shot_bird_train.txt").write_text("\n".join(line(s, start) for s in stems) + "\n")
        for name in (*OTHERS, "person"):
            stems = ["000001"] if name == "person" else ["2008_000003", "2008_000004"][:k]
            (folder / f"box_{k}shot_{name}_train.txt").write_text("\n".join(map(line, stems)))


@pytest.fixture
def voc(tmp_path):
    for name, rows in VOC.items():
        year, stem = name.split("/")
        image(tmp_path / f"VOC/{year}/JPEGImages/{stem}.jpg", (40, 40))
        xml = tmp_path / f"VOC/{year}/Annotations/{stem}.xml"
        xml.parent.mkdir(exist_ok=True)
        xml.write_text(voc_xml(f"{stem}.jpg", (40, 40), rows))
    write_voc_lists(tmp_path / "vocsplit", {1: BIRDS[1], 2: BIRDS[2]})
    write_voc_lists(tmp_path / "vocsplit/seed1", {1: ["000002"], 2: ["000002"]}, start="datasets/")
    return sources.load(data_yaml(tmp_path / "VOC", train=["VOC2007", "VOC2012"], split="voc1"))


def instances(data, file: ShotFile, k: int) -> dict[str, list[tuple]]:
    """{class: [(stem, box)]} of a file's picks, as the data set has them."""
    records = data.split(file.split)
    return {
        data.names[c]: sorted((records[i].path.stem, tuple(records[i].boxes[j].tolist())) for i, j in rows)
        for c, rows in file.picks(data, k).items()
    }


def test_voc_seed_0_is_the_folder_itself_and_others_their_own(voc, tmp_path):
    zero, one = read_published(voc, tmp_path / "vocsplit", [0, 1])
    assert (zero.ks, zero.seed, zero.unit, zero.nested, zero.sampler) == ((1, 2), 0, "instance", False, "tfa-voc")
    assert zero.split == "train" and set(zero.classes) == set(voc.novel) and one.seed == 1
    assert instances(voc, zero, 1)["bird"] == [("000001", (1, 1, 9, 9))]
    both = instances(voc, zero, 2)
    assert len(both["bird"]) == 2 and both["bird"][0] != both["bird"][1]  # of four boxes in the two images
    for name in OTHERS:
        assert both[name] == [("2008_000003", (5, 5, 30, 30)), ("2008_000004", (6, 6, 30, 30))]
    assert [stem for stem, _ in instances(voc, one, 1)["bird"]] == ["000002"]


def test_voc_boxes_beyond_k_are_drawn_exactly_and_repeatably(voc, tmp_path):
    chosen = Counter()
    for seed in range(2, 32):
        write_voc_lists(tmp_path / f"vocsplit/seed{seed}", {2: BIRDS[3]})
    files = read_published(voc, tmp_path / "vocsplit", range(2, 32), [2])
    assert files == read_published(voc, tmp_path / "vocsplit", range(2, 32), [2])
    for file in files:
        [first, second] = instances(voc, file, 2)["bird"]
        assert first != second
        chosen.update([first[1][0], second[1][0]])
    assert set(chosen) == {0, 10, 20} and all(8 <= n <= 32 for n in chosen.values())  # 20 expected, sigma 2.6


def test_voc_boxes_beyond_k_are_as_likely_as_each_other_wherever_they_are(voc, tmp_path):
    """FsDet's loader: np.random.choice(boxes of all listed images, K, replace=False)."""
    seeds = range(2, 102)
    for seed in seeds:
        write_voc_lists(tmp_path / f"vocsplit/seed{seed}", {2: BIRDS[2]})  # one box in 000001, three in 000002
    files = read_published(voc, tmp_path / "vocsplit", seeds, [2])
    single = sum("000001" in [stem for stem, _ in instances(voc, file, 2)["bird"]] for file in files)
    assert 30 <= single <= 70  # 2 of 4 boxes: 50 expected, sigma 5; 100 were each image to give one first


def test_voc_an_image_that_a_list_names_twice_gives_its_box_twice_only_where_nothing_else_is_left(
    voc, tmp_path, caplog
):
    """FsDet's prepare_voc_few_shot.py draws anew for every K, may draw an image again, and counts its boxes again."""
    lists = ((2, ["000001", "000001"]), (3, ["000001", "000001", "000002"]), (4, ["2008_000003", "2008_000003"]))
    for seed, stems in lists:
        write_voc_lists(tmp_path / f"vocsplit/seed{seed}", {2: stems})
    with caplog.at_level(logging.WARNING, "fsdet"):
        twice, spared, difficult = read_published(voc, tmp_path / "vocsplit", [2, 3, 4], [2])
    assert instances(voc, twice, 2)["bird"] == [("000001", (1, 1, 9, 9))] * 2
    boxes = instances(voc, spared, 2)["bird"]
    assert boxes[0] != boxes[1]
    assert instances(voc, difficult, 2)["bird"] == [("2008_000003", (1, 1, 9, 9))] * 2
    assert "2 shots come twice" in caplog.text
    twice.save(tmp_path / "twice.json")
    assert ShotFile.load(tmp_path / "twice.json") == twice
    write_voc_lists(tmp_path / "vocsplit/seed5", {3: ["000001", "000001"]})
    with pytest.raises(DataError, match="'bird': have 2 boxes, need 3"):
        read_published(voc, tmp_path / "vocsplit", [5], [3])


def test_voc_lists_reach_boxes_in_every_record_of_an_image(voc, tmp_path):
    """Two sources may label one image, each its own classes."""
    whole = voc.split("train")
    parts = [r.kept(r.labels == label) for r in whole for label in sorted(set(r.labels.tolist()), reverse=True)]
    apart = sources.DataSet(voc.root, voc.base, voc.novel, {"train": parts}, voc.report)
    drawn, split = (read_published(data, tmp_path / "vocsplit", [0, 1]) for data in (voc, apart))
    assert [file.sha256 for file in drawn] == [file.sha256 for file in split]


def test_voc_difficult_boxes_come_last_and_are_told(voc, tmp_path, caplog):
    for seed, stems in ((2, ["2008_000003", "000001"]), (3, ["2008_000003", "000002"])):
        write_voc_lists(tmp_path / f"vocsplit/seed{seed}", {2: stems})
    with caplog.at_level(logging.WARNING, "fsdet"):
        needed, spared = read_published(voc, tmp_path / "vocsplit", [2, 3], [2])
    assert [stem for stem, _ in instances(voc, needed, 2)["bird"]] == ["000001", "2008_000003"]
    assert [stem for stem, _ in instances(voc, spared, 2)["bird"]] == ["000002", "000002"]
    assert "1 shot is marked difficult" in caplog.text


def test_seed_0_may_have_a_folder_like_the_others(voc, tmp_path):
    write_voc_lists(tmp_path / "vocsplit/seed0", {1: ["000002"]})
    [zero] = read_published(voc, tmp_path / "vocsplit", [0])
    assert [stem for stem, _ in instances(voc, zero, 1)["bird"]] == ["000002"]


def test_every_fault_of_a_folder_of_voc_lists_is_told_at_once(voc, tmp_path):
    lists = tmp_path / "vocsplit"
    (lists / "box_1shot_bird_train.txt").write_text(f"{line('000009')}\n{line('2008_000004')}\n")
    (lists / "box_2shot_bird_train.txt").write_text(line("000001"))
    (lists / "box_1shot_bus_train.txt").write_bytes(b"\xff\xfe\x00 no text")
    (lists / "box_2shot_bus_train.txt").write_text("\n")
    (lists / "box_2shot_motobike_train.txt").write_text(line("2008_000003"))
    (lists / "seed1/box_2shot_cow_train.txt").unlink()
    for file in lists.rglob("*sofa*"):
        file.unlink()
    with pytest.raises(DataError) as caught:
        read_published(voc, lists, [0, 1, 2])
    told = str(caught.value).splitlines()
    assert "expected" in told[0] and "got 9 faults" in told[0] and "Next: " in told[0] and str(lists) in told[0]
    assert "no image called 'VOC2007/JPEGImages/000009.jpg' in split 'train'; no box of it in" in caught.value.args[0]
    for part in (
        "'motobike' is neither base nor novel. Did you mean 'motorbike'?", "class 'sofa' has no list",
        "box_2shot_bird_train.txt: 'bird': have 1 box, need 2", "box_1shot_bus_train.txt: 'utf-8'",
        "box_2shot_bus_train.txt: 'bus': have 0 boxes, need 2", "seed 1: no list of 2 shots of cow",
        "seed 2: no list of 1 shot of bird, bus, cow, motorbike",
    ):  # fmt: skip
        assert sum(part in row for row in told[1:]) == 1, part


def test_two_images_of_one_name_are_told_apart_by_their_folder_or_refused(voc, tmp_path):
    rows = [("bird", (3, 3, 9, 9), False)]
    image(tmp_path / "VOC/VOC2012/JPEGImages/000001.jpg", (40, 40))
    (tmp_path / "VOC/VOC2012/Annotations/000001.xml").write_text(voc_xml("000001.jpg", (40, 40), rows))
    twins = sources.load(tmp_path / "VOC")
    [zero] = read_published(twins, tmp_path / "vocsplit", [0], [1])
    assert instances(twins, zero, 1)["bird"] == [("000001", (1, 1, 9, 9))]
    (tmp_path / "vocsplit/box_1shot_bird_train.txt").write_text("000001\n")
    with pytest.raises(DataError, match="2 images called '000001' in split 'train'"):
        read_published(twins, tmp_path / "vocsplit", [0], [1])


# COCO: the layouts of TFA and CD-FSOD --------------------------------------------------------------------------------

CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}, {"id": 64, "name": "potted plant"}]
BOXES = {  # annotation id: (image id, category id, xywh px, crowd)
    1: (9, 17, [1, 1, 10, 10], 0), 2: (9, 64, [3.25, 4.5, 20.13, 20], 0), 3: (9, 17, [15, 1, 10, 10], 0),
    4: (581929, 17, [5, 5, 12, 12], 0), 5: (581929, 64, [8, 8, 40, 12.4], 0), 6: (581929, 17, [0, 0, 40, 40], 1),
    7: (7, 64, [2, 2, 30, 30], 0), 8: (7, 18, [1, 2, 30, 30], 0), 9: (7, 17, [20, 20, 9, 9], 0),
}  # fmt: skip


def document(ids=tuple(BOXES), prefix: str = "") -> dict:
    images = sorted({BOXES[n][0] for n in ids})
    rows = [{"id": n, "image_id": i, "category_id": c, "bbox": box, "iscrowd": crowd}
            for n, (i, c, box, crowd) in BOXES.items() if n in ids]  # fmt: skip
    listed = [{"id": i, "file_name": f"{prefix}{i:012d}.jpg", "height": 40, "width": 40} for i in images]
    return {"images": listed, "annotations": rows, "categories": CATEGORIES}


def write_coco_lists(folder: Path, lists: dict[tuple[int, str], tuple[int, ...]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for (k, name), ids in lists.items():
        file = folder / f"full_box_{k}shot_{name}_trainval.json"
        file.write_text(json.dumps(document(ids, prefix="COCO_train2014_")))


def coco_data(folder: Path, **keys):
    for number in (9, 581929, 7):
        image(folder / f"train2017/{number:012d}.jpg", (40, 40))
    (folder / "train.json").write_text(json.dumps(document()))
    source = {"path": "train.json", "images": "train2017"}
    return sources.load(data_yaml(folder, train=source, **{"base": ["dog"], "novel": ["cat", "potted plant"], **keys}))


@pytest.fixture
def coco(tmp_path):
    lists = {(1, "cat"): (4,), (1, "potted plant"): (2,), (3, "cat"): (1, 3, 9), (3, "potted plant"): (2, 5, 7),
             (1, "dog"): (8,), (3, "dog"): ()}  # fmt: skip
    write_coco_lists(tmp_path / "cocosplit", lists)
    write_coco_lists(tmp_path / "cocosplit/seed1", {(1, "cat"): (9,), (1, "potted plant"): (7,)})
    return coco_data(tmp_path / "coco", support={"path": "train.json", "images": "train2017"})


def boxes_of(*ids: int) -> list[tuple]:
    """The annotations as xyxy inside the 40 px images, rounded as float32 is."""
    found = []
    for n in ids:
        number, _, (x, y, w, h), _ = BOXES[n]
        found.append((f"{number:012d}", pytest.approx((x, y, min(x + w, 40), min(y + h, 40)))))
    return sorted(found, key=lambda row: (row[0], row[1].expected))


def test_coco_lists_are_taken_box_by_box_and_each_k_is_its_own(coco, tmp_path):
    zero, = read_published(coco, tmp_path / "cocosplit", [0])  # fmt: skip
    assert (zero.ks, zero.unit, zero.nested, zero.sampler, zero.split) == (
        (1, 3), "instance", False, "tfa-coco", "support")  # fmt: skip
    assert instances(coco, zero, 1) == {"cat": boxes_of(4), "potted plant": boxes_of(2)}
    assert instances(coco, zero, 3) == {"cat": boxes_of(1, 3, 9), "potted plant": boxes_of(2, 5, 7)}
    [one] = read_published(coco, tmp_path / "cocosplit", [1], [1])
    assert instances(coco, one, 1) == {"cat": boxes_of(9), "potted plant": boxes_of(7)}
    one.save(tmp_path / "one.json")
    assert ShotFile.load(tmp_path / "one.json") == one


def broken_coco(folder: Path, change) -> Path:
    file = folder / "full_box_3shot_cat_trainval.json"
    found = json.loads(file.read_text())
    file.write_text(change if isinstance(change, str) else json.dumps(change(found) or found))
    return folder


BROKEN = {
    "no json": ("{", "Expecting property name"),
    "deep": ("[" * 100_000, "recursion"),
    "no lists": (lambda d: {"images": []}, "no COCO json (a fault at 'categories')"),
    "a list": (lambda d: [d], "no COCO json"),
    "no number": (lambda d: d["annotations"][0].update(bbox=[1, 2, 3, "x"]), "could not convert string to float"),
    "three numbers": (lambda d: d["annotations"][0]["bbox"].__delitem__(0), "not enough values to unpack"),
    "not finite": (lambda d: d["annotations"][0].update(bbox=[float("nan")] * 4), "no such box [nan"),
    "unknown image": (lambda d: d["annotations"][0].update(image_id=3), "no COCO json (a fault at 3)"),
    "another class": (lambda d: d["annotations"][0].update(category_id=18), "boxes of dog in the list of 'cat'"),
    "other image": (lambda d: d["images"][0].update(file_name="1.jpg"), "no image called '1.jpg'"),
    "moved box": (lambda d: d["annotations"][0].update(bbox=[2.1, 1, 10, 10]), "no such box [2.1, 1, 12.1, 11] in"),
    "twice": (lambda d: d["annotations"][0].update(d["annotations"][1]), "twice [15, 1, 25, 11] in"),
    "too few": (lambda d: d["annotations"].__delitem__(0), "have 2 boxes, need 3"),
    "too many": (lambda d: document((1, 3, 4, 9)), "have 4 boxes, need 3"),
    "crowd": (lambda d: document((1, 6, 9)), "a crowd [0, 0, 40, 40] in"),
    "a path that leaves": (lambda d: d["images"][0].update(file_name="../../etc/passwd"), "no image called '../../etc"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_coco_list_that_does_not_fit_is_refused(coco, tmp_path, fault):
    change, told = BROKEN[fault]
    with pytest.raises(DataError) as caught:
        read_published(coco, broken_coco(tmp_path / "cocosplit", change), [0])
    assert told in str(caught.value) and "got 1 fault. " in str(caught.value)
    assert "cocosplit/full_box_3shot_cat_trainval.json" in str(caught.value)


def test_a_box_within_a_pixel_is_the_nearest_of_its_class(coco, tmp_path):
    folder = broken_coco(tmp_path / "cocosplit", lambda d: d["annotations"][0].update(bbox=[1.9, 1, 9.1, 10]))
    [zero] = read_published(coco, folder, [0], [3])
    assert instances(coco, zero, 3)["cat"] == boxes_of(1, 3, 9)


def write_cd_lists(folder: Path, lists: dict[int, tuple[int, ...]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for k, ids in lists.items():
        (folder / f"{k}_shot.json").write_text(json.dumps(document(ids)))
    return folder


def test_cd_fsod_lists_count_images(coco, tmp_path):
    folder = write_cd_lists(tmp_path / "annotations", {1: (4, 7), 2: (3, 9, 2, 5)})
    (folder / "test.json").write_text("no list")
    [file] = read_published(coco, folder, [0])
    assert (file.ks, file.unit, file.nested, file.sampler) == ((1, 2), "image", False, "cd-fsod")
    assert instances(coco, file, 1) == {"cat": boxes_of(4), "potted plant": boxes_of(7)}
    assert instances(coco, file, 2) == {"cat": boxes_of(3, 9), "potted plant": boxes_of(2, 5)}


@pytest.mark.parametrize(
    ("ids", "told"),
    [((1, 3, 2, 5), "'cat': boxes of fewer than 2 images, need one box in each"), ((3, 9, 2), "have 1 box, need 2"),
     ((3, 9), "2_shot.json: class 'potted plant' has no list"), ((), "class 'cat' has no list")],
)  # fmt: skip
def test_a_cd_fsod_list_of_another_number_is_refused(coco, tmp_path, ids, told):
    folder = write_cd_lists(tmp_path / "annotations", {2: ids})
    with pytest.raises(DataError) as caught:
        read_published(coco, folder, [0])
    assert told in str(caught.value)


def test_cd_fsod_classes_are_checked_and_missing_numbers_told(coco, tmp_path):
    folder = write_cd_lists(tmp_path / "annotations", {1: (4, 7)})
    text = (folder / "1_shot.json").read_text().replace("potted plant", "potted plants")
    (folder / "1_shot.json").write_text(text)
    with pytest.raises(DataError) as caught:
        read_published(coco, folder, [0], [1, 5])
    assert "'potted plants' is neither base nor novel. Did you mean 'potted plant'?" in str(caught.value)
    assert "seed 0: no list of 5 shots" in str(caught.value)


# folders --------------------------------------------------------------------------------------------------------------


def test_a_split_by_name_checks_the_classes_of_the_lists(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "CATEGORIES", [{"id": i, "name": n} for i, n in COCO_NAMES.items()])
    data = coco_data(tmp_path / "coco", split="coco", base=None, novel=None)
    write_coco_lists(tmp_path / "cocosplit", {(1, "cat"): (4,), (1, "pottedplant"): (2,), (1, "fridge"): ()})
    with pytest.raises(DataError) as caught:
        read_published(data, tmp_path / "cocosplit", [0])
    told = str(caught.value)
    assert "'pottedplant' is neither base nor novel. Did you mean 'potted plant'?" in told and "'fridge'" in told
    absent = [line for line in told.splitlines() if line.endswith("has no list")]
    assert len(absent) == 19 and "  class 'tv' has no list" in absent and "'cat'" not in "".join(absent)


def test_what_is_no_folder_of_lists_is_told_with_what_it_holds(coco, tmp_path):
    with pytest.raises(DataError, match="Did you mean 'cocosplit'"):
        read_published(coco, tmp_path / "cocosplits", [0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="got none; it holds nothing"):
        read_published(coco, tmp_path / "empty", [0])
    with pytest.raises(DataError, match=r"lists of one kind for seeds 4 to 5 .*it holds full_box"):
        read_published(coco, tmp_path / "cocosplit", [4, 5])
    write_cd_lists(tmp_path / "cocosplit", {1: (4, 7)})
    with pytest.raises(DataError, match="got tfa-coco and cd-fsod"):
        read_published(coco, tmp_path / "cocosplit", [0])
    with pytest.raises(DataError, match=r"expected a split 'suport'.*Did you mean 'support'"):
        read_published(coco, tmp_path / "cocosplit/seed1", [0], split="suport")


def test_without_numbers_every_number_of_any_seed_is_asked_of_all(coco, tmp_path):
    with pytest.raises(DataError) as caught:
        read_published(coco, tmp_path / "cocosplit", [5, 0, 1])
    told = [row.strip() for row in str(caught.value).splitlines()[1:]]
    assert told == [
        f"seed {s}: no list of {k} shot{'s' * (k > 1)} of cat, potted plant" for s, k in ((5, 1), (5, 3), (1, 3))
    ]


def test_a_list_behind_a_link_that_leaves_the_folder_is_not_read(coco, tmp_path):
    file = tmp_path / "cocosplit/full_box_1shot_cat_trainval.json"
    file.rename(tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(DataError, match=r"seed 0: no list of 1 shot of cat"):
        read_published(coco, tmp_path / "cocosplit", [0])


def test_a_list_beyond_the_size_cap_is_not_read(coco, tmp_path, monkeypatch):
    monkeypatch.setattr("fsdet.data.published.MAX_BYTES", 1 << 20)
    (tmp_path / "cocosplit/full_box_1shot_cat_trainval.json").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(DataError, match="larger than 1 MiB"):
        read_published(coco, tmp_path / "cocosplit", [0])


def test_very_many_faults_are_counted_and_the_first_hundred_listed(coco, tmp_path):
    with pytest.raises(DataError) as caught:
        read_published(coco, tmp_path / "cocosplit", range(150), [1])
    assert "got 148 faults" in str(caught.value) and str(caught.value).endswith("  and 48 more")


def test_the_command_writes_a_file_a_seed(coco, tmp_path, capsys):
    told = ["data", "shots", str(tmp_path / "coco/data.yaml"), "--from", str(tmp_path / "cocosplit")]
    assert main([*told, "--k", "1", "--seeds", "2", "--out", str(tmp_path / "out")]) == 0
    assert "seed1.json: 1 shot (instance) of 2 classes, seed 1" in capsys.readouterr().out
    files = [ShotFile.load(tmp_path / f"out/seed{seed}.json") for seed in (0, 1)]
    assert files == read_published(coco, tmp_path / "cocosplit", [0, 1], [1])
    assert main([*told, "--seed", "1", "--k", "1", "--unit", "image", "--out", str(tmp_path / "one.json")]) == 2
    assert "lists of the unit 'image', got tfa-coco lists" in capsys.readouterr().err
    assert not (tmp_path / "one.json").exists()
