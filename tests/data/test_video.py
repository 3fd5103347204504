# SPDX-License-Identifier: AGPL-3.0-or-later
"""Frames come out as they went in, numbered rightly past damage; what cannot be read is one sentence."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from fsdet.data.video import Video, VideoFile
from fsdet.errors import DataError, UserError


def grey(number: int) -> np.ndarray:
    """A noisy frame whose left half tells its number by its brightness, and right half is red."""
    frame = np.random.default_rng(number).integers(0, 60, (96, 128, 3), np.uint8)
    frame[:, :48] = 4 * number
    frame[:, 100:] = (200, 20, 20)
    return frame


@pytest.fixture
def film(tmp_path) -> Path:
    with VideoFile(tmp_path / "film.mp4", 20.0) as out:
        for number in range(40):
            out.write(grey(number))
    return tmp_path / "film.mp4"


def numbers(video: Video) -> list[tuple[int, float]]:
    return [(number, float(frame[:, 4:44].mean()) / 4) for number, frame in video.frames()]


def test_frames_come_out_as_they_went_in(film):
    assert [p.name for p in film.parent.iterdir()] == ["film.mp4"]
    with Video(film) as video:
        assert (video.rate, video.announced) == (20.0, 40)
        found = numbers(video)
        assert [n for n, _ in found] == list(range(40)) and all(abs(n - seen) < 1 for n, seen in found)
        assert not video.told()
    with Video(film) as video:
        [(_, frame), *_] = video.frames()
        assert frame[:, 104:, 0].mean() > 150 and frame[:, 104:, 2].mean() < 60, "RGB, not BGR"


def test_frames_past_a_damaged_stretch_keep_their_numbers(film):
    content = bytearray(film.read_bytes())
    start = len(content) // 3
    content[start : start + len(content) // 8] = bytes(len(content) // 8)
    film.write_bytes(content)
    with Video(film) as video:
        found = numbers(video)
        after = [(n, seen) for n, seen in found if n > 36]
        assert 20 < len(found) < 40 and len(after) == 3 and all(abs(n - seen) < 2 for n, seen in after)
        assert video.told().startswith(f"{film}: {40 - len(found)} of 40 frames could not be read")


def test_a_film_that_is_cut_off_gives_what_there_is(tmp_path):
    path = tmp_path / "film.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 20, (128, 96))
    for number in range(40):
        writer.write(grey(number))
    writer.release()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with Video(path) as video:
        assert [n for n, _ in numbers(video)] == list(range(video.read)) and 10 < video.read < 30
        assert f"{40 - video.read} of 40 frames" in video.told()


@pytest.mark.parametrize(("content", "told"), [(b"", "an empty file"), (b"a text\n" * 99, "no frame can be read of")])
def test_what_is_no_film_is_told(tmp_path, content, told):
    (tmp_path / "x.mp4").write_bytes(content)
    with pytest.raises(DataError, match=told):
        Video(tmp_path / "x.mp4")


def test_no_file_a_folder_and_no_camera_are_told(tmp_path, film, capfd):
    film.write_bytes(film.read_bytes()[: film.stat().st_size // 2])  # its index stands at its end
    for source, told in ((tmp_path / "none.mp4", "nothing there"), (tmp_path, "a folder"),
                         (film, "no frame can be read of"), (97, "camera 97: expected a camera")):  # fmt: skip
        with pytest.raises(DataError, match=told):
            Video(source)
    assert capfd.readouterr() == ("", ""), "the libraries say nothing beside it"


def test_a_film_that_fails_on_the_way_leaves_nothing_and_the_old_one(film):
    before = film.read_bytes()
    with pytest.raises(ZeroDivisionError), VideoFile(film, 20.0) as out:
        out.write(grey(0))
        out.write(np.zeros((48, 64, 3), np.uint8))
        raise ZeroDivisionError
    assert film.read_bytes() == before and [p.name for p in film.parent.iterdir()] == ["film.mp4"]
    (film.parent / "file").write_text("")
    with pytest.raises((UserError, OSError)), VideoFile(film.parent / "file" / "x.mp4", 20.0) as out:
        out.write(grey(0))
