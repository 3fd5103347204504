# SPDX-License-Identifier: AGPL-3.0-or-later
"""An object is registered from its photographs and looked for in its video; what is found is scored and kept."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fsdet.cli.main import main
from fsdet.data.drawn_flights import draw_flights
from fsdet.data.refdet import read_samples
from fsdet.data.video import Video
from fsdet.detect.tracks import Tracked
from fsdet.tasks import refer


@pytest.fixture(scope="module")
def flights(tmp_path_factory):
    return draw_flights(tmp_path_factory.mktemp("flights") / "set", sizes={"flights": 2}).parent


@pytest.fixture
def seen(flights, monkeypatch):
    """Put in what is found: `seen(share)` has the true box in that share of its frames, and a poor one elsewhere."""
    samples = {s.video: s for s in read_samples(flights)}

    def put(share: float) -> None:
        def follow(predictor, video, conf=None):
            sample = samples[video.source]
            shown = sorted(sample.truth)
            kept = set(shown[: round(share * len(shown))])
            for number, frame in video.frames():
                boxes = [sample.truth[number], [0.0, 0, 5, 5]] if number in kept else []
                n, label = len(boxes), predictor.names.index(sample.name)
                scores, branch = torch.linspace(0.9, 0.5, 2)[:n], torch.ones(n, dtype=torch.uint8)
                yield number, frame, Tracked(torch.tensor(boxes).reshape(-1, 4), scores,
                                             torch.full((n,), label), branch, torch.arange(1, n + 1))  # fmt: skip

        monkeypatch.setattr(refer, "follow", follow)

    return put


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_st_iou_is_the_share_of_frames_where_it_is_found_exactly(best, flights, tmp_path, seen, share):
    seen(share)
    told = refer.predict(Path(best), folder=flights, out=tmp_path / "out", film=False)
    samples, found = read_samples(flights), json.loads((tmp_path / "out/results.json").read_text())
    expected = [round(share * len(s.truth)) / len(s.truth) for s in samples]
    assert [row["st_iou"] for row in found["samples"]] == pytest.approx(expected, abs=1e-6)
    assert found["st_iou"] == pytest.approx(sum(expected) / 2) and f"mean ST-IoU {found['st_iou']:.3f}" in told


def test_what_is_found_is_written_as_the_layout_has_it(best, flights, tmp_path, seen, capsys):
    seen(1.0)
    argv = ["predict", str(best), "--refdet", str(flights), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(argv) == 0 and "mean ST-IoU 1.000 of 2 samples" in capsys.readouterr().out
    copied = Path(shutil.copytree(flights, tmp_path / "copied"))
    shutil.copy(tmp_path / "out/annotations.json", copied / "annotations/annotations.json")
    for ours, theirs in zip(read_samples(copied), read_samples(flights), strict=True):
        assert ours.truth.keys() == theirs.truth.keys()
        assert all(ours.truth[n] == pytest.approx(theirs.truth[n], abs=0.01) for n in ours.truth)
    with Video(tmp_path / "out/flight_0.mp4") as film:
        assert len(list(film.frames())) == 60
    assert main(argv) == 0, "its own results may be replaced"


def test_one_that_was_killed_is_begun_again(best, flights, tmp_path, seen, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt  # nothing is done after it, as after a SIGKILL

    seen(1.0)
    argv = ["predict", str(best), "--refdet", str(flights), "--out", str(tmp_path / "out"), "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(refer, "write_json", killed)
        assert main(argv) == 130 and (tmp_path / "out/flight_1.mp4").is_file()
    assert main(argv) == 0
    names = ["annotations.json", "flight_0.mp4", "flight_1.mp4", "results.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_a_sample_that_nobody_annotated_is_predicted_and_not_scored(best, flights, tmp_path, capsys):
    """By the detector itself: what it finds after two steps of training means nothing, but is all there."""
    bare = Path(shutil.copytree(flights, tmp_path / "bare"))
    shutil.rmtree(bare / "annotations")
    told = refer.predict(Path(best), folder=bare, out=tmp_path / "out", conf=0.9, film=False)
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["st_iou"] is None and [row["st_iou"] for row in found["samples"]] == [None, None]
    assert "no sample is annotated" in told and [row["frames"] for row in found["samples"]] == [60, 60]


def test_nothing_of_others_is_replaced_and_faults_of_the_folder_are_told_together(best, flights, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "flight_1.mp4").write_bytes(b"mine")
    argv = ["predict", str(best), "--refdet", str(flights), "--out", str(out), "--device", "cpu"]
    assert main(argv) == 2 and "flight_1.mp4 and 0 more" in capsys.readouterr().err
    assert (out / "flight_1.mp4").read_bytes() == b"mine"
    assert main([*argv[:-4], "--out", str(flights / "found"), "--device", "cpu"]) == 2
    assert main(["predict", str(best), "--refdet", str(tmp_path / "gone"), "--out", str(out)]) == 2
    broken = Path(shutil.copytree(flights, tmp_path / "broken"))
    (broken / "samples/flight_0/drone_video.mp4").write_bytes(b"x")
    (broken / "samples/flight_1/drone_video.mp4").unlink()
    capsys.readouterr()
    assert main(["predict", str(best), "--refdet", str(broken), "--out", str(tmp_path / "o")]) == 2
    said = capsys.readouterr().err
    assert "unreadable video" in said and "missing video" in said and not (tmp_path / "o").exists()
    assert main(["predict", str(best), "--refdet", str(flights), "--source", "a.jpg", "--out", str(out)]) == 2
