# SPDX-License-Identifier: AGPL-3.0-or-later
"""Saves come when they are asked for, a disk that refuses costs no training, and the evidence of it is one warning."""

import os
import shutil
import time
from pathlib import Path

import pytest

from engine.test_trainer import rows, same
from engine.toy import ToyTask, trainer
from fsdet.config import Guard, Save
from fsdet.engine import checkpoint, folder, saving
from fsdet.engine.checkpoint import load, newest
from fsdet.errors import ConfigError, RunFailed


def saved_steps(monkeypatch) -> list[int]:
    """Filled with the step of every save from here on."""
    seen, done = [], checkpoint.Writer.save
    monkeypatch.setattr(checkpoint.Writer, "save",
                        lambda self, state, **how: (seen.append(state["step"]), done(self, state, **how)))  # fmt: skip
    return seen


@pytest.mark.parametrize(
    "options, steps", [({}, [5, 10, 10]), ({"every_steps": 3}, [3, 5, 6, 9, 10, 10]), ({"every_steps": 5}, [5, 10, 10])]
)
def test_saves_fall_on_epochs_asked_for_steps_and_the_end(tmp_path, monkeypatch, options, steps):
    seen = saved_steps(monkeypatch)
    trainer(ToyTask(scores=[0.5, 0.1]), tmp_path / "r", save=Save(**options)).fit()
    assert seen == steps


def test_saves_fall_on_asked_for_minutes(tmp_path, monkeypatch):
    seen, clock = saved_steps(monkeypatch), [0.0]
    monkeypatch.setattr(saving, "time", type("Clock", (), {"monotonic": lambda: clock[0]}))

    def tamper(batch):
        clock[0] += 25.0
        return batch

    trainer(ToyTask(scores=[0.5, 0.1], tamper=tamper), tmp_path / "r", save=Save(every_minutes=1)).fit()
    assert seen == [3, 5, 8, 10, 10], "a minute after the one before, whatever the reason for that"


def refusing(monkeypatch, steps: range, task: ToyTask, error: OSError) -> None:
    """While one of these batches is under way, no file can be put into its place."""
    rename, now = os.replace, [-1]

    def spoil(batch, report):
        now[0] = batch.index
        return report

    def replace(source, target):
        if now[0] in steps and Path(target).suffix == ".pt":
            raise error
        rename(source, target)

    task.spoil = spoil
    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")])
def test_a_disk_that_refuses_for_a_while_changes_nothing_but_a_warning(tmp_path, monkeypatch, caplog, error):
    trainer(ToyTask(), tmp_path / "a", save=Save(every_steps=1)).fit()
    with monkeypatch.context() as patch:
        patch.setattr(saving, "RETRY_SECONDS", 0)
        patch.setattr(checkpoint.threading, "Thread", Now)
        task = ToyTask()
        refusing(patch, range(2, 7), task, error)
        trainer(task, tmp_path / "b", save=Save(every_steps=1)).fit()
    assert caplog.text.count("not saved") == 1 and error.strerror in caplog.text and "after 5 that" in caplog.text
    assert same(load(tmp_path / "a/last.pt"), load(tmp_path / "b/last.pt")) and not [*(tmp_path / "b").glob(".*")]
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()


def test_a_save_that_failed_is_tried_again_before_the_next_one_is_due(tmp_path, monkeypatch):
    seen, task = saved_steps(monkeypatch), ToyTask(scores=[0.5, 0.1])
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0)
    monkeypatch.setattr(checkpoint.threading, "Thread", Now)
    refusing(monkeypatch, range(3, 7), task, OSError(28, "No space left on device"))
    trainer(task, tmp_path / "r").fit()
    assert seen == [5, 6, 7, 8, 10, 10], "at the end of epoch 1, again after 6, 7 and 8, and then as planned"


class Now:
    """A thread that has done its work when it has started."""

    def __init__(self, target, args, **options) -> None:
        self.start, self.join = lambda: target(*args), lambda: None


def test_the_last_save_has_to_succeed(tmp_path, monkeypatch):
    task = ToyTask()
    refusing(monkeypatch, range(0, 99), task, OSError(28, "No space left on device"))
    with pytest.raises(RunFailed, match=r"could not be saved.*No space left"):
        trainer(task, tmp_path / "r").fit()


def test_a_run_folder_that_vanishes_is_made_again_and_the_log_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoint.threading, "Thread", Now)

    def spoil(batch, report):
        if batch.index == 7:
            shutil.rmtree(tmp_path / "r")
        return report

    trainer(ToyTask(spoil=spoil), tmp_path / "r", save=Save(every_steps=2)).fit()
    assert newest(tmp_path / "r")[1]["step"] == 10
    assert [row["step"] for row in rows(tmp_path / "r", "step")] == [8, 9, 10]
    assert caplog.text.count("were deleted; they begin again") == 1
    assert "Total Loss" in (tmp_path / "r/training_debug.log").read_text()


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path, monkeypatch, resume):
    if resume:
        trainer(ToyTask(), tmp_path / "r").fit()

    def refuse(path, data):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(folder, "write_durably", refuse)
    with pytest.raises(ConfigError, match=r"/r: expected a folder to write to, got .*Permission denied.*run\.dir"):
        trainer(ToyTask(), tmp_path / "r", resume=resume)


def test_what_a_killed_process_had_begun_to_write_is_cleared_away(tmp_path):
    trainer(ToyTask(), tmp_path / "r").fit()
    (tmp_path / "r/.last.pt.12345.tmp").write_bytes(b"half")
    trainer(ToyTask(), tmp_path / "r", resume=True)
    assert [p.name for p in (tmp_path / "r").glob(".*")] == []


def test_a_checkpoint_of_a_row_of_rejections_is_no_good_one(tmp_path):
    run = trainer(ToyTask(), tmp_path / "r", guard=Guard())
    assert run.saver.good() is None, "the run is where it began"
    for step, in_row in ((1, 0), (2, 0), (3, 4)):
        run.controller.step, run.guard.in_row = step, in_row
        run.saver.save(wait=True)
    assert run.saver.good()["step"] == 2
    run.position.rewinds = [{"to_step": 3, "skipped": []}]  # it went there and has saved no other since
    assert run.saver.good()["step"] == 2
    for path in (tmp_path / "r").glob("*2.pt"):
        path.write_bytes(b"")
    assert run.saver.good()["step"] == 3, "the newest will do"


def test_the_beginning_is_kept_until_something_is_saved(tmp_path):
    run = trainer(ToyTask(), tmp_path / "r")
    run.controller.step = 4
    assert run.saver.good()["step"] == 0
    run.saver.save(wait=True)
    assert run.saver._beginning is None and run.saver.good()["step"] == 4
    assert time.monotonic() - run.saver._at < 60


def test_a_file_of_a_rewind_that_was_killed_while_it_was_saved_is_no_place_to_go_back_to(tmp_path):
    """Its step file was there already, last.pt was not: who goes on from last.pt has not come to that rewind."""
    run = trainer(ToyTask(), tmp_path / "r")
    run.controller.step, run.position.batch, run.guard.in_row = 1, 4, 1
    run.saver.save(wait=True)
    before = (tmp_path / "r/last.pt").read_bytes()
    run.position.batch, run.position.rewinds, run.guard.in_row = 6, [{"to_step": 1, "skipped": [4, 5]}], 0
    run.saver.save(wait=True)
    (tmp_path / "r/manifest.json").unlink()
    (tmp_path / "r/last.pt").write_bytes(before)
    run.saver.resume()
    run.position.batch, run.guard.in_row = 6, 3
    assert run.saver.good()["batch"] == 4
