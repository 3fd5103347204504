# SPDX-License-Identifier: AGPL-3.0-or-later
"""A class is one class however its name is spelt in Unicode, in each place where names are read."""

import json
import unicodedata
from pathlib import Path

import pytest

from dataset_files import coco, coco_document, data_yaml, image, images, voc_xml, yolo
from fsdet.data import refdet, sources
from fsdet.data.folders import load_folders
from fsdet.data.published import read_published
from fsdet.data.report import Report
from fsdet.data.root import Root
from fsdet.data.shots import ShotFile
from fsdet.errors import DataError
from fsdet.names import class_folders, composed, repeated
from fsdet.tasks.loading import spec_of

WHOLE = "caf\u00e9"
APART = unicodedata.normalize("NFD", WHOLE)


def test_the_parts_of_a_letter_are_put_together_and_nothing_else_is_changed():
    assert APART != WHOLE and composed(APART) == composed(WHOLE) == WHOLE
    assert composed("\ufb01g \u2460 A b") == "\ufb01g \u2460 A b", "which NFKC would rewrite"
    assert composed(7) == "7" and composed("\udcff") == "\udcff"


def test_names_that_become_equal_are_told():
    assert repeated(["a", WHOLE, "b"]) == {}
    assert repeated([WHOLE, "a", APART, "a"]) == {"a": "2 times", WHOLE: "2 times, in two spellings of Unicode"}


@pytest.mark.parametrize(("listed", "labelled"), [(WHOLE, APART), (APART, WHOLE)])
@pytest.mark.parametrize("fmt", ["coco", "voc", "yolo", "yolo, classes.txt"])
def test_lists_and_labels_of_each_format_meet(tmp_path, fmt, listed, labelled):
    source, names = "set", {}
    if fmt == "coco":
        document = coco_document()
        document["categories"][0]["name"] = labelled
        source = str(coco(tmp_path / "set", document).relative_to(tmp_path))
    elif fmt == "voc":
        images(tmp_path / "set")
        for name in ("a.jpg", "b.jpg"):
            text = voc_xml(name).replace("<name>cat<", f"<name>{labelled}<")
            (tmp_path / "set" / name.replace(".jpg", ".xml")).write_text(text, encoding="utf-8")
    else:
        source = str(yolo(tmp_path / "set").relative_to(tmp_path))
        names = {"names": [labelled, "dog"]} if fmt == "yolo" else {}
        (tmp_path / "set/classes.txt").write_text(f"{labelled}\ndog\n", encoding="utf-8")
    data = sources.load(data_yaml(tmp_path, train=source, base=["dog"], novel=[listed], **names))
    assert data.names == ("dog", WHOLE) and not data.report.counts.get("object of a class in neither base nor novel")
    assert sum((record.labels == 1).sum() for record in data.split("train")) == 1


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"base": [WHOLE, APART]}, f"data.yaml: base: expected every name once, got '{WHOLE}' 2 times, in two spell"),
        ({"base": ["dog", WHOLE], "novel": [APART]}, f"got '{WHOLE}' in both"),
        ({"names": [WHOLE, APART]}, "data.yaml: names: expected every name once"),
    ],
)
def test_a_data_yaml_with_a_name_in_two_spellings_is_refused(tmp_path, keys, told):
    yolo(tmp_path / "set")
    with pytest.raises(DataError, match=told):
        sources.load(data_yaml(tmp_path, train="set/images", **keys))


def test_a_json_or_classes_txt_with_a_name_in_two_spellings_is_one_class_and_this_is_told(tmp_path):
    document = coco_document()
    document["categories"] = [{"id": 7, "name": WHOLE}, {"id": 90, "name": APART}]
    data = sources.load(coco(tmp_path / "coco", document))
    assert data.names == (WHOLE,)
    assert f"class name given twice: '{WHOLE}' 2 times, in two spellings of Unicode" in str(data.report)
    yolo(tmp_path / "yolo")
    (tmp_path / "yolo/classes.txt").write_text(f"{WHOLE}\n{APART}\n", encoding="utf-8")
    data = sources.load(tmp_path / "yolo")
    assert data.names == (WHOLE,) and data.report.counts["class name given twice"] == 1


def test_folders_are_called_after_their_classes_in_either_spelling(tmp_path):
    for split, name in (("train", APART), ("val", WHOLE)):
        for i, folder in enumerate((name, "dog")):
            image(tmp_path / "sorted" / split / folder / "1.png", (20, 30), seed=i)
    data = load_folders(tmp_path / "sorted")
    assert data.names == (WHOLE, "dog") and [len(data.split(s)) for s in data.splits] == [2, 2]
    image(tmp_path / "support" / APART / "a.jpg", (40, 60))
    (tmp_path / "support" / APART / "a.xml").write_text(
        voc_xml("a.jpg").replace("<name>cat<", f"<name>{WHOLE}<"), encoding="utf-8"
    )
    names, (record,) = sources.support_folder(tmp_path / "support")
    assert names == (WHOLE,) and record.boxes.tolist() == [[10, 5, 30, 25]]
    image(tmp_path / "support" / WHOLE / "b.jpg", (40, 60))
    with pytest.raises(DataError, match=f"support: expected one folder for each class, got two for '{WHOLE}'"):
        sources.support_folder(tmp_path / "support")


def test_folders_by_name(tmp_path):
    assert list(class_folders(tmp_path / name for name in ("b", APART, "a"))) == ["a", "b", WHOLE]


def test_samples_of_refdet_and_their_annotations_meet(tmp_path):
    image(tmp_path / "samples" / APART / "object_images/1.jpg", (20, 30))
    (tmp_path / "annotations").mkdir()
    rows = [{"video_id": WHOLE, "annotations": []}]
    (tmp_path / "annotations/annotations.json").write_text(json.dumps(rows))
    report = Report()
    table = refdet.read(tmp_path, Root(tmp_path, report), report)
    assert table.names == [WHOLE] and "annotation of an unknown video" not in report.counts


def test_published_lists_and_shot_files_of_before_meet_the_data(tmp_path):
    document = coco_document()
    document["categories"][0]["name"] = WHOLE
    coco(tmp_path, document)
    data = sources.load(data_yaml(tmp_path, train="boxes.json", base=["dog"], novel=[WHOLE]))
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / f"box_1shot_{APART}_train.txt").write_text("a.jpg\n")
    (published,) = read_published(data, tmp_path / "lists", [0], [1])
    assert published.classes == (WHOLE,)
    drawn = ShotFile.draw(data, [1], 0, "train")
    old = ShotFile(("dog", APART), drawn.ks, 0, "train", {1: {APART: drawn.shots()[WHOLE]}})
    old.save(tmp_path / "old.json")
    assert ShotFile.load(tmp_path / "old.json").picks(data, 1) == drawn.picks(data, 1)


def test_a_checkpoint_of_before_has_its_classes_composed():
    spec = {"task": "fewshot", "model": {}, "classes": [APART, "dog"], "base": [APART]}
    assert spec_of(Path("best.pt"), {"spec": spec}) == {**spec, "classes": [WHOLE, "dog"], "base": [WHOLE]}
