# SPDX-License-Identifier: AGPL-3.0-or-later
"""A COCO json gives exactly its objects; every broken entry is reported under its id and nothing else is lost."""

import json
import math

import pytest

from dataset_files import NAMES, OBJECTS, SIZES, coco, coco_document, data_yaml, images, rows_of
from fsdet.data import images as image_files
from fsdet.data import sources
from fsdet.errors import DataError


def test_two_images_with_all_their_objects(tmp_path):
    data = sources.load(coco(tmp_path))
    assert data.names == NAMES and data.num_base == 2 and not len(data.report)
    for record, name in zip(data.split("train"), SIZES, strict=True):
        assert record.path.name == name and record.size == SIZES[name] and record.exhaustive is None
        assert rows_of(record, data.names) == OBJECTS[name]


def test_annotations_in_any_order_stay_with_their_image(tmp_path):
    document = coco_document()
    document["annotations"].reverse()
    data = sources.load(coco(tmp_path, document))
    for record, name in zip(data.split("train"), SIZES, strict=True):
        assert rows_of(record, data.names) == OBJECTS[name][::-1]


def test_no_image_is_opened_when_the_json_gives_sizes(tmp_path, monkeypatch):
    file = coco(tmp_path)
    monkeypatch.setattr(image_files.Image, "open", lambda *a, **k: pytest.fail("opened an image"))
    assert len(sources.load(file).split("train")) == 2


BROKEN = [
    ({"bbox": [math.nan, 1, 5, 5]}, "not finite"),
    ({"bbox": [1, math.inf, 5, 5]}, "not finite"),
    ({"bbox": [1, 1, 0, 5]}, "no width or height"),
    ({"bbox": [1, 1, 5, -5]}, "no width or height"),
    ({"bbox": [100, 100, 5, 5]}, "box outside the image"),
    ({"bbox": [1, 1, 5]}, "malformed annotation"),
    ({"bbox": None}, "malformed annotation"),
    ({"bbox": ["a", 1, 2, 3]}, "malformed annotation"),
    ({"image_id": 5}, "annotation of an unknown image"),
    ({"image_id": [1]}, "malformed annotation"),
    ({"category_id": 3}, "unknown class"),
    ({"bbox": [10, 5, 20, 20]}, "duplicate box"),  # the cat of a.jpg again
]


@pytest.mark.parametrize(("change", "kind"), BROKEN)
def test_a_broken_annotation_is_dropped_and_reported_by_id(tmp_path, change, kind):
    document = coco_document()
    document["annotations"].append(
        {"id": 55, "image_id": 100, "category_id": 7, "bbox": [1, 2, 3, 4], "iscrowd": 0} | change
    )
    file = coco(tmp_path, document)
    data = sources.load(file)
    assert data.report.counts == {kind: 1}
    assert "boxes.json: annotation 55" in str(data.report)
    assert rows_of(data.split("train")[0], data.names) == OBJECTS["a.jpg"]
    with pytest.raises(DataError, match=f"annotation 55: {kind}"):
        sources.load(file, policy="fail")


def test_a_box_over_the_border_is_clipped_and_reported(tmp_path):
    document = coco_document()
    document["annotations"][0]["bbox"] = [-10, -10, 30, 30]
    data = sources.load(coco(tmp_path, document))
    assert rows_of(data.split("train")[0], data.names)[0] == ("cat", (0, 0, 20, 20), False)
    assert data.report.counts == {"box partly outside the image": 1}


def test_rounding_beyond_the_border_is_clipped_in_silence(tmp_path):
    document = coco_document()
    document["annotations"][1]["bbox"] = [-0.4, 0, 60.9, 40.3]
    data = sources.load(coco(tmp_path, document))
    assert rows_of(data.split("train")[0], data.names) == OBJECTS["a.jpg"] and not len(data.report)


def test_sizes_come_from_the_header_where_the_json_has_none(tmp_path):
    document = coco_document()
    del document["images"][0]["width"]
    document["images"][1] |= {"width": 0, "height": 0}
    data = sources.load(coco(tmp_path, document))
    assert [record.size for record in data.split("train")] == list(SIZES.values())
    assert data.report.counts == {"size missing or wrong in the annotation": 2}


def test_missing_image_is_reported_and_all_missing_refused(tmp_path):
    file = coco(tmp_path)
    (tmp_path / "b.jpg").unlink()
    data = sources.load(file)
    assert [record.path.name for record in data.split("train")] == ["a.jpg"]
    assert data.report.counts == {"missing image": 1}
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(DataError, match="none of them"):
        sources.load(file)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("A.JPG", "letter case of a file name"), ("D:\\work\\a.jpg", "foreign folder in a file name"),
     ("/home/somebody/a.jpg", "foreign folder in a file name"), ("../a.jpg", "foreign folder in a file name")],
)  # fmt: skip
def test_file_names_from_another_machine_find_the_image_beside_the_json(tmp_path, name, kind):
    document = coco_document()
    document["images"][0]["file_name"] = name
    data = sources.load(coco(tmp_path, document))
    assert [record.path for record in data.split("train")] == [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    assert data.report.counts == {kind: 1}


def test_file_name_and_link_outside_the_root_are_never_read(tmp_path):
    images(tmp_path / "outside")
    inside = tmp_path / "inside"
    document = coco_document()
    document["images"][0]["file_name"] = "../outside/a.jpg"
    file = coco(inside, document)
    (inside / "a.jpg").unlink()
    (inside / "b.jpg").unlink()
    (inside / "b.jpg").symlink_to(tmp_path / "outside" / "b.jpg")
    with pytest.raises(DataError, match="none of them"):
        sources.load(file)


def test_published_layout_with_annotations_beside_image_folders(tmp_path):
    images(tmp_path / "val2017")
    images(tmp_path / "train2017")
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(coco_document()))
    data = sources.load(tmp_path)
    assert {r.path.parent.name for r in data.split("train")} == {"train2017"}
    assert {r.path.parent.name for r in data.split("val")} == {"val2017"}
    single = sources.load(tmp_path / "annotations" / "instances_val2017.json")
    assert {r.path.parent.name for r in single.split("train")} == {"val2017"}


def test_images_key_says_where_file_names_start(tmp_path):
    images(tmp_path / "pictures")
    (tmp_path / "a.json").write_text(json.dumps(coco_document()))
    file = data_yaml(tmp_path, train={"path": "a.json", "images": "pictures"}, base=["cat", "dog"])
    assert len(sources.load(file).split("train")) == 2


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"images": []}', "[" * 100_000, '{"images": 1, "annotations": [], "categories": []}']
)
def test_what_is_no_coco_json_is_refused_by_name(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json"):
        sources.load(tmp_path / "x.json")


def test_byte_order_mark_and_repeated_image_id(tmp_path):
    document = coco_document()
    document["images"].append(document["images"][0] | {"file_name": "b.jpg"})
    file = coco(tmp_path, document)
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    data = sources.load(file)
    assert len(data.split("train")) == 2 and data.report.counts == {"duplicate image id": 1}
