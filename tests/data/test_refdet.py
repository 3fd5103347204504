# SPDX-License-Identifier: AGPL-3.0-or-later
"""RefDet folders become records like those of any format, and every fault of one is told at once."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from fsdet.data import datayaml
from fsdet.data.check import check
from fsdet.data.convert import convert
from fsdet.data.images import read_rgb
from fsdet.data.refdet import read_samples
from fsdet.data.sources import load
from fsdet.data.store import ImageStore
from fsdet.data.video import VideoFile
from fsdet.errors import DataError

FRAMES, SHAPE = 12, (60, 80)


def box(frame: int, x1: float = 10, y1: float = 20, x2: float = 40, y2: float = 50) -> dict:
    return {"frame": frame, "x1": x1, "y1": y1, "x2": x2, "y2": y2}


def sample(folder: Path, name: str) -> None:
    """A film whose frames tell their number by their brightness, and two photographs of another size."""
    place = folder / "samples" / name
    (place / "object_images").mkdir(parents=True)
    with VideoFile(place / "drone_video.mp4", 10.0) as out:
        for n in range(FRAMES):
            out.write(np.full((*SHAPE, 3), 20 * n, np.uint8))
    for n in range(2):
        cv2.imwrite(str(place / "object_images" / f"img_{n}.jpg"), np.full((30 + n, 50, 3), 99, np.uint8))


def annotate(folder: Path, **boxes: list) -> None:
    rows = [{"video_id": name, "annotations": [{"bboxes": found}]} for name, found in boxes.items()]
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / "annotations.json").write_text(json.dumps(rows))


@pytest.fixture
def refdet(tmp_path) -> Path:
    folder = tmp_path / "my" / "refdet"
    for name in ("Mug_0", "Bag_1", "Kite_2"):
        sample(folder, name)
    annotate(folder, Mug_0=[box(2), box(3, 12, 20, 42, 50), box(11, 70, 50, 90, 70)], Bag_1=[box(5)])
    return folder


def test_frames_train_and_photographs_support(refdet):
    data = load(refdet)
    assert data.names == ("Bag_1", "Kite_2", "Mug_0") and data.splits == ("train", "support")
    train = {(r.path.parents[0].parent.name, r.path.name): r for r in data.split("train")}
    assert set(train) == {("Mug_0", "000002.png"), ("Mug_0", "000003.png"), ("Mug_0", "000011.png"),
                          ("Bag_1", "000005.png")}  # fmt: skip
    for (name, file), record in train.items():
        assert record.size == SHAPE and [data.names[i] for i in record.labels] == [name] and record.exhaustive is None
        assert read_rgb(record.path).mean() == pytest.approx(20 * int(file[:6]), abs=4)
    assert train["Mug_0", "000003.png"].boxes.tolist() == [[12, 20, 42, 50]]
    assert train["Mug_0", "000011.png"].boxes.tolist() == [[70, 50, 80, 60]], "cut at the frame's edge"
    support = [(data.names[r.labels[0]], r.boxes.tolist(), r.size) for r in data.split("support")]
    assert support[0] == ("Bag_1", [[0, 0, 50, 30]], (30, 50)) and len(support) == 6
    assert data.report.counts == {"box partly outside the image": 1, "sample without annotations": 1}


def test_a_data_yaml_names_it_like_any_other_format(refdet):
    yaml = refdet.parents[1] / "data.yaml"
    datayaml.write(yaml, {"train": "my/refdet", "support": "my/refdet", "novel": ["Mug_0"], "exhaustive": "source"})
    data = load(yaml)
    assert data.base == ("Bag_1", "Kite_2") and len(data.split("train")) == 4
    assert {r.path.parent.parent.name: r.exhaustive for r in data.split("train")} == {
        "Mug_0": frozenset({2}), "Bag_1": frozenset({0})}, "nobody looked for the mug in the bag's video"  # fmt: skip


def test_frames_are_decoded_once_into_the_bounded_store(refdet, monkeypatch):
    from fsdet.data import frames

    cache = frames.FrameCache()
    monkeypatch.setattr(frames, "_cache", cache)
    store = ImageStore(load(refdet).split("train"), 40, cache_bytes=3 * 40 * 40 * 3)
    assert store.fill() == 3 and cache.decoded <= FRAMES + 6
    before = cache.decoded
    for index in range(3):
        sample = store.sample(index)
        assert sample.image.shape == (30, 40, 3) and len(sample.boxes) == 1
    assert cache.decoded == before


def test_every_fault_is_told_at_once(refdet):
    nan = float("nan")
    annotate(refdet, Mug_0=[box(2), box(2, 30), box(12), box(-1), box(4, 40, 20, 10, 50), box(5, nan), {"frame": 6},
                            box(2.5), box(7, 90, 70, 99, 99)], Ghost=[box(1)], Bag_1=[])  # fmt: skip
    (refdet / "samples" / "Lost").mkdir()
    (refdet / "samples" / "Bag_1" / "object_images" / "img_0.jpg").write_bytes(b"no picture")
    for file in (refdet / "samples" / "Kite_2" / "object_images").iterdir():
        file.unlink()
    with pytest.raises(DataError) as told:
        read_samples(refdet)
    lines = sorted(line.strip() for line in str(told.value).splitlines()[1:])
    where, place = "annotations/annotations.json", "samples/Mug_0/drone_video.mp4"
    assert lines == sorted([
        f"{where}: Ghost: annotation of an unknown video",
        f"{where}: Mug_0: frame 12: frame outside the video ({place} has 12 frames)",
        f"{where}: Mug_0: frame -1: frame outside the video ({place} has 12 frames)",
        f"{where}: Mug_0: frame 4: no width or height",
        f"{where}: Mug_0: frame 5: not finite",
        f"{where}: Mug_0: frame 7: box outside the image",
        f"{where}: Mug_0: annotation 0, box 6: not a number",
        f"{where}: Mug_0: annotation 0, box 7: not a number (frame)",
        f"{place}/000002.png: second box in a frame",
        "samples/Bag_1/object_images/img_0.jpg: unreadable image",
        "samples/Kite_2/object_images: missing image (no photograph of the object)",
        "samples/Lost/object_images: missing image (no photograph of the object)",
        "samples/Lost/drone_video.mp4: missing video",
    ])  # fmt: skip


def test_a_training_drops_and_counts_what_an_evaluation_refuses(refdet):
    annotate(refdet, Mug_0=[box(2), box(99)], Bag_1=[box(5)])
    (refdet / "samples" / "Bag_1" / "drone_video.mp4").write_bytes(b"no film")
    data = load(refdet)
    assert len(data.split("train")) == 1
    assert data.report.counts == {"frame outside the video": 1, "unreadable video": 1, "sample without annotations": 1}
    with pytest.raises(DataError, match="2 faults"):
        load(refdet, policy="fail")


def test_samples_for_an_evaluation(refdet):
    annotate(refdet, Mug_0=[box(2), box(3, 12, 20, 42, 50)], Bag_1=[])
    bag, kite, mug = read_samples(refdet)
    assert [s.name for s in (bag, kite, mug)] == ["Bag_1", "Kite_2", "Mug_0"]
    assert mug.truth == {2: [10, 20, 40, 50], 3: [12, 20, 42, 50]} and mug.video.name == "drone_video.mp4"
    assert bag.truth == {} and kite.truth is None, "never in sight, and never annotated"
    assert [r.path.name for r in kite.photographs] == ["img_0.jpg", "img_1.jpg"]
    (refdet / "annotations" / "annotations.json").unlink()
    assert [s.truth for s in read_samples(refdet)] == [None] * 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "unreadable text"),
        ("{}", "got no list"),
        ('[{"video_id": 1}]', "entries of another form: 1, the first is number"),
        ("3", "list"),
    ],
)
def test_a_file_that_is_no_annotation_is_told(refdet, text, told):
    (refdet / "annotations" / "annotations.json").write_text(text)
    for reader in (load, read_samples):
        with pytest.raises(DataError, match=told):
            reader(refdet)


def test_no_sample_is_told(tmp_path):
    (tmp_path / "samples").mkdir()
    for folder, told in ((tmp_path, "at least one sample"), (tmp_path / "none", "a RefDet folder, got nothing there")):
        with pytest.raises(DataError, match=told):
            read_samples(folder)


def test_it_is_checked_and_converted_like_any_other(refdet, tmp_path):
    yaml = refdet.parents[1] / "data.yaml"
    datayaml.write(yaml, {"train": "my/refdet", "support": "my/refdet"})
    assert check(load(yaml), deep=True, k=1).ok
    data = load(refdet)
    convert(data, tmp_path / "out", "coco", link=True)
    back = load(tmp_path / "out" / "data.yaml")
    assert len(back.split("train")) == 4 and len(back.split("support")) == 6
    ours, theirs = ({r.boxes.tolist()[0][0]: read_rgb(r.path) for r in of.split("train")} for of in (data, back))
    assert all(np.array_equal(theirs[key], image) for key, image in ours.items())


def test_a_video_that_is_in_two_splits_is_a_leak(refdet):
    other = refdet.parent / "copy"
    sample(other, "Mug_0")
    annotate(other, Mug_0=[box(2)])
    film = "samples/Mug_0/drone_video.mp4"
    (other / film).write_bytes((refdet / film).read_bytes())
    yaml = refdet.parents[1] / "data.yaml"
    datayaml.write(yaml, {"train": "my/refdet", "val": "my/copy"})
    assert any("leak: 1 image of" in error for error in check(load(yaml)).errors)
