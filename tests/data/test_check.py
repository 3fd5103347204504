# SPDX-License-Identifier: AGPL-3.0-or-later
"""The data check finds each planted fault and nothing in a clean set."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from dataset_files import coco, coco_document, data_yaml, image, no_utf_8, voc, yolo
from fsdet.cli.main import main
from fsdet.data import check as module
from fsdet.data import sources
from fsdet.data.check import check
from fsdet.data.images import read_rgb
from fsdet.data.report import KINDS


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
    assert error == "leak: 1 image of test is also in train: train/b.jpg = test/b.jpg"


def test_the_same_file_in_two_splits_is_a_leak_but_support_may_be_train(root):
    data_yaml(root, train="train/boxes.json", support="train/boxes.json", val="train/boxes.json", base=["cat", "dog"])
    (error,) = check(sources.load(root), k=1).errors
    assert error.startswith("leak: 2 images of val are also in train")


def test_copies_inside_a_split_are_a_warning(tmp_path):
    voc(tmp_path)
    shutil.copy(tmp_path / "a.jpg", tmp_path / "c.jpg")
    shutil.copy(tmp_path / "a.xml", tmp_path / "c.xml")
    report = check(sources.load(tmp_path), k=1)
    assert report.ok and report.warnings == ["1 image is in train more than once: a.jpg = c.jpg"]


def test_thin_classes_are_named_with_their_counts(tmp_path):
    voc(tmp_path / "pool", seed=9)
    yolo(tmp_path / "train")
    data_yaml(tmp_path, train="train/images", support="pool", names=["cat", "dog"], base=["dog"], novel=["cat"])
    warnings = check(sources.load(tmp_path), k=2).warnings
    assert warnings == ["1 class has fewer than 2 instances in support: cat 1"]
    warnings = check(sources.load(tmp_path), k=3).warnings
    assert warnings[0] == "1 class has fewer than 3 instances in train: dog 2"


def test_faulty_labels_that_were_dropped_are_told_again(root):
    document = coco_document()
    document["annotations"][0]["bbox"] = [0, 0, 0, 0]
    (root / "val/boxes.json").write_text(json.dumps(document))
    report = check(sources.load(root), k=1)
    assert report.ok and report.warnings == ["1 fault of labels or files: 1 dropped; see 'as loaded'"]
    assert "no width or height" in str(report) and "val/boxes.json: annotation 1" in str(report)


def saved_again(source, target, **how):
    with Image.open(source) as picture:
        picture.resize(how.pop("size", picture.size)).save(target, **how)


def photo(path, seed, quality=95):
    """Something smooth, as photographs are; noise changes when it is saved again."""
    cells = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    Image.fromarray(cells).resize((60, 40), Image.Resampling.BICUBIC).save(path, quality=quality)


def test_the_same_pixels_in_files_of_other_bytes_are_a_leak_that_a_deep_check_finds(root):
    saved_again(root / "train/b.jpg", root / "test/b.png")
    document = coco_document()
    document["images"][1]["file_name"] = "b.png"
    (root / "test/boxes.json").write_text(json.dumps(document))
    loaded = sources.load(root)
    assert check(loaded, deep=False, k=1).ok
    (error,) = check(loaded, deep=True, k=1).errors
    assert error == "leak: 1 image of test is also in train: train/b.jpg = test/b.png"


@pytest.mark.parametrize("how", [{"quality": 30}, {"quality": 80, "size": (33, 22)}])
def test_a_picture_that_was_saved_again_is_told_and_another_is_not(root, how):
    for seed, split in enumerate(("train", "val", "test")):
        photo(root / split / "a.jpg", seed)
    assert check(sources.load(root), deep=True, k=1).warnings == []
    saved_again(root / "train/a.jpg", root / "val/a.jpg", **how)
    report = check(sources.load(root), deep=True, k=1)
    (warning,) = report.warnings
    assert warning == "1 image of val looks like images of train, saved again: train/a.jpg ~ val/a.jpg"


def folders_of_photos(root, **splits):
    """{split: {file: (seed of the picture, quality)}} as COCO sources, one cat in each picture."""
    for split, files in splits.items():
        (root / split).mkdir()
        document = {**coco_document(), "images": [], "annotations": []}
        for number, (name, (seed, quality)) in enumerate(files.items()):
            photo(root / split / name, seed, quality)
            document["images"].append({"id": number, "file_name": name, "height": 40, "width": 60})
            row = {"id": number, "image_id": number, "category_id": 7, "bbox": [5, 5, 20, 20]}
            document["annotations"].append(row)
        (root / split / "boxes.json").write_text(json.dumps(document))
    data_yaml(root, **{split: f"{split}/boxes.json" for split in splits}, base=["cat"])
    return sources.load(root)


def test_an_image_that_looks_like_two_others_is_counted_once(tmp_path):
    """Three photographs in train, one of them in two qualities more; val has two of them again, and one of its own."""
    train = {"0.jpg": (0, 95), "0b.jpg": (0, 90), "0c.jpg": (0, 85), "1.jpg": (1, 95), "2.jpg": (2, 95)}
    val = {"v0.jpg": (0, 30), "v1.jpg": (1, 30), "v9.jpg": (9, 95)}
    (warning,) = check(folders_of_photos(tmp_path, train=train, val=val), deep=True, k=1).warnings
    assert warning.startswith("2 images of val look like images of train, saved again: ")
    pairs = ["0.jpg ~ val/v0.jpg", "0b.jpg ~ val/v0.jpg", "0c.jpg ~ val/v0.jpg", "1.jpg ~ val/v1.jpg"]
    assert warning.partition("again: ")[2].split(", ") == [f"train/{pair}" for pair in pairs]


def test_every_copy_of_a_leaked_image_is_counted(root):
    """Two files of val and one of test hold a picture of train."""
    shutil.copy(root / "train/a.jpg", root / "val/a.jpg")
    shutil.copy(root / "train/a.jpg", root / "val/c.jpg")
    shutil.copy(root / "train/a.jpg", root / "test/a.jpg")
    document = coco_document()
    document["images"].append({"id": 102, "file_name": "c.jpg", "height": 40, "width": 60})
    (root / "val/boxes.json").write_text(json.dumps(document))
    report = check(sources.load(root), k=1)
    assert report.errors == [
        "leak: 2 images of val are also in train: train/a.jpg = val/a.jpg, train/a.jpg = val/c.jpg",
        "leak: 1 image of test is also in train: train/a.jpg = test/a.jpg",
        "leak: 1 image of test is also in val: val/a.jpg = test/a.jpg",
    ]


def test_the_split_is_named_that_has_the_image(tmp_path):
    """Of support and train, which may share images, the one that a leak, a copy or a likeness is really in."""
    splits = {
        "train": {"0.jpg": (0, 95), "1.jpg": (1, 95)},
        "support": {"s2.jpg": (2, 95), "s3.jpg": (3, 95), "s4.jpg": (4, 95), "s4b.jpg": (4, 95), "s1.jpg": (1, 95)},
        "val": {"v3.jpg": (3, 30)},
        "test": {"t2.jpg": (2, 95), "t1.jpg": (1, 95)},
    }
    report = check(folders_of_photos(tmp_path, **splits), deep=True, k=1)
    assert report.errors == [
        "leak: 1 image of test is also in support: support/s2.jpg = test/t2.jpg",
        "leak: 1 image of test is also in train and support: support/s1.jpg = test/t1.jpg",
    ]
    assert sorted(report.warnings) == [
        "1 image is in support more than once: support/s4.jpg = support/s4b.jpg",
        "1 image is in train and support more than once: support/s1.jpg = train/1.jpg",
        "1 image of val looks like images of support, saved again: support/s3.jpg ~ val/v3.jpg",
    ]


def test_an_image_that_two_sources_share_is_one_in_the_table(tmp_path):
    coco(tmp_path / "train")
    shutil.copy(tmp_path / "train/boxes.json", tmp_path / "train/again.json")
    data_yaml(tmp_path, train=["train/boxes.json", "train/again.json"], base=["cat", "dog"])
    cat, _, total = (line.split() for line in check(sources.load(tmp_path), k=1).table.splitlines()[1:])
    assert cat[-1] == "1" and total[-1] == "2"


def test_every_fault_has_its_place_and_the_policy_decides_what_it_is(tmp_path):
    yolo(tmp_path / "train")
    data_yaml(tmp_path, train="train/images", names=["cat", "dog"])
    lines = ["0 0.5 0.5 0.2 0.2", *["0 nan 0.5 0.1 0.1"] * 40, "5 0.5 0.5 0.1 0.1"]
    (tmp_path / "train/labels/a.txt").write_text("\n".join(lines))
    (tmp_path / "train/images/b.jpg").write_bytes(b"")
    loaded = sources.load(tmp_path)
    report = check(loaded, k=1)
    assert len(report.places) == 42 and report.ok
    assert "train/labels/a.txt:2: not finite (dropped)" in report.places
    assert "train/labels/a.txt:42: unknown class (dropped)" in report.places
    assert "train/images/b.jpg: unreadable image (dropped)" in report.places
    assert "and 12 more; --list FILE" in str(report)
    (error,) = check(loaded, k=1, policy="fail").errors
    assert error == "42 faults of labels or files: 42 dropped; see 'as loaded'"


@pytest.mark.parametrize("policy", ["drop", "fail"])
def test_dropped_clipped_and_mended_labels_are_counted_apart(tmp_path, policy):
    yolo(tmp_path / "train")
    data_yaml(tmp_path, train="train/images", names=["cat", "dog"])
    rows = [
        "0 0.5 0.5 0.2 0.2",
        "0.0 0.3 0.3 0.2 0.2",  # mended
        "1 0.95 0.5 0.3 0.2",  # clipped
        "1 0.95 0.5 0.3 0.2",  # the same again: dropped
        "1.0 0.05 0.5 0.3 0.3",  # mended and clipped
        "0 nan 0.5 0.1 0.1",  # dropped
        "1 0.2 0.2 0.1 0.1 0.3 0.3",  # a polygon, which is no fault
    ]
    (tmp_path / "train/labels/a.txt").write_text("\n".join(rows))
    loaded = sources.load(tmp_path)
    (record,) = (record for record in loaded.split("train") if record.path.name == "a.jpg")
    assert len(record.labels) == len(rows) - 2
    report = check(loaded, k=1, policy=policy)
    (told,) = report.errors if policy == "fail" else report.warnings
    assert told == "6 faults of labels or files: 2 dropped, 2 clipped, 2 mended; see 'as loaded'"
    assert len(report.places) == 6


def test_every_fault_is_dropped_clipped_or_mended():
    assert {done for done, fault in KINDS.values() if fault} == {"dropped", "clipped", "mended"}


def test_the_command_writes_the_list_and_ends_with_2_under_fail(tmp_path, capsys):
    yolo(tmp_path / "train")
    data_yaml(tmp_path, train="train/images", names=["cat", "dog"])
    (tmp_path / "train/labels/a.txt").write_text("0 0.5 0.5 0.2 0.2\n0 nan 0.5 0.1 0.1\n")
    command = ["data", "check", str(tmp_path), "--shots", "1", "--list", str(tmp_path / "faults.txt")]
    assert main(command) == 0 and main([*command, "--policy", "fail"]) == 2
    head, fault, *_ = (tmp_path / "faults.txt").read_text().splitlines()
    told = capsys.readouterr().out
    assert fault == "train/labels/a.txt:2: not finite (dropped)"
    assert "faults: 1" in told and "faults.txt: 1 place\n" in told
    (tmp_path / "notes.txt").write_text("mine")
    assert main([*command[:-1], str(tmp_path / "notes.txt")]) == 2 and (tmp_path / "notes.txt").read_text() == "mine"
    assert head.startswith("#")
    assert main([*command[:-1], str(tmp_path / "gone/faults.txt")]) == 2 and not (tmp_path / "gone").exists()
    assert "gone: expected a folder for the list" in capsys.readouterr().err


def test_a_fault_in_a_file_whose_name_is_no_utf_8_is_listed(tmp_path, capsys):
    data = no_utf_8(tmp_path)
    (tmp_path / "train/labels" / os.fsdecode(b"\xff.txt")).write_text("0 nan 0.5 0.1 0.1\n0 0.5 0.5 0.2 0.2\n")
    assert main(["data", "check", str(data), "--deep", "--shots", "1", "--list", str(tmp_path / "faults.txt")]) == 0
    place = r"train/labels/\udcff.txt:1"
    assert (tmp_path / "faults.txt").read_text(encoding="utf-8").splitlines()[1] == f"{place}: not finite (dropped)"
    assert f"not finite  ({place})" in capsys.readouterr().out


def test_headers_alone_are_read_unless_it_is_deep(root, monkeypatch):
    decoded = []
    monkeypatch.setattr(module, "read_rgb", lambda path: decoded.append(path) or read_rgb(path))
    check(sources.load(root), k=1)
    assert decoded == []
    check(sources.load(root), deep=True, k=1)
    assert len(decoded) == 6
