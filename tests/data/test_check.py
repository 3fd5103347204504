# SPDX-License-Identifier: AGPL-3.0-or-later
"""The data check finds each planted fault and nothing in a clean set."""

import json
import shutil

import pytest
from PIL import Image

from dataset_files import coco, coco_document, data_yaml, image, voc, yolo
from fsdet.data import sources
from fsdet.data.check import check


@pytest.fixture
def root(tmp_path):
    for seed, split in enumerate(("train", "val", "test")):
        coco(tmp_path / split, seed=seed)
    data_yaml(tmp_path, train="train/boxes.json", val="val/boxes.json", test="test/boxes.json", base=["cat", "dog"])
    return tmp_path


@pytest.mark.parametrize("deep", [False, True])
def test_a_clean_set_is_ok(root, deep):
    report = check(sources.load(root), deep, k=1)
    assert report.ok and not report.warnings and str(report)


def test_table_counts_objects_and_images_without_crowds(root):
    rows = [line.split() for line in check(sources.load(root)).table.splitlines()]
    assert rows[1] == ["cat", "base"] + ["1", "/", "1"] * 3
    assert rows[2] == ["dog", "base"] + ["1", "/", "1"] * 3  # b.jpg's dog is a crowd
    assert rows[3] == ["all"] + ["2", "/", "2"] * 3


def test_only_a_deep_check_finds_a_truncated_image(root):
    image(root / "train/a.jpg", (40, 60))
    data = (root / "train/a.jpg").read_bytes()
    (root / "train/a.jpg").write_bytes(data[: len(data) // 2])
    loaded = sources.load(root)
    assert check(loaded, deep=False, k=1).ok
    (error,) = check(loaded, deep=True, k=1).errors
    assert "train/a.jpg" in error and "truncated" in error


def test_a_size_that_is_not_the_images_is_an_error(root):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (60, 40)).save(root / "train/a.jpg", exif=exif)
    Image.new("RGB", (33, 44)).save(root / "val/b.jpg")
    turned, other = check(sources.load(root), k=1).errors
    assert "train/a.jpg: annotated as 60 x 40, the image is 40 x 60" in turned and "EXIF" in turned
    assert "val/b.jpg: annotated as 50 x 50, the image is 33 x 44" in other


def test_header_damage_and_lost_files_are_errors(root):
    loaded = sources.load(root)
    (root / "train/a.jpg").write_bytes(b"")
    (root / "val/a.jpg").unlink()
    errors = check(loaded, k=1).errors
    assert len(errors) == 2 and "empty file" in errors[0] and "val/a.jpg" in errors[1]


def test_the_same_bytes_in_train_and_test_are_a_leak(root):
    shutil.copy(root / "train/b.jpg", root / "test/b.jpg")
    (error,) = check(sources.load(root), k=1).errors
    assert error == "leak: 1 images of test are also in train: train/b.jpg = test/b.jpg"


def test_the_same_file_in_two_splits_is_a_leak_but_support_may_be_train(root):
    data_yaml(root, train="train/boxes.json", support="train/boxes.json", val="train/boxes.json", base=["cat", "dog"])
    (error,) = check(sources.load(root), k=1).errors
    assert error.startswith("leak: 2 images of val are also in train")


def test_copies_inside_a_split_are_a_warning(tmp_path):
    voc(tmp_path)
    shutil.copy(tmp_path / "a.jpg", tmp_path / "c.jpg")
    shutil.copy(tmp_path / "a.xml", tmp_path / "c.xml")
    report = check(sources.load(tmp_path), k=1)
    assert report.ok and report.warnings == ["1 images are in train more than once: a.jpg = c.jpg"]


def test_thin_classes_are_named_with_their_counts(tmp_path):
    voc(tmp_path / "pool", seed=9)
    yolo(tmp_path / "train")
    data_yaml(tmp_path, train="train/images", support="pool", names=["cat", "dog"], base=["dog"], novel=["cat"])
    warnings = check(sources.load(tmp_path), k=2).warnings
    assert warnings == ["1 classes have fewer than 2 instances in support: cat 1"]
    warnings = check(sources.load(tmp_path), k=3).warnings
    assert warnings[0] == "1 classes have fewer than 3 instances in train: dog 2"


def test_faulty_labels_that_were_dropped_are_told_again(root):
    document = coco_document()
    document["annotations"][0]["bbox"] = [0, 0, 0, 0]
    (root / "val/boxes.json").write_text(json.dumps(document))
    report = check(sources.load(root), k=1)
    assert report.ok and report.warnings[0].startswith("1 faulty")
    assert "no width or height" in str(report) and "val/boxes.json: annotation 1" in str(report)
