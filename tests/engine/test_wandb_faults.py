# SPDX-License-Identifier: AGPL-3.0-or-later
"""A W&B server that is broken in any way costs a training a warning and nothing else; the run can be sent later."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from engine.test_runlog import rows
from engine.toy import ToyTask, trainer
from engine.wandb_stub import Stub
from fsdet.config import Log, Wandb
from fsdet.engine import runlog

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
STEPS = 10


def play(mood, when, folder):
    """In a process of its own, as wandb's helper is one a process: train while the server is in that mood."""
    told = []
    heard = logging.Handler(logging.WARNING)
    heard.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("fsdet").addHandler(heard)
    if when != "later":  # a server that works is waited for, however busy the machine is
        runlog.INIT_SECONDS = 3.0
    with Stub("fine" if when == "later" else mood) as stub:
        os.environ["WANDB_BASE_URL"] = stub.url

        def spoil(batch, report):
            if batch.index == 4 and when == "later":
                strike(stub, mood)
            return report

        result = trainer(ToyTask(spoil=spoil), Path(folder), log=Log(every=1, wandb=Wandb(mode="auto"))).fit()
    print(json.dumps({"steps": result.steps, "told": told, "asked": stub.requests}))


def strike(stub, mood):
    if mood == "dies":
        stub.die()
    elif mood == "helper killed":
        helpers = [c for c in psutil.Process().children(recursive=True) if c.name().startswith("wandb")]
        assert helpers
        for helper in helpers:
            helper.kill()
    else:
        stub.mood = mood


def in_a_process(mood, when, folder):
    """What `play` says, and the whole output."""
    code = f"import sys; sys.path[:0] = {sys.path!r}\n"
    code += f"from engine.test_wandb_faults import play; play({mood!r}, {when!r}, {str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], env=environment(folder), text=True, capture_output=True,
                          timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout + done.stderr


def environment(folder, **more):
    """A key, and none of the user's settings, nor the helper process of a run that this one has had."""
    known = {name: value for name, value in os.environ.items() if "WANDB_SERVICE" not in name}
    own = {f"WANDB_{name}_DIR": str(folder) + ".home" for name in ("CONFIG", "CACHE", "DATA")}
    return {**known, **own, "WANDB_API_KEY": "a" * 40, "OMP_NUM_THREADS": "1", **more}


def sent_later(folder):
    """The steps that a server which works gets from `wandb sync` of the run's folder."""
    run = next(iter([*folder.glob("wandb/offline-run-*"), *folder.glob("wandb/run-*")]))
    with Stub() as stub:
        command = [sys.executable, "-m", "wandb", "sync", "--no-skip-online", str(run)]
        done = subprocess.run(command, env=environment(folder, WANDB_BASE_URL=stub.url), text=True, timeout=120,
                              capture_output=True)  # fmt: skip
        stub.wait_for(STEPS)
    assert done.returncode == 0, done.stdout + done.stderr
    return [row["train_step/global_step"] for row in stub.history if "train_step/total_loss" in row]


@pytest.mark.parametrize("mood", ["black_hole", "error"])
def test_a_server_that_is_broken_at_the_start_makes_an_offline_run_that_can_be_sent_later(tmp_path, mood):
    run = tmp_path / "r"
    said, output = in_a_process(mood, "from the start", run)
    assert said["steps"] == STEPS and said["asked"] and "Traceback" not in output
    assert [row["step"] for row in rows(run, "step")] == list(range(1, STEPS + 1))
    (told,) = said["told"]
    assert "cannot start online" in told and "logging offline instead" in told
    assert list(run.glob("wandb/offline-run-*")) and sent_later(run) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("mood", ["black_hole", "dies"])
def test_a_server_that_breaks_during_the_run_leaves_it_complete_on_disk(tmp_path, mood):
    run = tmp_path / "r"
    said, output = in_a_process(mood, "later", run)
    assert said["steps"] == STEPS and "Traceback" not in output
    assert [row["step"] for row in rows(run, "step")] == list(range(1, STEPS + 1))
    assert sent_later(run) == list(range(1, STEPS + 1))


def test_a_helper_process_that_is_killed_costs_a_warning(tmp_path):
    """As by the kernel when memory is short, or by a crash of its own."""
    said, _ = in_a_process("helper killed", "later", tmp_path / "r")
    assert said["steps"] == STEPS and len(rows(tmp_path / "r", "step")) == STEPS
    assert len([text for text in said["told"] if "W&B stopped working" in text]) == 1
