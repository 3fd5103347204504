# SPDX-License-Identifier: AGPL-3.0-or-later
"""YOLO labels: a good line is its box, a bad one is reported with file:line and costs nothing but itself."""

import pytest

from dataset_files import NAMES, OBJECTS, SIZES, data_yaml, image, images, rows_of, yolo
from fsdet.data import sources
from fsdet.errors import DataError

GOOD = "0 0.5 0.5 0.2 0.2"


def plain(rows):
    return [(name, box, False) for name, box, _ in rows]  # YOLO knows no crowd


@pytest.fixture
def folder(tmp_path):
    yolo(tmp_path / "train")
    data_yaml(tmp_path, train="train/images", names=list(NAMES))
    return tmp_path


def test_two_images_with_all_their_objects(folder):
    data = sources.load(folder)
    assert data.names == NAMES and data.root == folder and not len(data.report)
    for record, name in zip(data.split("train"), SIZES, strict=True):
        assert record.size == SIZES[name]
        assert rows_of(record, data.names) == plain(OBJECTS[name])


BROKEN = [
    ("0 nan 0.5 0.1 0.1", "not finite"),
    ("0 0.5 0.5 inf 0.1", "not finite"),
    ("nan 0.5 0.5 0.1 0.1", "not finite"),
    ("0 -0.1 0.5 0.1 0.1", "negative value"),
    ("0 0.5 0.5 -0.1 0.1", "negative value"),
    ("0 1.2 0.5 0.1 0.1", "value above 1"),
    ("0 320 240 64 48", "value above 1"),
    ("0 0.5 0.5 0 0.1", "no width or height"),
    ("2 0.5 0.5 0.1 0.1", "unknown class"),
    ("-1 0.5 0.5 0.1 0.1", "unknown class"),
    ("0.5 0.5 0.5 0.1 0.1", "class is no whole number"),
    ("0 0.5 0.5 0.1", "wrong number of columns"),
    ("0 0.5 0.5 0.1 0.1 0.9", "wrong number of columns"),
    ("cat 0.5 0.5 0.1 0.1", "not a number"),
    (GOOD, "duplicate box"),
]


@pytest.mark.parametrize(("line", "kind"), BROKEN)
def test_a_bad_line_is_dropped_and_reported_with_its_place(folder, line, kind):
    (folder / "train/labels/a.txt").write_text(f"{GOOD}\n\n{line}\n1 0.5 0.5 0.4 0.4\n")
    data = sources.load(folder)
    assert [label for label in data.split("train")[0].labels] == [0, 1]
    assert data.report.counts == {kind: 1} and data.report.faults == 1
    assert "train/labels/a.txt:3" in str(data.report)
    with pytest.raises(DataError, match=rf"got 1 fault\. Next: .*\n  train/labels/a\.txt:3: {kind}"):
        sources.load(folder, policy="fail")


def test_fail_lists_all_faults_capped_with_their_number(folder):
    (folder / "train/labels/a.txt").write_text("\n".join(["9 0.5 0.5 0.1 0.1"] * 500 + ["0 0.5 0.5 0.1"]))
    with pytest.raises(DataError, match="501 faults") as caught:
        sources.load(folder, policy="fail")
    lines = str(caught.value).splitlines()
    assert len(lines) < 40 and any("wrong number of columns" in line for line in lines)
    shown = sum(": " in line for line in lines[1:])
    assert lines[-1].strip() == f"and {501 - shown} more"


def test_a_box_over_the_border_is_clipped(folder):
    (folder / "train/labels/a.txt").write_text("0 0.0 0.5 0.5 0.5")
    data = sources.load(folder)
    assert rows_of(data.split("train")[0], NAMES) == [("cat", (0, 10, 15, 30), False)]  # of 40 x 60: x -15..15
    assert data.report.counts == {"box partly outside the image": 1}


def test_decimal_class_byte_order_mark_and_polygon_are_mended(folder):
    text = "\ufeff1.0 0.5 0.5 0.2 0.2\r\n0 0.1 0.25 0.5 0.25 0.5 0.75 0.1 0.75\r\n"
    (folder / "train/labels/a.txt").write_bytes(text.encode())
    data = sources.load(folder)
    assert rows_of(data.split("train")[0], NAMES) == [("dog", (24, 16, 36, 24), False), ("cat", (6, 10, 30, 30), False)]
    assert data.report.counts == {"byte order mark": 1, "class written as a decimal": 1, "polygon": 1}


