# SPDX-License-Identifier: AGPL-3.0-or-later
"""A frame is the same picture in whatever order it is asked for, from whichever process, and memory stays bounded."""

import multiprocessing
from pathlib import Path

import cv2
import numpy as np
import pytest

from fsdet.data import frames
from fsdet.data.frames import FrameCache, frame_of, frame_path, read_frame, video_size
from fsdet.data.images import image_size, read_rgb
from fsdet.data.video import VideoFile
from fsdet.errors import DataError

COUNT, SHAPE = 150, (48, 64)


def numbered(n: int) -> np.ndarray:
    """uint8 [48, 64, 3]: white stripes 8 px wide are the bits of n."""
    bits = np.repeat([n >> k & 1 for k in range(8)], 8)
    return np.broadcast_to(40 + 160 * bits[None, :, None], (*SHAPE, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> dict[str, Path]:
    """Films whose frames tell their number in eight stripes, its bits, of two codecs."""
    folder = tmp_path_factory.mktemp("films")
    with VideoFile(folder / "a.mp4", 20.0) as out:
        for n in range(COUNT):
            out.write(numbered(n))
    writer = cv2.VideoWriter(str(folder / "b.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 30, SHAPE[::-1])
    for n in range(COUNT):
        writer.write(numbered(n))
    writer.release()
    return {"mpeg4": folder / "a.mp4", "mjpeg": folder / "b.avi"}


def told(frame: np.ndarray) -> int:
    """The number that `numbered` wrote."""
    return sum(int(frame[:, 8 * k + 2 : 8 * k + 6].mean() > 120) << k for k in range(8))


def told_by_child(video: Path) -> int:
    return told(read_frame(video, 33))


@pytest.mark.parametrize("codec", ["mpeg4", "mjpeg"])
def test_a_frame_is_the_same_in_any_order(films, codec):
    order = [0, 149, 3, 4, 5, 120, 60, 59, 61, 148, 0, 100]
    cache = FrameCache(budget=3 * SHAPE[0] * SHAPE[1] * 3)
    for n in order:
        assert told(cache.read(films[codec], n)) == n, n


def test_frames_in_order_are_decoded_once_and_what_is_kept_is_bounded(films):
    budget = 10 * SHAPE[0] * SHAPE[1] * 3 + 5
    cache = FrameCache(budget)
    for n in range(0, COUNT, 3):
        cache.read(films["mpeg4"], n)
        assert cache.held <= budget
    assert cache.decoded == COUNT - 2 and cache.held > budget * 0.8
    cache.read(films["mpeg4"], 146)  # was passed on the way
    assert cache.decoded == COUNT - 2


def test_what_is_changed_by_its_reader_is_not_changed_for_the_next(films):
    cache = FrameCache()
    cache.read(films["mpeg4"], 7)[:] = 0
    assert told(cache.read(films["mpeg4"], 7)) == 7


def test_a_film_without_usable_time_stamps_is_walked_through(films, monkeypatch):
    monkeypatch.setattr("fsdet.data.video.Video.seek", lambda self, number: False)
    cache = FrameCache()
    assert [told(cache.read(films["mpeg4"], n)) for n in (120, 60, 61)] == [120, 60, 61]


def test_a_frame_passes_for_a_picture(films):
    path = frame_path(films["mpeg4"], 21)
    assert frame_of(path) == (films["mpeg4"], 21) and path.name == "000021.png"
    assert told(read_rgb(path)) == 21 and image_size(path) == SHAPE
    assert video_size(films["mpeg4"]) == (COUNT, *SHAPE)
    for other in ("a.png", "000001.png", films["mpeg4"].with_name("none.mp4") / "000001.png"):
        assert frame_of(other) is None


def test_a_folder_of_pictures_that_is_called_like_a_film_is_one(tmp_path):
    (tmp_path / "x.mp4").mkdir()
    cv2.imwrite(str(tmp_path / "x.mp4" / "000001.png"), np.full((8, 8, 3), 9, np.uint8))
    assert read_rgb(tmp_path / "x.mp4" / "000001.png").max() == 9


def test_a_frame_that_is_not_there_is_told(films, tmp_path):
    with pytest.raises(DataError, match="none of number 500"):
        read_rgb(frame_path(films["mpeg4"], 500))
    assert told(read_rgb(frame_path(films["mpeg4"], 149))) == 149, "and the others stay"
    with pytest.raises(DataError, match="nothing"):
        video_size(tmp_path / "none.mp4")


def test_forked_workers_open_films_for_themselves(films):
    """They would share the place in the file, and get each other's frames."""
    read_frame(films["mpeg4"], 30)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(told_by_child, [films["mpeg4"]] * 2) == [33, 33]
    before = frames._cache
    assert before._readers and told(read_frame(films["mpeg4"], 31)) == 31
