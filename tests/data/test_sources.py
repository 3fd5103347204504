# SPDX-License-Identifier: AGPL-3.0-or-later
"""load(): classes by name over mixed formats, nothing read outside the root, hostile YAML refused, the real sets."""

import os
from pathlib import Path

import pytest

from dataset_files import NAMES, OBJECTS, coco, coco_document, data_yaml, image, images, rows_of, voc, voc_xml, yolo
from fsdet.data import sources
from fsdet.data.splits import COCO, SPELLINGS, VOC, named_split
from fsdet.errors import DataError

REAL = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def mixed(tmp_path):
    """The same two images as COCO, YOLO and VOC under one root."""
    coco(tmp_path / "coco", seed=1)
    yolo(tmp_path / "yolo", seed=2)
    voc(tmp_path / "voc", seed=3)
    return tmp_path


def test_three_formats_in_one_split_with_classes_by_name(mixed):
    file = data_yaml(mixed, train=["coco/boxes.json", "yolo/images", "voc"], test="voc", base=["dog"], novel=["cat"],
                     names=list(NAMES))  # fmt: skip
    data = sources.load(file)
    assert data.names == ("dog", "cat") and data.base == ("dog",) and data.novel == ("cat",) and data.num_base == 1
    assert data.splits == ("train", "test") and data.has("test") and not data.has("val")
    train = data.split("train")
    assert len(train) == 6 and data.split("train") is train
    for number, record in enumerate(train):
        want = OBJECTS[record.path.name]
        crowds = [crowd and number // 2 != 1 for _, _, crowd in want]  # YOLO knows none
        rows = [(name, box, crowd) for (name, box, _), crowd in zip(want, crowds, strict=True)]
        assert rows_of(record, data.names) == rows
    assert not len(data.report)


def test_missing_split_says_which_there_are(mixed):
    data = sources.load(data_yaml(mixed, train="voc", base=["cat", "dog"]))
    with pytest.raises(DataError, match="expected a split 'val', got train"):
        data.split("val")


def test_advice_about_a_split_that_is_not_there_can_be_followed(mixed):
    """A key is to be added only if a data YAML may have it; then it makes the split that was asked for."""
    data = sources.load(data_yaml(mixed, train="voc", val="yolo/images", names=list(NAMES)))
    with pytest.raises(DataError) as caught:
        data.split("foo")
    advice = str(caught.value).partition("Next: ")[2]
    assert advice == "name one that is there (train, val); a data YAML has no splits but train, val, test, support."
    assert not sources.load(data_yaml(mixed, train="voc", foo="voc")).has("foo")
    with pytest.raises(DataError, match=r"Did you mean 'val'"):
        data.split("vall")
    for split in ("test", "support"):
        with pytest.raises(DataError, match=rf"Next: name one that is there \(train, val\), or add `{split}:`"):
            data.split(split)
        assert sources.load(data_yaml(mixed, train="voc", **{split: "voc"})).has(split)


def test_only_wanted_splits_are_read(mixed):
    (mixed / "broken.json").write_text("{")
    file = data_yaml(mixed, train="broken.json", test="voc", base=["cat", "dog"])
    assert sources.load(file, splits=["test"]).splits == ("test",)
    with pytest.raises(DataError, match=r"broken\.json"):
        sources.load(file)


def test_a_novel_class_that_nobody_has_does_not_make_the_one_that_is_meant_a_base_class(mixed):
    """Without base: every class but the novel ones is one; with it the class may come later, by registration."""
    with pytest.raises(DataError, match=r"novel: expected a class of the sources \(cat, dog\), got 'zebra'"):
        sources.load(data_yaml(mixed, train="voc", novel=["zebra"]))
    assert sources.load(data_yaml(mixed, train="voc", base=["cat", "dog"], novel=["zebra"])).novel == ("zebra",)


def test_unlisted_class_is_dropped_with_a_line_and_absent_class_warned(mixed):
    data = sources.load(data_yaml(mixed, train="voc", base=["dog"], novel=["zebra"]))
    assert data.report.counts == {"class absent from every source": 1, "object of a class in neither base nor novel": 1}
    assert "'cat'" in str(data.report) and "a.xml: object 1" in str(data.report) and "'zebra'" in str(data.report)
    assert [record.labels.tolist() for record in data.split("train")] == [[0], [0]]
    assert all(record.exhaustive is None for record in data.split("train"))


@pytest.mark.parametrize("wrong", ["Cat", "cats", "ca t"])
def test_a_near_miss_of_a_class_name_is_an_error_with_the_right_name(mixed, wrong):
    with pytest.raises(DataError, match="Did you mean 'cat'"):
        sources.load(data_yaml(mixed, train="voc", base=["dog"], novel=[wrong]))
    with pytest.raises(DataError, match="Did you mean 'cat'"):
        sources.load(data_yaml(mixed, train="voc", novel=[wrong]))  # or the class would quietly be a base class


def test_novel_alone_makes_the_rest_base_and_no_list_makes_all_base(mixed):
    assert sources.load(data_yaml(mixed, train="voc", novel=["cat"])).base == ("dog",)
    assert sources.load(data_yaml(mixed, train="voc")).base == NAMES


def test_exhaustive_source_limits_what_an_image_is_known_to_lack(mixed):
    document = coco_document()
    document["categories"].append({"id": 200, "name": "bird"})
    coco(mixed / "coco2", document)
    file = data_yaml(mixed, train=["voc", "coco2/boxes.json"], base=["bird", "dog"], novel=["cat"], exhaustive="source")
    train = sources.load(file).split("train")
    assert [record.exhaustive for record in train] == [frozenset({1, 2})] * 2 + [frozenset({0, 1, 2})] * 2


def test_a_source_shared_by_two_splits_is_reported_once(mixed):
    (mixed / "voc" / "a.xml").write_text(voc_xml("a.jpg", (0, 0)))
    data = sources.load(data_yaml(mixed, train="voc", support="voc", base=["cat", "dog"]))
    assert data.report.counts == {"size missing or wrong in the annotation": 1}
    assert [r.path for r in data.split("train")] == [r.path for r in data.split("support")]


@pytest.mark.parametrize("where", ["cwd", "relative", "absolute"])
def test_path_starts_at_the_yaml_and_may_be_absolute(mixed, tmp_path_factory, monkeypatch, where):
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    home = mixed / "configs"
    path = {"cwd": None, "relative": "..", "absolute": str(mixed)}[where]
    keys = {"train": "voc", "base": ["cat", "dog"]} | ({"path": path} if path else {})
    data = sources.load(data_yaml(mixed if path is None else home, **keys))
    assert data.root == mixed and len(data.split("train")) == 2


def test_roboflow_habit_is_read_inside_and_reported(mixed):
    data = sources.load(data_yaml(mixed, train="../voc", base=["cat", "dog"]))
    assert data.split("train")[0].path == mixed / "voc" / "a.jpg"
    assert "'../voc' read as 'voc'" in str(data.report)


@pytest.mark.parametrize("source", ["../outside", "../../etc", "/etc", "sub/../../outside", "link", "../both"])
def test_paths_that_leave_the_root_are_refused(tmp_path, source):
    voc(tmp_path / "outside")
    voc(tmp_path / "both")
    root = tmp_path / "root"
    voc(root / "both")
    (root / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(DataError, match="inside"):
        sources.load(data_yaml(root, train=source, base=["cat", "dog"]))


def test_an_image_that_is_a_link_out_of_the_root_is_left_out(tmp_path):
    image(tmp_path / "outside.jpg", (8, 8))
    yolo(tmp_path / "root")
    os.symlink(tmp_path / "outside.jpg", tmp_path / "root/images/c.jpg")
    os.symlink(tmp_path / "root/images/a.jpg", tmp_path / "root/images/d.jpg")
    data = sources.load(data_yaml(tmp_path / "root", train="images", names=list(NAMES)))
    assert [record.path.name for record in data.split("train")] == ["a.jpg", "b.jpg", "d.jpg"]
    assert data.report.counts["path leaves the data root"] == 1


def linked(root, link, target):
    """A YOLO set whose images/ (or a part of it) is a link; what it links to, and every image that should be found."""
    yolo(root)
    (root / target).parent.mkdir(parents=True, exist_ok=True)
    place = root / "images"
    if link == "images":
        place.rename(root / target)
        place.symlink_to(root / target)
    else:
        (root / target).mkdir(parents=True)
        (place / "a.jpg").rename(root / target / "a.jpg")
        (root / link).symlink_to(root / target)
        (root / "labels" / Path(link).name).mkdir()
        (root / "labels/a.txt").rename(root / "labels" / Path(link).name / "a.txt")
    return data_yaml(root, train="images", names=list(NAMES))


@pytest.mark.parametrize(("link", "target"), [("images", "pool/jpg"), ("images/extra", "pool/jpg")])
def test_a_linked_folder_inside_the_root_is_read_with_the_labels_of_its_written_place(tmp_path, link, target):
    data = sources.load(linked(tmp_path / "root", link, target))
    assert sorted(record.path.name for record in data.split("train")) == ["a.jpg", "b.jpg"]
    assert all(len(record.labels) for record in data.split("train")) and not len(data.report)


def test_links_in_a_circle_end_and_links_out_of_the_root_are_reported_once(tmp_path):
    yolo(tmp_path / "root")
    yolo(tmp_path / "outside")
    (tmp_path / "root/images/again").symlink_to(tmp_path / "root/images")
    (tmp_path / "root/images/out").symlink_to(tmp_path / "outside/images")
    data = sources.load(data_yaml(tmp_path / "root", train="images", names=list(NAMES)))
    assert [record.path.name for record in data.split("train")] == ["a.jpg", "b.jpg"]
    assert data.report.counts == {"path leaves the data root": 1} and "images/out" in str(data.report)


def test_wrong_paths_get_advice(mixed):
    with pytest.raises(DataError, match="Did you mean 'voc'"):
        sources.load(data_yaml(mixed, train="vok", base=["cat", "dog"]))
    with pytest.raises(DataError, match=r"Did you mean 'data\.yaml'"):
        sources.load(mixed / "date.yaml")
    with pytest.raises(DataError, match="existing folder"):
        sources.load(data_yaml(mixed, path="nowhere", train="voc"))


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 10)}]\n" for i in range(7)
)
HOSTILE = {
    "python object": ("train: !!python/object/apply:os.system ['touch hacked']\n", "constructor"),
    "alias bomb": (BOMB, "aliases"),
    "circle": ("train: &a [*a]\n", "contains itself"),
    "repeated key": ("train: voc\ntrain: yolo\n", "twice"),
    "no mapping": ("- a\n", "mapping"),
    "empty": ("", "mapping"),
    "not yaml": ("train: [", "plain YAML"),
    "binary": (b"\x00\xff\xfe", "plain YAML"),
    "deep": ("train: " + "[" * 1500, "plain YAML"),
    "near key": ("trian: voc\n", "Did you mean 'train'"),
    "no split": ("base: [cat]\n", "at least one of train"),
    "yes is no name": ("train: voc\nbase: [yes, dog]\n", "quotes"),
    "both lists": ("train: voc\nbase: [cat]\nnovel: [cat]\n", "in both"),
    "copies": ("train: voc\nbase: [cat, cat]\n", "every name once"),
    "gaps": ("train: voc\nnames: {0: cat, 2: dog}\n", "without gaps"),
    "nc": ("train: voc\nnc: 3\nnames: [cat, dog]\n", "nc = 2"),
    "source": ("train: {folder: voc}\n", "path"),
    "number": ("train: 3\n", "path"),
    "split name": ("train: voc\nsplit: voc4\n", "Did you mean 'voc"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_or_wrong_yaml_is_refused_by_name(mixed, monkeypatch, case):
    monkeypatch.chdir(mixed)
    text, told = HOSTILE[case]
    (mixed / "data.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=told):
        sources.load(mixed / "data.yaml")
    assert not (mixed / "hacked").exists()


REPEATED = {  # text, the key, its first and its second line
    "top": ("# a comment\ntrain: voc\nbase: [cat]\n\nnovel: [dog]\ntrain: yolo\n", "train", 2, 6),
    "nested": ("train:\n  path: voc\n  # images follow\n  images: voc\n  path: coco\nbase: [cat]\n", "path", 2, 5),
    "in a list": ("train:\n- voc\n- path: yolo\n  names: [a]\n\n  names: [b]\n", "names", 4, 6),
    "in one line": ("train: voc\nval: {path: voc, path: coco}\n", "path", 2, 2),
    "three times": ("train: voc\nnc: 2\nnc: 2\nnc: 2\n", "nc", 2, 3),
    "behind an anchor": ("train: &a\n  path: voc\n  path: voc\nval: *a\n", "path", 2, 3),
}


@pytest.mark.parametrize("case", REPEATED)
def test_a_repeated_key_is_told_at_its_second_line(mixed, case):
    text, key, first, second = REPEATED[case]
    (mixed / "data.yaml").write_text(text)
    with pytest.raises(DataError) as caught:
        sources.load(mixed)
    told = f"{mixed / 'data.yaml'}:{second}: expected every key once, got '{key}' twice, first in line {first}. Next: "
    assert str(caught.value).startswith(told)


def test_a_repeated_key_of_a_source_s_own_yaml_is_told_in_that_file(mixed):
    """YOLO class names come from the nearest data.yaml, which is not the one that was asked for."""
    own = mixed / "yolo/data.yaml"
    own.write_text("nc: 2\nnames: [cat, dog]\nnc: 2\n")
    with pytest.raises(DataError) as caught:
        sources.load(data_yaml(mixed, train="yolo/images"))
    assert str(caught.value).startswith(f"{own}:3: expected every key once, got 'nc' twice, first in line 1.")


def test_a_large_yaml_is_refused_unread(tmp_path):
    (tmp_path / "data.yaml").write_text("#" * (5 << 20))
    with pytest.raises(DataError, match="at most"):
        sources.load(tmp_path)


def test_all_yaml_problems_are_told_at_once(mixed):
    with pytest.raises(DataError) as caught:
        sources.load(data_yaml(mixed, trian="voc", base=["cat"], novel=["cat"], nc=5, names=["cat"]))
    assert all(word in str(caught.value) for word in ("trian", "in both", "nc", "at least one of train"))


def test_download_is_ignored_with_a_line(mixed):
    data = sources.load(data_yaml(mixed, train="voc", base=["cat", "dog"], download="touch hacked", roboflow={"a": 1}))
    assert "fetches nothing" in str(data.report) and "'roboflow'" in str(data.report)


def test_bare_folders_split_by_their_subfolders(tmp_path):
    for split in ("train", "valid", "test"):
        voc(tmp_path / split)
    assert sources.load(tmp_path).splits == ("train", "val", "test")
    yolo(tmp_path / "flat")
    data = sources.load(data_yaml(tmp_path / "flat", train="images", names=["cat", "dog", "junk"]))
    assert data.names == ("cat", "dog", "junk") and data.report.counts == {"class without boxes": 1}


def test_nothing_to_read_is_an_error(tmp_path):
    with pytest.raises(DataError, match="COCO, YOLO or VOC"):
        sources.load(tmp_path)
    with pytest.raises(DataError, match="drop or fail"):
        sources.load(tmp_path, policy="ignore")


def test_xml_wins_over_a_json_and_a_json_over_txt_with_a_line(tmp_path):
    """What is passed over is told in either case."""
    coco(tmp_path / "both")
    voc(tmp_path / "both")
    coco(tmp_path / "labels")
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.1 0.1")
    for folder, told in (("both", "voc and coco: voc used"), ("labels", "coco and yolo: coco used")):
        data = sources.load(tmp_path / folder)
        assert data.report.counts["several formats"] == 1 and told in str(data.report)
        assert rows_of(data.split("train")[0], NAMES) == OBJECTS["a.jpg"]


def test_xml_wins_over_txt_with_a_line(tmp_path):
    voc(tmp_path)
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.1 0.1")
    data = sources.load(tmp_path)
    assert "several formats" in data.report.counts and rows_of(data.split("train")[0], NAMES) == OBJECTS["a.jpg"]


def test_non_ascii_names_and_spaces(tmp_path):
    folder = tmp_path / "données été"
    voc(folder)
    os.rename(folder / "a.jpg", folder / "ä b.jpg")
    os.rename(folder / "a.xml", folder / "ä b.xml")
    (folder / "ä b.xml").write_text(voc_xml("a.jpg", rows=[("größe 1", (1, 1, 9, 9), False)]), "utf-8")
    data = sources.load(folder)
    assert set(data.names) == {"dog", "größe 1"}


# support folders ------------------------------------------------------------------------------------------------


def test_support_image_without_box_file_is_the_object(tmp_path):
    image(tmp_path / "s/pear/1.jpg", (30, 40))
    image(tmp_path / "s/apple/x.PNG", (10, 20))
    names, records = sources.support_folder(tmp_path / "s")
    assert names == ("apple", "pear")
    assert [rows_of(r, names) for r in records] == [
        [("apple", (0, 0, 20, 10), False)],
        [("pear", (0, 0, 40, 30), False)],
    ]


def test_support_box_files_of_both_kinds(tmp_path):
    images(tmp_path / "dog")
    (tmp_path / "dog/a.txt").write_text("7 0.5 0.5 0.5 0.5\n")
    (tmp_path / "dog/b.xml").write_text(
        voc_xml("b.jpg", rows=[("dog", (5, 5, 20, 20), False), ("cat", (1, 1, 9, 9), False)])
    )
    names, records = sources.support_folder(tmp_path)
    assert [rows_of(r, names) for r in records] == [
        [("dog", (15, 10, 45, 30), False)],
        [("dog", (5, 5, 20, 20), False)],
    ]


def test_a_support_box_may_end_in_a_score(tmp_path, caplog):
    """As detections are written; what is no score, and any other number of columns, is dropped and told."""
    image(tmp_path / "dog/a.jpg", (40, 60))
    rows = ["0 .5 .5 .5 .5 0", "0 .5 .5 .4 .4 0.87153", "0 .5 .5 .3 .3 1", "0 .5 .5 .2 .2"]
    wrong = [f"0 .5 .5 .1 .1 {score}" for score in ("1.01", "-0.1", "nan", "x")] + ["0 .5 .5 .1"]
    (tmp_path / "dog/a.txt").write_text("\n".join([*rows, *wrong]))
    names, [record] = sources.support_folder(tmp_path)
    assert [rows[1] for rows in rows_of(record, names)] == [
        (15, 10, 45, 30), (18, 12, 42, 28), (21, 14, 39, 26), (24, 16, 36, 24)]  # fmt: skip
    assert "4  wrong number of columns: 6, the last of which is no score from 0 to 1  (dog/a.txt:5, " in caplog.text
    assert "1  wrong number of columns: 4  (dog/a.txt:9)" in caplog.text


def test_support_as_one_json(tmp_path):
    names, records = sources.support_folder(coco(tmp_path))
    assert names == NAMES and [rows_of(r, names) for r in records] == [OBJECTS["a.jpg"], OBJECTS["b.jpg"]]
    assert sources.support_folder(tmp_path)[0] == NAMES


@pytest.mark.parametrize("fault", ["nothing", "empty", "class", "broken", "two numbers", "two names", "all bad"])
def test_support_faults_are_told(tmp_path, fault):
    folder = tmp_path / "s"
    if fault != "nothing":
        folder.mkdir()
    if fault not in ("nothing", "empty"):
        image(folder / "ok/a.jpg", (20, 20))
        (folder / "dog").mkdir()
    if fault not in ("nothing", "empty", "class"):
        image(folder / "dog/a.jpg", (20, 20))
    if fault == "broken":
        (folder / "dog/a.jpg").write_bytes(b"x")
    if fault in ("two numbers", "all bad"):
        (folder / "dog/a.txt").write_text("0 .5 .5 .1 .1\n1 .5 .5 .1 .1" if fault == "two numbers" else "0 .5 .5 0 0")
    if fault == "two names":
        (folder / "dog/a.xml").write_text(
            voc_xml("a.jpg", rows=[("x", (1, 1, 5, 5), 0), ("y", (1, 1, 5, 5), 0)], size=(9, 9))
        )
    with pytest.raises(DataError, match=r"Next: "):
        sources.support_folder(folder)


def test_what_was_dropped_beside_an_empty_class_is_told_once(tmp_path, caplog):
    image(tmp_path / "dog/a.jpg", (20, 20))
    (tmp_path / "dog/b.jpg").write_bytes(b"x")
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match=r"got none for cat\ndropped +1  unreadable image  \(dog/b\.jpg\)"):
        sources.support_folder(tmp_path)
    assert caplog.text == ""
    (tmp_path / "cat").rmdir()
    sources.support_folder(tmp_path)
    assert caplog.text.count("dog/b.jpg") == 1


def test_support_that_is_passed_over_is_told(tmp_path, caplog):
    """What lies where no shot is read, each with its place; what tools leave beside images is no word worth."""
    folder, outside = tmp_path / "s", tmp_path / "outside"
    for name in ("dog/a.jpg", "dog/more/b.jpg", "loose.png"):
        image(folder / name, (20, 20))
    for name in ("dog/orphan.txt", "dog/classes.txt", "dog/notes.md", "dog/.hidden.txt", "readme.txt"):
        (folder / name).write_text("0 .5 .5 .5 .5\n")
    (folder / "dog/gone.jpg").symlink_to(folder / "nowhere.jpg")
    image(outside / "secret/c.jpg", (20, 20))
    (folder / "cat").mkdir()
    image(folder / "cat/d.jpg", (20, 20))
    (folder / "cat/out").symlink_to(outside / "secret")
    names, records = sources.support_folder(folder)
    assert names == ("cat", "dog") and [r.path.name for r in records] == ["d.jpg", "a.jpg"]
    told = caplog.text
    for kind, where in (("image outside the class folders", "loose.png"), ("folder in a class folder", "dog/more"),
                        ("label file without an image", "dog/orphan.txt"), ("missing image", "dog/gone.jpg"),
                        ("folder in a class folder", "cat/out")):  # fmt: skip
        assert any(kind in line and where in line for line in told.splitlines()), (kind, where)
    assert not any(word in told for word in ("classes.txt", "notes.md", "hidden", "readme", "c.jpg"))


def test_several_jsons_beside_the_class_folders_of_a_support_are_told(tmp_path, caplog):
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
        image(tmp_path / name / "a.jpg", (20, 20))
        (tmp_path / f"{name}.json").write_text("{}")
    names, _ = sources.support_folder(tmp_path)
    assert names == ("train", "val")
    [line] = [text for text in caplog.text.splitlines() if "one of several jsons, none of which is read" in text]
    assert "name one as the support" in line and "train.json" in line and "val.json" in line


def test_an_empty_support_folder_is_told_in_one_line(tmp_path):
    with pytest.raises(DataError) as error:
        sources.support_folder(tmp_path)
    assert "\n" not in str(error.value) and "got no class" in str(error.value)


# published splits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "novel"),
    [("voc1", "bird bus cow motorbike sofa"), ("voc2", "aeroplane bottle cow horse sofa"),
     ("voc3", "boat cat motorbike sheep sofa")],
)  # fmt: skip
def test_voc_splits(name, novel):
    base, new = named_split(name)
    assert " ".join(new) == novel and len(base) == 15 and list(base) == sorted(base)
    assert set(base) | set(new) == set(VOC) and len(VOC) == 20


def test_coco_split_is_60_and_the_20_that_voc_has():
    base, novel = named_split("coco")
    ids = [1, 2, 3, 4, 5, 6, 7, 9, 16, 17, 18, 19, 20, 21, 44, 62, 63, 64, 67, 72]
    assert [COCO[i] for i in ids] == list(novel) and len(base) == 60 and not set(base) & set(novel)
    assert len(COCO) == 80 == len(set(COCO.values())) and (COCO[90], COCO[34]) == ("toothbrush", "frisbee")


def test_split_key_stands_for_base_and_novel(tmp_path):
    write_voc_classes(tmp_path, VOC)
    data = sources.load(data_yaml(tmp_path, train=".", split="voc1"))
    assert (data.base, data.novel) == named_split("voc1")
    assert [data.names[label] for label in data.split("train")[0].labels] == list(VOC)  # whatever the numbers


def write_voc_classes(folder, names):
    (voc(folder) / "b.xml").unlink()
    (folder / "a.xml").write_text(voc_xml("a.jpg", rows=[(name, (1, 1, 9, 9), False) for name in names]))


@pytest.mark.parametrize("voc_name", SPELLINGS)
def test_a_split_of_the_other_publishers_words_is_refused_with_the_word(tmp_path, voc_name):
    coco_name = SPELLINGS[voc_name]
    write_voc_classes(tmp_path, [coco_name if name == voc_name else name for name in VOC])
    with pytest.raises(DataError, match=f"got '{voc_name}'. .*Did you mean '{coco_name}'"):
        sources.load(data_yaml(tmp_path, train=".", split="voc1"))
    document = coco_document()
    document["categories"] = [{"id": i, "name": voc_name if n == coco_name else n} for i, n in COCO.items()]
    document["annotations"] = []
    (tmp_path / "coco").mkdir()
    coco(tmp_path / "coco", document)
    with pytest.raises(DataError, match=f"got '{coco_name}'. .*Did you mean '{voc_name}'"):
        sources.load(data_yaml(tmp_path, train="coco/boxes.json", split="coco"))


def test_a_split_by_name_needs_every_class_of_it(tmp_path):
    write_voc_classes(tmp_path, [name for name in VOC if name not in ("sofa", "train")])
    with pytest.raises(DataError, match=r"the 20 classes of split voc3, got 18 of them, without train, sofa\. Next: "):
        sources.load(data_yaml(tmp_path, train=".", split="voc3"))
    assert sources.load(data_yaml(tmp_path, train=".", split="voc3"), splits=["train"]).novel[-1] == "sofa"


@pytest.mark.parametrize("name", [["voc1"], {"voc": 1}, 1, None, "VOC1", "voc4"])
def test_another_split_is_refused(tmp_path, name):
    voc(tmp_path)
    with pytest.raises(DataError, match="one of voc1, voc2, voc3, coco"):
        sources.load(data_yaml(tmp_path, train=".", split=name))


# the published sets, where they lie beside the checkout -----------------------------------------------------------

beside = pytest.mark.skipif(not REAL.is_dir(), reason="the published sets are not beside the checkout")


@beside
@pytest.mark.parametrize(
    ("name", "images", "boxes", "classes", "findings"),
    [
        ("chess", {"train": 606, "val": 58, "test": 29}, 7086 - 3, 13,
         {"key": 1, "path": 3, "empty label file": 1, "duplicate box": 3}),
        ("cards", {"train": 296, "test": 67}, 670, 6, {}),
        ("fruits", {"train": 240, "test": 60}, 582, 3, {"size missing or wrong in the annotation": 37}),
    ],
)  # fmt: skip
def test_real_sets_load_as_published(name, images, boxes, classes, findings):
    data = sources.load(REAL / name)
    assert {split: len(data.split(split)) for split in data.splits} == images
    assert sum(len(record.labels) for split in data.splits for record in data.split(split)) == boxes
    assert len(data.names) == classes and data.report.counts == findings


@beside
def test_real_sets_together_base_chess_novel_cards_and_fruits(tmp_path):
    chess = sources.load(REAL / "chess").names
    novel = ["nine", "ten", "jack", "queen", "king", "ace", "apple", "banana", "orange"]
    file = data_yaml(
        tmp_path,
        path=str(REAL),
        train="chess/train/images",
        base=list(chess[1:]),
        novel=novel,
        test=["chess/test/images", "cards/test", "fruits/test"],
        support=["cards/train", "fruits/train"],
    )
    data = sources.load(file)
    assert (data.num_base, len(data.names), len(data.split("test")), len(data.split("support"))) == (12, 21, 156, 536)
    assert data.report.counts["object of a class in neither base nor novel"] == 3  # bishop, the junk class
    assert min(r.labels.min() for r in data.split("support")) == 12
