# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet report` and `fsdet doctor` read a run folder as it lies there, whole or cut short."""

import json
from pathlib import Path

import pytest

from fsdet.cli.main import main
from fsdet.command import typed


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    return Path("run")


def write(folder: Path, *rows: dict) -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "st', "utf-8")


def step(number: int, epoch: int, outcome: str) -> dict:
    return {"kind": "step", "step": number, "epoch": epoch, "batch": number, "outcome": outcome}


def test_a_healthy_run_has_no_diagnosis(folder, capsys):
    write(folder, step(1, 1, "committed"), step(90, 2, "committed"))
    assert main(["doctor", "run"]) == 0
    assert capsys.readouterr().out == "run: 90 steps, none rejected, no red flag\n"


@pytest.mark.parametrize(
    ("epochs", "told"),
    [
        ((1, 1), "all in epoch 1: learning rate"),
        ((1, 4), "from the start: look at precision"),
        ((3, 4), "first in epoch 3"),
    ],
)
def test_the_doctor_counts_rejections_and_asks_first_when_they_happened(epochs, told, folder, capsys):
    write(folder, *(step(i + 1, epoch, "bad_loss") for i, epoch in enumerate(epochs)), step(9, 5, "committed"))
    assert main(["doctor", "run"]) == 0
    shown = capsys.readouterr().out
    assert f"rejected steps: bad_loss 2, {told}" in shown or (
        "rejected steps: bad_loss 2, in" in shown and told in shown
    )
    assert "bad_loss: replay it" in shown


def test_the_doctor_takes_a_loss_scale_that_finds_its_place_for_no_rejection(folder, capsys):
    write(folder, step(1, 1, "amp_backoff"), step(1, 1, "committed"), step(90, 2, "committed"))
    assert main(["doctor", "run"]) == 0
    shown = capsys.readouterr().out
    assert "run: 90 steps, none rejected, no red flag\namp_backoff 1: " in shown and "bf16" not in shown


def test_the_doctor_names_incidents_flags_and_losses_of_the_first_batch(folder, capsys):
    place = folder / "incidents" / "step_2"
    place.mkdir(parents=True)
    (place / "report.json").write_text(json.dumps({"culprit": "dfl row 3", "image_ids": ["a.jpg", "b.jpg"]}))
    flag = {"kind": "flag", "epoch": 1, "flag": "clip_ratio", "message": "lower the LR"}
    probe = {"kind": "probe", "step": 1, "epoch": 1, "name": "dfl", "finite": False}
    write(folder, probe, step(2, 1, "bad_loss"), {**flag, "step": 5}, {**flag, "step": 105})
    assert main(["doctor", "run"]) == 0
    shown = capsys.readouterr().out
    assert "not finite on the first batch: dfl" in shown
    assert "report.json: dfl row 3; images a.jpg, b.jpg" in shown
    assert "clip_ratio (steps 5 to 105, 2 times): lower the LR" in shown


def test_report_draws_the_curves_and_names_the_next_command(folder, capsys):
    write(folder, step(8, 1, "committed"), {"kind": "val", "step": 8, "epoch": 1, "val/base/AP50": 0.25})
    (folder / "results.csv").write_text("epoch,train/total\n1,3.0\n2,2.0\n")
    assert main(["report", "run"]) == 0
    shown = capsys.readouterr().out
    assert f"run: step 8, unfinished; next: {typed('fsdet train --resume run')}" in shown
    assert "epoch 1: val/base/AP50 0.2500" in shown and f"next: {typed('fsdet eval run/best.pt')}" in shown
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG") and "run/results.png" in shown


@pytest.mark.parametrize("verb", ["report", "doctor"])
def test_a_folder_without_a_run_is_told(verb, folder, capsys):
    assert main([verb, "run"]) == 2
    assert "run: expected a run folder with metrics.jsonl, got none" in capsys.readouterr().err
