# SPDX-License-Identifier: AGPL-3.0-or-later
"""A video or camera is watched frame by frame; what is written can be read back, and a signal loses nothing."""

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from fsdet.cli.main import main
from fsdet.data.video import Video, VideoFile
from fsdet.tasks import watch
from fsdet.types import Detections

FRAMES, RATE = 20, 10.0


class Eye:
    """Finds a red square by its colour and calls it `mug`, as a detector that is right would."""

    names, registered, limits = ("pen", "mug"), ("mug",), torch.tensor([0.25, 0.5])
    made_by = MappingProxyType({"model_sha256": "e" * 64, "looks": 1})

    def __init__(self, watched: Callable[[int], None] = lambda n: None) -> None:
        self.seen, self.watched = 0, watched

    def predict(self, image: np.ndarray, threshold: float) -> Detections:
        self.seen += 1
        self.watched(self.seen)
        red = (image[..., 0] > 150) & (image[..., 1] < 100)
        boxes = torch.zeros(0, 4)
        if red.any():
            xs, ys = np.flatnonzero(red.any(0)), np.flatnonzero(red.any(1))
            boxes = torch.tensor([[xs[0], ys[0], xs[-1] + 1.0, ys[-1] + 1.0]])
        n = len(boxes)
        return Detections(boxes, torch.full((n,), 0.9), torch.ones(n, dtype=torch.int64),
                          torch.ones(n, dtype=torch.uint8))  # fmt: skip


def square(t: int) -> tuple[int, int, int, int]:
    """Where the square is in frame t."""
    return 10 + 4 * t, 30, 50 + 4 * t, 70


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with film.mp4: a red square that goes to the right, and is gone in the last five frames."""
    monkeypatch.chdir(tmp_path)
    with VideoFile(tmp_path / "film.mp4", RATE) as out:
        for t in range(FRAMES):
            frame = np.full((120, 160, 3), 90, np.uint8)
            x0, y0, x1, y1 = square(t)
            if t < FRAMES - 5:
                frame[y0:y1, x0:x1] = (220, 20, 20)
            out.write(frame)
    return tmp_path


@pytest.fixture
def eye(monkeypatch) -> Callable[..., Eye]:
    """Call to put an Eye in the detector's place."""

    def put(watched: Callable[[int], None] = lambda n: None) -> Eye:
        found = Eye(watched)
        monkeypatch.setattr(watch, "finder", lambda *args, **options: found)
        return found

    return put


def look(*words: str) -> int:
    return main(["predict", "film.mp4", "--source", *words, "--out", "out", "--device", "cpu"])


def read() -> dict:
    return json.loads(Path("out/predictions.json").read_text())


