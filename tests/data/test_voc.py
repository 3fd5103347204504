# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pascal VOC folders as published: 1-based boxes, sizes of 0 x 0, drives of strangers, lists, and hostile xml."""

import os

import pytest

from dataset_files import NAMES, OBJECTS, SIZES, data_yaml, image, images, rows_of, voc, voc_xml
from fsdet.data import sources
from fsdet.errors import DataError


def test_two_images_with_all_their_objects(tmp_path):
    data = sources.load(voc(tmp_path))
    assert data.names == NAMES and not len(data.report)
    for record, name in zip(data.split("train"), SIZES, strict=True):
        assert record.size == SIZES[name]
        assert rows_of(record, data.names) == OBJECTS[name]


def test_size_0x0_is_read_from_the_image(tmp_path):
    (voc(tmp_path) / "a.xml").write_text(voc_xml("a.jpg", (0, 0)))
    data = sources.load(tmp_path)
    assert data.split("train")[0].size == (40, 60)
    assert data.report.counts == {"size missing or wrong in the annotation": 1}
    assert rows_of(data.split("train")[0], NAMES) == OBJECTS["a.jpg"]


def test_the_image_is_the_one_with_the_stem_of_the_xml(tmp_path):
    voc(tmp_path)
    os.rename(tmp_path / "a.jpg", tmp_path / "a.JPG")
    (tmp_path / "b.xml").write_text(voc_xml("b.jpg").replace("b.jpg</filename>", "other.jpg</filename>"))
    data = sources.load(tmp_path)
    assert [record.path.name for record in data.split("train")] == ["a.JPG", "b.jpg"]
    assert data.report.counts == {"stale file name": 1}


@pytest.fixture
def published(tmp_path):
    """VOC2007 as distributed, with a list for train and one for trainval."""
    root = tmp_path / "VOC2007"
    images(root / "JPEGImages")
    image(root / "JPEGImages/c.jpg", (9, 9))
    (root / "Annotations").mkdir()
    (root / "ImageSets/Main").mkdir(parents=True)
    for name in OBJECTS:
        (root / "Annotations" / name.replace("jpg", "xml")).write_text(voc_xml(name))
    (root / "ImageSets/Main/train.txt").write_text("a\n")
    (root / "ImageSets/Main/trainval.txt").write_text("b\na\n")
    (root / "ImageSets/Main/dog_val.txt").write_text("a -1\nb  1\n")
    return tmp_path


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("VOC2007", ["a.jpg"]),
        ("VOC2007/ImageSets/Main/trainval.txt", ["b.jpg", "a.jpg"]),
        ("VOC2007/ImageSets/Main/dog_val.txt", ["b.jpg"]),
        ("VOC2007/JPEGImages", ["a.jpg"]),
    ],
)
def test_published_layout_and_its_lists(published, source, names):
    data = sources.load(data_yaml(published, train=source, base=["dog"], novel=["cat"]))
    assert [record.path.name for record in data.split("train")] == names
    assert data.names == ("dog", "cat")


def test_without_lists_all_xml_count_and_images_without_are_reported(published):
    data = sources.load(data_yaml(published, val="VOC2007", base=["dog", "cat"]))
    assert len(data.split("val")) == 2
    assert data.report.counts == {"image without an xml file": 1}


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;&a;">]><annotation><filename>&b;</filename></annotation>'
OUTSIDE = '<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><annotation><filename>&e;</filename></annotation>'


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("text", [BOMB, OUTSIDE, "<annotation>", "not xml"])
def test_hostile_or_broken_xml_is_dropped_unexpanded(tmp_path, text, encoding):
    (voc(tmp_path) / "a.xml").write_bytes(text.encode(encoding))
    data = sources.load(tmp_path)
    assert [record.path.name for record in data.split("train")] == ["b.jpg"]
    assert data.report.counts["unreadable annotation file"] == 1
    assert ("DOCTYPE" in str(data.report)) == text.startswith("<!")
    with pytest.raises(DataError, match=r"a\.xml"):
        sources.load(tmp_path, policy="fail")


@pytest.mark.parametrize(
    ("old", "new", "kind"),
    [
        ("<xmin>11</xmin>", "<xmin>nan</xmin>", "not finite"),
        ("<xmin>11</xmin>", "<xmin></xmin>", "not a number"),
        ("<xmin>11</xmin>", "<xmin>left</xmin>", "not a number"),
        ("<xmin>11</xmin>", "<xmin>31</xmin>", "no width or height"),
        ("<name>cat</name>", "", "malformed annotation"),
    ],
)
def test_a_broken_object_costs_only_itself(tmp_path, old, new, kind):
    (voc(tmp_path) / "a.xml").write_text(voc_xml("a.jpg").replace(old, new))
    data = sources.load(data_yaml(tmp_path, train=".", base=["dog"], novel=[]))
    record = data.split("train")[0]
    assert rows_of(record, data.names) == [OBJECTS["a.jpg"][1]]
    assert data.report.counts == {kind: 1} and "a.xml: object 1" in str(data.report)


def test_xml_without_its_image_is_reported(tmp_path):
    (voc(tmp_path) / "a.jpg").unlink()
    data = sources.load(tmp_path)
    assert len(data.split("train")) == 1 and data.report.counts == {"missing image": 1}
