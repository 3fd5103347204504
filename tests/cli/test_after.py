# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet report` and `fsdet doctor` read a run folder as it lies there, whole or cut short."""

import json
import os
from pathlib import Path

import pytest

from fsdet.cli.main import main
from fsdet.command import typed


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    return Path("run")


def write(folder: Path, *rows: dict, age: float = 0.0) -> None:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"kind": "st', "utf-8")
    os.utime(path, times=(path.stat().st_atime, path.stat().st_mtime - age))


def step(number: int, epoch: int, outcome: str, **more: object) -> dict:
    values = {"total": 3.0, "raw": {"bbox": 0.5}, "weighted": {"bbox": 3.0}, "grad_l2_preclip": 5.0, "clip_ratio": 1.0,
              "loss_scale": 1.0, "lr": {"head": 0.1}, "batch": number}  # fmt: skip
    return {"kind": "step", "step": number, "epoch": epoch, "outcome": outcome, **values, **more}


def finished(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "finished": True, "files": {}}), "utf-8")


def sound(count: int = 20) -> list[dict]:
    return [
        step(
            5 * i + 1,
            1,
            "committed",
            total=9.0 - 0.1 * i,
            raw={"bbox": 1.0 - 0.03 * i},
            lr={"head": 0.02 * min(i + 1, 5)},
        )
        for i in range(count)
    ]


def doctor(capsys) -> str:
    assert main(["doctor", "run"]) == 0
    return capsys.readouterr().out


def test_a_healthy_run_has_no_diagnosis(folder, capsys):
    write(folder, *sound())
    finished(folder)
    assert doctor(capsys) == "run: 96 steps, none rejected, no red flag\n"


def test_the_doctor_says_whether_a_run_is_under_way_or_was_stopped(folder, capsys):
    write(folder, *sound())
    assert "no red flag; under way, last line 0 s ago" in doctor(capsys)
    write(folder, *sound(), age=600)
    assert "no red flag; not finished, last line 10 min ago: stopped or killed" in doctor(capsys)


def test_why_a_run_ended_is_told(folder, capsys):
    """The last ending counts, and none once the run has finished."""
    ends = [{"kind": "end", "step": 90, "epoch": 1, "batch": 96, "reason": f"reason {i}"} for i in range(2)]
    write(folder, *sound(), *ends)
    assert doctor(capsys) == "run: 96 steps, none rejected, no red flag\nended: reason 1\n"
    assert main(["report", "run"]) == 0 and "unfinished (reason 1); " in capsys.readouterr().out
    finished(folder)
    assert "reason" not in doctor(capsys)


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ((0, 0), "from the first batch on"),
        ((1, 2), "all in epoch 1, after step 1"),
        ((11, 30), "between steps 11 and 30, epochs 2 to 4"),
        ((40, 40), "all from step 40 on, epoch 5"),
    ],
)
def test_the_doctor_asks_first_when_steps_were_rejected(steps, told, folder, capsys):
    taken = [step(i, 1 + i // 10, "committed") for i in range(1, 41)] if steps[0] else []
    told_of = {"total": None, "culprit": "bbox_loss"}
    bad = [step(s, 1 + s // 10, "bad_loss", **told_of, batch=100 + i) for i, s in enumerate(steps)]
    write(folder, *sorted((*taken, *bad), key=lambda row: row["step"]))
    shown = doctor(capsys)
    assert f"seen: bad_loss 2; {told}; culprit: bbox_loss" in shown and "change: " in shown


def test_the_doctor_takes_a_loss_scale_that_finds_its_place_for_no_rejection(folder, capsys):
    write(folder, step(0, 1, "amp_backoff", loss_scale=8192.0), *[{**row, "loss_scale": 4096.0} for row in sound()])
    finished(folder)
    shown = doctor(capsys)
    assert "run: 96 steps, none rejected, no red flag\namp_backoff 1: " in shown and "bf16" not in shown


def test_the_doctor_lists_incidents_and_flags_below_its_finding(folder, capsys):
    for number in (2, 11):
        place = folder / "incidents" / f"step_{number}"
        place.mkdir(parents=True)
        report = {"culprit": f"dfl row {number}", "image_ids": ["a.jpg", "b.jpg"]}
        (place / "report.json").write_text(json.dumps(report))
    flag = {"kind": "flag", "epoch": 1, "flag": "clip_ratio", "message": "lower the LR"}
    probe = {"kind": "probe", "step": 0, "epoch": 1, "batch": 1, "name": "dfl", "finite": False, "weighted": None}
    bad = step(0, 1, "bad_loss", total=None, culprit="dfl_loss")
    write(folder, probe, bad, {**flag, "step": 5}, {**flag, "step": 105})
    shown = doctor(capsys)
    assert "nan_at_start: " in shown and "not finite on the first batch: dfl" in shown
    first, second = shown.index("dfl row 2; images a.jpg, b.jpg"), shown.index("dfl row 11")
    assert first < second, "in the order of their steps"
    assert "clip_ratio (steps 5 to 105, 2 times): lower the LR" in shown


def test_report_draws_the_curves_and_names_the_next_command(folder, capsys):
    write(folder, step(8, 1, "committed"), {"kind": "val", "step": 8, "epoch": 1, "val/base/AP50": 0.25})
    (folder / "results.csv").write_text("epoch,train/total\n1,3.0\n2,2.0\n")
    assert main(["report", "run"]) == 0
    shown = capsys.readouterr().out
    assert "run: step 8, unfinished; nothing is saved yet" in shown and "next:" not in shown
    for name in ("last.pt", "best.pt"):
        (folder / name).write_bytes(b"no manifest is beside it")
    assert main(["report", "run"]) == 0
    shown = capsys.readouterr().out
    assert f"run: step 8, unfinished; next: {typed('fsdet train --resume run')}" in shown
    assert "epoch 1: val/base/AP50 0.2500" in shown and f"next: {typed('fsdet eval run/best.pt')}" in shown
    assert (folder / "results.png").read_bytes().startswith(b"\x89PNG") and "run/results.png" in shown


@pytest.mark.parametrize("verb", ["report", "doctor"])
def test_a_folder_without_a_run_is_told(verb, folder, capsys):
    assert main([verb, "run"]) == 2
    assert "run: expected a run folder with metrics.jsonl, got none" in capsys.readouterr().err
