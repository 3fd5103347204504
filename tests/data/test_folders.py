# SPDX-License-Identifier: AGPL-3.0-or-later
"""Folders of images, one a class, are a data set of whole images; a slip in them is told before a training."""

import hashlib

import pytest

from dataset_files import image
from fsdet.data.check import check
from fsdet.data.folders import load_folders
from fsdet.errors import DataError


def folders(root, splits=("train", "val"), classes=("forged", "genuine"), each=3):
    for k, split in enumerate(splits):
        for name in classes:
            for i in range(each):
                image(root / split / name / f"{name}{i}.png", (20, 30), seed=k)
    return root


def test_every_image_is_one_object_of_its_class(tmp_path):
    data = load_folders(folders(tmp_path))
    assert data.base == ("forged", "genuine") and data.novel == () and data.splits == ("train", "val")
    records = data.split("train")
    assert [r.labels.tolist() for r in records] == [[0]] * 3 + [[1]] * 3
    assert records[0].boxes.tolist() == [[0, 0, 30, 20]] and records[0].size == (20, 30)
    assert check(data, deep=True).ok


def test_without_val_a_fifth_of_train_is_held_out_by_the_names_of_the_files(tmp_path):
    for name in ("cat", "dog"):
        for i in range(40):
            image(tmp_path / name / f"{name}{i}.png", (8, 8))
    once, again = load_folders(tmp_path), load_folders(tmp_path)
    held = [r.path for r in once.split("val")]
    assert held == [r.path for r in again.split("val")] and 4 <= len(held) <= 32
    assert not set(held) & {r.path for r in once.split("train")}
    assert len(held) + len(once.split("train")) == 80


def test_a_data_yaml_may_name_the_folders(tmp_path):
    folders(tmp_path, splits=("a", "b"))
    (tmp_path / "data.yaml").write_text("train: a\nval: b\n")
    assert load_folders(tmp_path / "data.yaml").splits == load_folders(tmp_path).splits == ("train", "val")


def test_what_cannot_be_trained_on_is_told_with_its_place(tmp_path):
    one = folders(tmp_path / "one", classes=("only",))
    with pytest.raises(DataError, match=r"a folder for each of at least two classes, got 1 \(only\)"):
        load_folders(one)
    damaged = folders(tmp_path / "damaged", splits=("train", "val"))
    whole = (damaged / "train/forged/forged1.png").read_bytes()
    (damaged / "train/forged/forged0.png").write_bytes(b"<html>")
    (damaged / "train/forged/forged1.png").write_bytes(whole[:-40])
    data = load_folders(damaged)
    assert data.report.counts == {"unreadable image": 1} and len(data.split("train")) == 5
    assert check(data, deep=False).ok and "forged1.png" in check(data, deep=True).errors[0]
    leaking = folders(tmp_path / "leaking")
    image(leaking / "val/genuine/genuine0.png", (20, 30), seed=0)
    assert "leak: 1 image of val is also in train" in check(load_folders(leaking)).errors[0]


def test_what_is_held_out_leaves_every_class_something_to_learn_from(tmp_path):
    """The only picture of a class stays in train, though the hash of its name would take it."""
    taken = next(f"{i}.png" for i in range(99) if int(hashlib.sha256(f"{i}.png".encode()).hexdigest(), 16) % 5 == 0)
    for i in range(12):
        image(tmp_path / "cat" / f"cat{i}.png", (8, 8))
    image(tmp_path / "dog" / taken, (8, 8))
    data = load_folders(tmp_path)
    assert {int(r.labels[0]) for r in data.split("train")} == {0, 1} and data.has("val")
