# SPDX-License-Identifier: AGPL-3.0-or-later
"""A converted data set loads back to the same splits, names, boxes and flags."""

import numpy as np
import pytest

from dataset_files import coco, coco_document, data_yaml, image, no_utf_8, voc
from fsdet.cli.main import main
from fsdet.data import sources
from fsdet.data.convert import convert
from fsdet.errors import DataError

FORMATS = ("coco", "yolo", "voc")


@pytest.fixture
def data(tmp_path):
    """Two sources with equal file names, sub-pixel boxes, an image without objects, a crowd, a name with spaces."""
    document = coco_document()
    document["categories"][1]["name"] = "größter dog & co"
    document["annotations"][0]["bbox"] = [10.257, 5.123, 20.5, 19.877]
    document["images"].append({"id": 3, "file_name": "A.png", "width": 31, "height": 17})
    image(tmp_path / "in/one/A.png", (17, 31))
    coco(tmp_path / "in/one", document)
    voc(tmp_path / "in/two", seed=5)
    return sources.load(data_yaml(tmp_path / "in", train=["one/boxes.json", "two"], test="two",
                                  base=["größter dog & co", "dog"], novel=["cat"]))  # fmt: skip


def plain(record, fmt):
    keep = ~record.crowd if fmt == "yolo" else np.ones(len(record.labels), bool)
    order = np.lexsort((*record.boxes[keep].T.round(), record.labels[keep]))
    return [part[keep][order] for part in (record.boxes, record.labels, record.crowd)]


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("fmt", FORMATS)
def test_round_trip(data, tmp_path, fmt, link):
    report = convert(data, tmp_path / "out", fmt, link)
    back = sources.load(tmp_path / "out")
    assert (back.base, back.novel, back.splits) == (data.base, data.novel, data.splits)
    assert report.counts == ({"cannot be expressed": 3} if fmt == "yolo" else {})
    for split in data.splits:
        left = {record.path.read_bytes(): record for record in data.split(split)}
        right = {record.path.read_bytes(): record for record in back.split(split)}
        assert left.keys() == right.keys() and len(right) == len(data.split(split))
        for key, record in left.items():
            boxes, labels, crowd = plain(record, fmt)
            got_boxes, got_labels, got_crowd = plain(right[key], fmt)
            np.testing.assert_allclose(got_boxes, boxes, atol=2e-3)
            assert (got_labels == labels).all() and (got_crowd == crowd).all() and record.size == right[key].size


@pytest.mark.parametrize("fmt", FORMATS)
def test_file_names_that_are_no_utf_8_become_so(tmp_path, fmt):
    data = sources.load(no_utf_8(tmp_path / "in"))
    convert(data, tmp_path / "out", fmt)
    back = sources.load(tmp_path / "out")
    found = {record.path.name: len(record.labels) for record in back.split("train")}
    assert found == {r"\udcff.jpg": 2, "b.jpg": 1}


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_source_is_left_alone_and_equal_stems_do_not_collide(data, tmp_path, fmt):
    before = sorted((path.relative_to(tmp_path), path.read_bytes()) for path in (tmp_path / "in").rglob("*.*"))
    convert(data, tmp_path / "out", fmt, link=True)
    assert before == sorted((path.relative_to(tmp_path), path.read_bytes()) for path in (tmp_path / "in").rglob("*.*"))
    stems = [record.path.stem.casefold() for record in sources.load(tmp_path / "out").split("train")]
    assert len(stems) == len(set(stems)) == 5


def test_images_of_a_removed_source_stay_in_a_linked_copy(data, tmp_path):
    convert(data, tmp_path / "out", "coco", link=True)
    for path in (tmp_path / "in").rglob("*.jpg"):
        path.unlink()
    assert all(record.path.stat().st_size for record in sources.load(tmp_path / "out").split("train"))


def test_chain_through_all_formats_ends_where_it_began(data, tmp_path):
    first = data
    for number, fmt in enumerate(("coco", "voc", "coco", "voc")):
        convert(data, tmp_path / str(number), fmt)
        data = sources.load(tmp_path / str(number))
    total = [sum(r.boxes.sum(dtype=float) for r in d.split("train")) for d in (first, data)]
    assert total[0] == pytest.approx(total[1], abs=0.05)


def test_refusals(data, tmp_path):
    with pytest.raises(DataError, match="one of coco, yolo, voc"):
        convert(data, tmp_path / "out", "json")
    with pytest.raises(DataError, match="empty folder"):
        convert(data, tmp_path / "in", "coco")


OUTLINE = [[10.0, 5.0, 30.0, 5.0, 30.0, 25.0]]


def test_outlines_stay_outlines_in_coco_and_are_told_of_elsewhere(tmp_path):
    document = coco_document()
    document["annotations"][0]["segmentation"] = OUTLINE
    coco(tmp_path / "in", document)
    data = sources.load(data_yaml(tmp_path / "in", train="boxes.json"), shapes=True)
    assert data.report.counts == {"no outline that can be read": 2}
    assert not len(convert(data, tmp_path / "out", "coco"))
    back = sources.load(tmp_path / "out", shapes=True)
    assert [record.shapes for record in back.split("train")] == [(OUTLINE, None), (None,)]
    for fmt in ("yolo", "voc"):
        assert "1 outline, whose boxes are kept  (train)" in str(convert(data, tmp_path / fmt, fmt))


def test_images_that_label_some_classes_only_are_told_of(tmp_path):
    coco(tmp_path / "in/one", coco_document())
    data = sources.load(data_yaml(tmp_path / "in", train="one/boxes.json", base=["cat", "dog"], novel=["owl"],
                                  exhaustive="source"))  # fmt: skip
    told = str(convert(data, tmp_path / "out", "coco"))
    assert "that 2 images may show unlabelled objects of some classes: they count as labelled for all  (train)" in told


def test_a_json_of_boxes_alone_lacks_no_outline(tmp_path):
    coco(tmp_path / "in", coco_document())
    assert not len(sources.load(tmp_path / "in", shapes=True).report)


def test_the_command_keeps_outlines(tmp_path):
    document = coco_document()
    document["annotations"][0]["segmentation"] = OUTLINE
    coco(tmp_path / "in", document)
    assert main(["data", "convert", str(tmp_path / "in"), str(tmp_path / "out"), "--to", "coco"]) == 0
    assert sources.load(tmp_path / "out", shapes=True).split("train")[0].shapes[0] == OUTLINE