def test_a_film_is_followed_and_all_that_is_written_agrees(place, eye, capsys):
    eye()
    assert look("film.mp4", "--txt") == 0
    assert "20 frames" in (told := capsys.readouterr().out) and "1 object (1 mug) in 15 boxes -> out" in told
    found = read()
    assert found["video"] == {"file": "film.mp4", "rate": RATE, "frames": FRAMES} and found["names"] == ["pen", "mug"]
    assert found["made_by"] == {**Eye.made_by, "conf": None}
    rows = found["predictions"]
    assert [r["frame"] for r in rows] == list(range(15)) and {r["track"] for r in rows} == {1}
    assert {(r["image"], r["category_id"], r["branch"]) for r in rows} == {("film.mp4", 1, "prototype")}
    for row in rows:
        x0, y0, x1, y1 = square(row["frame"])
        assert row["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=2.5), row
    labels = sorted(p.name for p in Path("out/labels").iterdir())
    assert labels == [f"film_{t:06d}.txt" for t in range(15)]
    x, y, w, h = rows[7]["bbox"]
    words = Path("out/labels/film_000007.txt").read_text().split()
    shares = [(x + w / 2) / 160, (y + h / 2) / 120, w / 160, h / 120]
    assert words[0] == "1" and [float(v) for v in words[1:5]] == pytest.approx(shares, abs=1e-4)


def test_a_film_whose_name_is_no_utf_8_is_followed_too(place, eye, capsys):
    """Such a path ended the process inside OpenCV."""
    eye()
    film, out = (Path(os.fsdecode(name)) for name in (b"bad\xff.mp4", b"out\xfe"))
    film.write_bytes(Path("film.mp4").read_bytes())
    assert main(["predict", "film.mp4", "--source", str(film), "--out", str(out), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(r"bad\udcff.mp4: 20 frames")
    found = json.loads((out / "predictions.json").read_text(encoding="utf-8"))
    assert found["written"] == [r"bad\udcff.mp4"] and (out / r"bad\udcff.mp4").stat().st_size > 1000


def test_the_annotated_film_has_every_frame_its_rate_and_a_box_where_the_object_is(place, eye):
    eye()
    assert look("film.mp4") == 0
    with Video(Path("out/film.mp4")) as film:
        frames = [frame.astype(int) for _, frame in film.frames()]
    assert len(frames) == FRAMES and film.rate == RATE and frames[0].shape == (480, 640, 3)
    edge = frames[8][4 * square(8)[1] + 80, 4 * square(8)[0] - 8 : 4 * square(8)[0] + 12]
    shade = np.array((255, 82, 82))  # of the first track
    assert np.abs(edge - shade).sum(-1).min() < 60, "its left side is drawn"
    assert np.abs(frames[19] - 90).max() < 30, "nothing is drawn where nothing is"


def test_a_film_is_never_removed_and_what_stays_of_an_earlier_predict_is_told(place, eye, capsys):
    eye()
    assert look("film.mp4", "--txt") == 0 and "earlier" not in capsys.readouterr().out
    Path("out/a.jpg").write_bytes(b"drawn")
    found = read()
    found["written"].append("a.jpg")
    found["sha256"]["a.jpg"] = hashlib.sha256(b"drawn").hexdigest()
    Path("out/predictions.json").write_text(json.dumps(found))
    Path("other.mp4").write_bytes(Path("film.mp4").read_bytes())
    assert main(["predict", "film.mp4", "--source", "other.mp4", "--out", "out", "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "removed 1 file of an earlier predict" in told and not Path("out/a.jpg").exists()
    assert "still there: 16 files of an earlier predict, which may have been changed since: no sha256 was noted" in told
    assert Path("out/film.mp4").is_file() and len(list(Path("out/labels").iterdir())) == 15


@pytest.mark.parametrize("at", ["a frame", "predictions.json"])
def test_a_look_that_was_killed_is_begun_again_and_its_film_is_not_removed(place, eye, at, monkeypatch, capsys):
    class Killed(BaseException):
        """Stands for SIGKILL."""

    def killed(*_, **__):
        raise Killed

    eye(lambda n: killed() if at == "a frame" and n == 8 else None)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(watch, "write_index", killed)
        look("film.mp4", "--txt")
    assert Path("out/labels/film_000003.txt").is_file() and not Path("out/predictions.json").exists()
    eye()
    Path("other.mp4").write_bytes(Path("film.mp4").read_bytes())
    assert main(["predict", "film.mp4", "--source", "other.mp4", "--out", "out", "--device", "cpu"]) == 0
    left = 16 if at == "predictions.json" else 7
    assert f"still there: {left} files of an earlier predict" in capsys.readouterr().out
    assert look("film.mp4", "--txt") == 0 and len(list(Path("out/labels").iterdir())) == 15
    assert sorted(os.listdir("out")) == ["film.mp4", "labels", "other.mp4", "predictions.json"]


def test_the_first_frames_alone_and_without_a_copy(place, eye):
    detector = eye()
    assert look("film.mp4", "--frames", "6", "--no-video") == 0
    assert detector.seen == 6 and read()["video"]["frames"] == 6
    assert [p.name for p in Path("out").iterdir()] == ["predictions.json"]


def test_a_second_look_leaves_no_labels_of_the_first(place, eye):
    eye()
    Path("out/labels").mkdir(parents=True)
    assert look("film.mp4", "--txt") == 0
    Path("out/labels/film_more.txt").write_text("mine")
    assert look("film.mp4", "--txt", "--frames", "3") == 0
    assert sorted(p.name for p in Path("out/labels").iterdir()) == [*(f"film_{t:06d}.txt" for t in range(3)),
                                                                    "film_more.txt"]  # fmt: skip


@pytest.mark.parametrize(("apart", "pace"), [(0.05, 20.0), (0.001, watch.PACES[1])])
def test_a_camera_is_ended_by_ctrl_c_and_what_was_found_is_kept(apart, pace, place, eye, monkeypatch, capsys):
    opened, real, now = [], cv2.VideoCapture, [100.0]
    monkeypatch.setattr(cv2, "VideoCapture", lambda s: (opened.append(s), real("film.mp4" if s == 7 else s))[1])
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def watched(n):
        now[0] += apart
        if n == 9:
            os.kill(os.getpid(), signal.SIGINT)

    eye(watched)
    assert look("7") == 0 and 7 in opened
    assert "camera7: 9 frames" in capsys.readouterr().out
    assert read()["video"]["file"] == "camera7" and [r["frame"] for r in read()["predictions"]] == list(range(9))
    with Video(Path("out/camera7.mp4")) as film:
        assert len(list(film.frames())) == 9 and film.rate == pace, "at the pace at which frames came"
    assert sorted(p.name for p in Path("out").iterdir()) == ["camera7.mp4", "predictions.json"]


def test_a_film_that_is_stopped_keeps_what_was_found_and_says_so(place, eye, capsys):
    eye(lambda n: os.kill(os.getpid(), signal.SIGTERM) if n == 4 else None)
    assert look("film.mp4") == 143
    assert "stopped after 4 frames, and what was found is kept" in capsys.readouterr().err
    assert read()["video"]["frames"] == 4 and Path("out/film.mp4").exists()


def test_a_cut_off_film_is_told_in_one_sentence(place, eye, capsys):
    writer = cv2.VideoWriter("cut.avi", cv2.VideoWriter.fourcc(*"MJPG"), RATE, (160, 120))
    for t in range(40):
        writer.write(np.random.default_rng(t).integers(0, 255, (120, 160, 3), np.uint8))
    writer.release()
    Path("cut.avi").write_bytes(Path("cut.avi").read_bytes()[: Path("cut.avi").stat().st_size // 2])
    eye()
    assert look("cut.avi", "--no-video") == 0
    told = capsys.readouterr().out
    assert "cut.avi: " in told and "of 40 frames could not be read; the file is damaged or cut off" in told
    assert look("cut.avi", "--no-video", "--frames", "3") == 0
    assert "could not be read" not in capsys.readouterr().out, "nobody asked for the others"


@pytest.mark.parametrize(
    ("source", "out", "told"),
    [
        ("film.mp4", ".", "expected a folder beside the video, got the video's own"),
        ("film.mp4", "film.mp4", "expected a folder, got a file"),
        ("film.mp4", "theirs", "expected a folder without these files, got film.mp4 and 0 more"),
        ("film.mp4", "labelled", "expected a folder without these files, got labels/film_000003.txt and 0 more"),
        ("film.mp4", "json", "expected no file yet, or what fsdet predict wrote"),
        ("none.mp4", "out", "none.mp4: expected a video file, got nothing there"),
        ("96", "out", "camera 96: expected a camera, got none that gives pictures"),
    ],
)
def test_what_is_not_there_or_not_ours_is_refused_before_anything_is_written(place, eye, source, out, told, capsys):
    for name in ("theirs/film.mp4", "labelled/labels/film_000003.txt", "json/predictions.json"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_text("mine")
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file()}
    detector = eye()
    assert main(["predict", "film.mp4", "--source", source, "--out", out]) == 2
    assert told in capsys.readouterr().err and not detector.seen
    assert {p: p.read_bytes() for p in place.rglob("*") if p.is_file()} == before


def test_a_file_where_the_folder_of_labels_belongs_is_told_before_the_film_is_looked_at(place, eye, capsys):
    Path("out").mkdir()
    Path("out/labels").write_text("mine")
    detector = eye()
    assert look("film.mp4", "--txt") == 2 and not detector.seen
    assert "out/labels: expected a folder, got a file" in capsys.readouterr().err
    assert [p.name for p in Path("out").iterdir()] == ["labels"] and Path("out/labels").read_text() == "mine"


def test_limits_of_a_video_for_pictures_are_refused(place, eye, capsys):
    cv2.imwrite("a.png", np.zeros((8, 8, 3), np.uint8))
    assert look("a.png", "--frames", "3") == 2
    assert "--frames and --no-video: expected a video or a camera, got a.png" in capsys.readouterr().err


def test_a_checkpoint_watches_a_film(best, place):
    """The real detector: its rows are those of its own detections joined by the tracker."""
    assert main(["predict", str(best), "--source", "film.mp4", "--out", "out", "--conf", "0", "--frames", "3",
                 "--device", "cpu"]) == 0  # fmt: skip
    rows = read()["predictions"]
    assert rows and all(r["track"] >= 1 and r["frame"] < 3 and r["branch"] == "standard" for r in rows)
    tracks = {(r["frame"], r["track"]) for r in rows}
    assert len(tracks) == len(rows), "a track has one box a frame"
