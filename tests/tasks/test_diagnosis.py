# SPDX-License-Identifier: AGPL-3.0-or-later
"""Recorded runs with a known fault are diagnosed by its name, sound ones have no finding, and cut files are read.

tests/corpus holds what scripts/bench/sick_runs.py recorded of real trainings; demo_* and cards_* are trainings of the
drawn set and of photographs, every fourth logged step of theirs.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from fsdet.command import typed
from fsdet.engine.history import read_history
from fsdet.tasks.diagnosis import diagnose

CORPUS = Path(__file__).resolve().parents[1] / "corpus"
SOUND = ("healthy", "demo_stage_1", "demo_stage_2", "cards_stage_3")
SICK = {
    "lr_too_high": "lr_too_high",
    "lr_explodes": "lr_too_high",
    "lr_too_low": "lr_too_low",
    "label_slip": "label_slip",
    "fp16_overflow": "fp16_overflow",
    "scale_collapse": "loss_scale_collapse",
    "over_clipping": "over_clipping",
    "dead_dfl": "dead_dfl",
    "collapsed_boxes": "no_positives",
    "cpe_zero": "cpe_zero",
    "episodes_from_scratch": "norm_explosion",
    "frozen_head": "frozen_head",
    "all_frozen": "nothing_trains",
    "loss_jump": "loss_jump",
    "nan_at_start": "nan_at_start",
    "nan_late": "nan_late",
    "nan_sometimes": "nan_sometimes",
    "poisoned_norm": "poisoned_norm",
}


def named(folder: Path) -> list[str]:
    return [finding.name for finding in diagnose(read_history(folder)).findings]


def test_the_corpus_is_what_this_test_knows():
    assert {path.name for path in CORPUS.iterdir()} == {*SICK, *SOUND}


@pytest.mark.parametrize(("run", "illness"), SICK.items(), ids=list(SICK))
def test_a_sick_run_is_diagnosed_by_name(run, illness):
    first, *others = named(CORPUS / run)
    assert first == illness and set(others) <= {"over_clipping", "loss_jump"}, (
        "45 steps are clipped and noisy by nature"
    )


@pytest.mark.parametrize("run", SICK)
def test_commands_that_are_advised_name_the_run_and_its_data(run):
    folder = CORPUS / run
    advice = " ".join(text for finding in diagnose(read_history(folder)).findings for text in finding.change)
    assert not re.search(r"DATA|DIR|CONFIG|CHECKPOINT|`fsdet", advice), "each can be pasted as it is"
    for command in re.findall(r"`[^`]* -m fsdet ([^`]*)`", advice):
        words = shlex.split(command)
        if words[0] == "data":
            assert words == ["data", "check", "shapes/data.yaml", "--deep"]
            assert "path: shapes/data.yaml\n" in (folder / "config.yaml").read_text()
        elif words[:2] == ["probe", "--incident"]:
            assert Path(words[2]).parent == folder / "incidents"
            assert Path(words[2]).is_dir() or not (folder / "incidents").exists()
        else:
            assert words in (["train", "--resume", str(folder)], ["probe", str(folder / "config.yaml")])


@pytest.mark.parametrize("run", SOUND)
def test_a_sound_run_has_no_finding(run):
    assert named(CORPUS / run) == []


@pytest.mark.parametrize("run", SOUND)
def test_a_sound_run_is_sound_at_every_moment(run, tmp_path):
    """Read while it runs, or after a kill: whole lines up to some point, and half of the next one."""
    lines = (CORPUS / run / "metrics.jsonl").read_text().splitlines(keepends=True)
    shutil.copy(CORPUS / run / "config.yaml", tmp_path)
    for stop in range(1, len(lines)):
        text = "".join(lines[:stop]) + lines[stop][: len(lines[stop]) // 2]
        (tmp_path / "metrics.jsonl").write_text(text)
        assert named(tmp_path) == [], f"after {stop} lines"


@pytest.mark.parametrize("run", [run for run in SICK if run.startswith(("nan", "lr_explodes", "scale", "all", "fp16"))])
def test_a_run_that_broke_is_diagnosed_from_a_half_written_file_too(run, tmp_path):
    shutil.copytree(CORPUS / run, tmp_path / "run")
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines(keepends=True)
    text = "".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2]
    (tmp_path / "run/metrics.jsonl").write_text(text)
    assert named(tmp_path / "run")[0] == SICK[run]


def row(step: int, **changes) -> dict:
    content = {"kind": "step", "step": step, "epoch": 1 + step // 100, "batch": step, "outcome": "committed",
               "total": 5.0, "raw": {"bbox": 1 - 0.003 * step, "cls": 9 - 0.03 * step, "dfl": 2 - 0.005 * step},
               "weighted": {"bbox": 3.0, "cls": 1.0, "dfl": 1.0},
               "grad_l2_preclip": 5.0, "grad_l2_postclip": 5.0, "clip_ratio": 1.0, "loss_scale": 1.0,
               "lr": {"head": 0.01}}  # fmt: skip
    return content | changes


def judged(step: int, named: float, boxes: float) -> dict:
    return {"kind": "val", "step": step, "epoch": 1, "batch": step, "val/base/AP50": named, "val/fitness": named,
            "val/base/AP50_boxes": boxes}  # fmt: skip


def learning(count: int = 30) -> list[dict]:
    """Steps whose losses fall as they should, after a warm-up of five rows."""
    return [
        row(10 * i + 1, total=9.0 - 0.1 * i, lr={"head": 0.002 * min(i + 1, 5)},
            raw={"bbox": 1.0 - 0.02 * i, "cls": 9.0 - 0.2 * i, "dfl": 2.0 - 0.03 * i})
        for i in range(count)
    ]  # fmt: skip


def test_classes_that_are_learnt_late_are_no_slip_and_those_that_never_are_is_one(written):
    catching_up = [judged(60 * i, 0.05 * i * i, 0.4 + 0.1 * i) for i in range(1, 5)]
    assert named(written([*learning(), *catching_up])) == []
    left_behind = [judged(60 * i, 0.2, 0.4 + 0.1 * i) for i in range(1, 5)]
    assert named(written([*learning(), *left_behind])) == ["label_slip"]
    assert named(written([*learning(), *left_behind[:3]])) == [], "too early to say"


@pytest.fixture
def written(tmp_path):
    """A run folder of the given rows and configuration."""

    def write(rows, config="stage: {init_from: before.pt}\n"):
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        (tmp_path / "config.yaml").write_text(config)
        return tmp_path

    return write


def test_norms_that_are_loud_in_warm_up_alone_are_a_remark_and_later_a_finding(written):
    rates = [0.001 * min(i + 1, 5) for i in range(20)]
    rows = [row(10 * i + 1, lr={"head": rate}, total=9.0 - 0.1 * i) for i, rate in enumerate(rates)]
    early = [row(1, grad_l2_preclip=2e4, lr={"head": 0.001}, total=9.0), *rows[1:]]
    result = diagnose(read_history(written(early)))
    assert result.findings == () and "in warm-up only, first at step 1" in result.remarks[0]
    for norm, name in ((2e4, "norm_warning"), (2e5, "norm_explosion")):
        late = [*rows[:15], row(151, grad_l2_preclip=norm, lr={"head": 0.005}, total=7.5), *rows[16:]]
        assert named(written(late)) == [name]


def test_a_run_that_started_from_a_folder_is_advised_to_look_at_its_best_checkpoint(written, tmp_path):
    bad = [row(i, outcome="bad_loss", total=None, culprit="bbox_loss") for i in range(3)]
    (tmp_path / "before").mkdir()
    [found] = diagnose(read_history(written(bad, f"stage: {{init_from: {tmp_path / 'before'}}}\n"))).findings
    assert typed("fsdet info {}", tmp_path / "before/best.pt") in str(found)


def test_thresholds_are_those_of_the_run(written):
    rows = [row(10 * i + 1, clip_ratio=1.0 + i % 4, total=9.0 - 0.1 * i) for i in range(20)]
    assert named(written(rows)) == ["over_clipping"]
    assert named(written(rows, "stage: {init_from: a.pt}\nguard: {clipped_share: 0.8}\n")) == []


def test_images_that_come_back_are_named_and_the_replay_of_an_incident_decides(written):
    bad = {"outcome": "bad_loss", "total": None, "culprit": "bbox_loss", "loss_scale": 64.0}
    rows = [row(i, loss_scale=64.0, total=9.0 - 0.1 * i) for i in range(1, 21)]
    rows[12:12] = [row(12, batch=13, **bad, image_ids=["a.jpg", "b.jpg"])]
    rows[17:17] = [row(16, batch=17, **bad, image_ids=["c.jpg", "a.jpg"])]
    (finding,) = diagnose(read_history(written(rows))).findings
    assert finding.name == "nan_sometimes" and "images: a.jpg" in finding.why and "b.jpg" not in finding.why
    place = written(rows) / "incidents/step_12"
    place.mkdir(parents=True)
    (place / "report.json").write_text(json.dumps({"evidence": {"cause": "amp"}}))
    assert named(written(rows)) == ["fp16_overflow"]


def test_a_break_in_epoch_1_is_the_rate_when_something_grew_and_else_only_most_likely(written):
    bad = [
        row(20, batch=21 + i, outcome="bad_loss", total=None, culprit="cls_loss", image_ids=[f"{i}"]) for i in range(5)
    ]
    calm = [row(i, total=9.0 - 0.1 * i) for i in range(1, 21)]
    assert named(written([*calm, *bad])) == ["nan_in_epoch_1"]
    loud = [*calm[:-1], row(20, total=9.0, grad_l2_preclip=60.0)]
    assert named(written([*loud, *bad])) == ["lr_too_high"]
    flag = {"kind": "flag", "step": 20, "epoch": 1, "batch": 20, "flag": "norm_explosion", "message": "1e6"}
    assert named(written([*calm, flag, *bad])) == ["lr_too_high"]


def test_a_configuration_of_another_version_is_a_remark(written):
    result = diagnose(read_history(written([row(1)], "optim: {lrr: 3}\n")))
    assert result.findings == () and "does not fit this version" in result.remarks[0]


def test_a_rewind_is_told_although_the_steps_that_led_to_it_were_taken_back(tmp_path):
    rows = [json.loads(line) for line in (CORPUS / "healthy/metrics.jsonl").read_text().splitlines()]
    entry = {"kind": "rewind", "number": 1, "step": 30, "epoch": 2, "batch": 30, "from_step": 42, "to_step": 30,
             "skipped": [42, 43], "lr_factor": 0.5, "reason": "20 steps in a row were rejected"}  # fmt: skip
    shutil.copy(CORPUS / "healthy/config.yaml", tmp_path)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, entry]))
    told = diagnose(read_history(tmp_path))
    assert told.findings == () and told.remarks[0] == (
        "rewind 1: from step 42 back to step 30, 2 batches skipped, LR x 0.5: 20 steps in a row were rejected"
    )