def test_empty_and_missing_label_files_are_background_and_said_so(folder):
    (folder / "train/labels/a.txt").write_text("\n")
    (folder / "train/labels/b.txt").unlink()
    image(folder / "train/images/c.png", (8, 8))
    (folder / "train/labels/c.txt").write_text(GOOD)
    data = sources.load(folder, policy="fail")
    assert [len(record.labels) for record in data.split("train")] == [0, 0, 1]
    assert data.report.counts == {"empty label file": 1, "no label file": 1, "class without boxes": 1}


def test_broken_image_and_orphan_label_are_reported(folder):
    (folder / "train/images/a.jpg").write_bytes(b"")
    (folder / "train/labels/z.txt").write_text(GOOD)
    data = sources.load(folder)
    assert [record.path.name for record in data.split("train")] == ["b.jpg"]
    assert {"unreadable image", "label file without an image"} <= set(data.report.counts)


def test_labels_beside_the_images_and_classes_txt(tmp_path):
    images(tmp_path)
    (tmp_path / "a.txt").write_text(GOOD)
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    data = sources.load(tmp_path)
    assert data.names == ("cat", "dog")
    assert rows_of(data.split("train")[0], data.names) == [("cat", (24, 16, 36, 24), False)]


def test_numbered_names_and_a_list_of_images(tmp_path):
    yolo(tmp_path / "set")
    (tmp_path / "train.txt").write_text("./set/images/b.jpg\nset/images/none.jpg\n")
    data = sources.load(data_yaml(tmp_path, train="train.txt", names={0: "cat", 1: "dog"}))
    assert [record.path.name for record in data.split("train")] == ["b.jpg"]
    assert data.report.counts["missing image"] == 1 and "train.txt:2" in str(data.report)


def test_no_class_names_is_an_error(tmp_path):
    with pytest.raises(DataError, match="class names"):
        sources.load(yolo(tmp_path))


def test_nearest_data_yaml_names_each_source(tmp_path):
    for part, names in (("one", ["cat", "dog"]), ("two", ["apple", "pear"])):
        yolo(tmp_path / part)
        data_yaml(tmp_path / part, train="images", names=names)
    file = data_yaml(tmp_path, train=["one/images", "two/images"], base=["cat", "dog"], novel=["pear", "apple"])
    data = sources.load(file)
    assert [rows[0] for record in data.split("train") for rows in rows_of(record, data.names)] == [
        "cat", "dog", "dog", "apple", "pear", "pear"]  # fmt: skip
    assert [record.labels.tolist() for record in data.split("train")] == [[0, 1], [1], [3, 2], [2]]


@pytest.mark.parametrize("names", [{0: "disc", 2: "square"}, {1: "disc", 2: "square"}, {"a": "disc", "b": "square"}])
def test_numbers_without_a_name_in_the_nearest_data_yaml_are_an_error(tmp_path, names):
    """By their order alone the names behind a gap would be those of other numbers."""
    yolo(tmp_path / "one")
    data_yaml(tmp_path / "one", train="images", names=names)
    with pytest.raises(DataError, match=r"one/data.yaml: names: expected keys 0, 1, 2"):
        sources.load(data_yaml(tmp_path, train="one/images", base=["disc", "square"]))


def test_a_label_file_in_another_letter_case_is_mended(folder):
    (folder / "train/labels/a.txt").rename(folder / "train/labels/A.TXT")
    data = sources.load(folder)
    assert [rows_of(record, data.names) for record in data.split("train")] == [plain(rows) for rows in OBJECTS.values()]
    assert dict(data.report.counts) == {"letter case of a file name": 1} and "train/labels/A.TXT" in str(data.report)


def test_a_label_file_of_one_image_is_not_that_of_another_case(folder):
    image(folder / "train/images/A.jpg", (40, 60))
    (folder / "train/labels/B.TXT").write_text(GOOD)
    data = sources.load(folder)
    assert [(r.path.name, len(r.labels)) for r in data.split("train")] == [("A.jpg", 0), ("a.jpg", 2), ("b.jpg", 1)]
    assert set(data.report.counts) == {"no label file", "label file without an image"}


def test_a_mended_label_file_is_that_of_one_image(folder):
    (folder / "train/images/b.jpg").rename(folder / "train/images/A.jpg")
    (folder / "train/labels/a.txt").rename(folder / "train/labels/a.TXT")
    (folder / "train/labels/b.txt").unlink()
    data = sources.load(folder)
    assert sorted(len(r.labels) for r in data.split("train")) == [0, 2]
