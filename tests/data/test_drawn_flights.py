# SPDX-License-Identifier: AGPL-3.0-or-later
"""Drawn flights: the same every time, their boxes are where the object is, and they are read as RefDet."""

import json

import numpy as np
import pytest

from fsdet.cli.main import main
from fsdet.data import sources
from fsdet.data.drawn_flights import FRAMES, WINDOW, draw_flights, flight
from fsdet.data.refdet import read_samples
from fsdet.data.video import Video
from fsdet.errors import DataError


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return draw_flights(tmp_path_factory.mktemp("flights") / "set", sizes={"flights": 2}).parent


def test_a_flight_is_a_function_of_its_number():
    one, again, other = flight(0, 1), flight(0, 1), flight(0, 2)
    assert np.array_equal(one.landscape, again.landscape) and np.array_equal(one.corners, again.corners)
    assert all(np.array_equal(a, b) for a, b in zip(one.photographs, again.photographs, strict=True))
    assert one.name != other.name and not np.array_equal(one.landscape, other.landscape)


def test_a_box_holds_the_same_pixels_in_every_frame_that_shows_all_of_it():
    """The object does not move: whatever the camera does, its box cuts the same piece out of the landscape."""
    made = flight(0, 0)
    x0, y0, x1, y1 = made.target.astype(int)
    truth, whole = made.truth(), 0
    for number, frame in enumerate(made.frames()):
        assert frame.shape == (*WINDOW, 3)
        if number in truth and np.allclose(np.subtract(truth[number][2:], truth[number][:2]), [x1 - x0, y1 - y0]):
            a, b, c, d = np.round(truth[number]).astype(int)
            assert np.array_equal(frame[b:d, a:c], made.landscape[y0:y1, x0:x1])
            whole += 1
    assert whole and len(truth) < FRAMES, "it comes and goes"


def test_the_files_are_read_back(drawn):
    samples = read_samples(drawn)
    assert [s.name for s in samples] == ["flight_0", "flight_1"] and all(len(s.photographs) == 3 for s in samples)
    for index, sample in enumerate(samples):
        made = flight(0, index)
        assert sample.truth.keys() == made.truth().keys()
        for number, box in made.truth().items():
            assert sample.truth[number] == pytest.approx(box, abs=1e-3)
        with Video(sample.video) as video:
            frames = dict(video.frames())
        assert len(frames) == FRAMES
        off = [np.abs(frames[n].astype(int) - made_frame).mean() for n, made_frame in enumerate(made.frames())]
        assert max(off) < 12, "but for what the codec takes"
    data = sources.load(drawn)
    assert list(data.names) == ["flight_0", "flight_1"]
    assert len(data.split("train")) == sum(len(s.truth) for s in samples) and len(data.split("support")) == 6


def test_a_set_is_replaced_by_its_like_alone(drawn, tmp_path, capsys):
    assert draw_flights(drawn, sizes={"flights": 2}) == drawn / "data.yaml"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("mine")
    with pytest.raises(DataError, match="other things"):
        draw_flights(tmp_path / "mine", sizes={"flights": 1})
    assert main(["data", "demo", str(drawn)]) == 2 and "other things" in capsys.readouterr().err
    assert main(["data", "demo", str(tmp_path / "new"), "--video", "--task", "classifier"]) == 2
    assert "--video without --task" in capsys.readouterr().err
    assert json.loads((drawn / "demo.json").read_text())["sizes"] == {"flights": 2}
