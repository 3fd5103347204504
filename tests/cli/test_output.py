# SPDX-License-Identifier: AGPL-3.0-or-later
"""Streams that are closed, full or unread change nothing but what is seen."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.test_trainer import same
from fsdet.data.synthetic import draw_demo
from fsdet.engine.checkpoint import load

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
INFO = f"{sys.executable} -m fsdet info {ROOT / 'configs/demo/stage_1.yaml'}"
SMALL = ("data.image_size=96 data.support_size=64 data.workers=0 run.threads=1 model.embed_dim=16 episode.queries=2 "
         "optim.warmup_epochs=0 eval.every=0 optim.steps=2 log.every=1")  # fmt: skip


def shell(command: str, cwd: Path) -> tuple[int, str]:
    """(exit code, stderr) of a command line of a shell."""
    done = subprocess.run(["bash", "-c", command], cwd=cwd, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
                          stdout=subprocess.DEVNULL, timeout=110)  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">&-", ">&- 2>&- <&-"])
def test_a_verb_ends_well_with_streams_closed(tmp_path, streams):
    code, told = shell(f"{INFO} {streams}", tmp_path)
    assert code == 0 and "Traceback" not in told


def test_the_first_file_that_is_opened_does_not_become_stdout(tmp_path):
    """Or what is printed would be written into it."""
    code = "from fsdet.cli._output import open_streams; open_streams(); print('x'); file = open('f', 'w')"
    assert shell(f'{sys.executable} -c "{code}; assert file.fileno() > 2; print(1)" >&- <&-', tmp_path) == (0, "")
    assert (tmp_path / "f").read_text() == ""


def test_what_a_stream_cannot_write_is_an_escape_there(tmp_path):
    """Not every locale's UTF-8 takes the name of a file as it is; ASCII takes few names of classes."""
    code = r"from fsdet.cli._output import open_streams; open_streams(); print('caf\\xe9 \\udcff')"
    for encoding, wanted in (("utf-8:strict", "café \\udcff\n"), ("ascii:strict", "caf\\xe9 \\udcff\n")):
        done = subprocess.run([sys.executable, "-c", code.replace("\\\\", "\\")], cwd=tmp_path, capture_output=True,
                              env={**ENVIRONMENT, "PYTHONIOENCODING": encoding}, timeout=60)  # fmt: skip
        assert done.stdout.decode() == wanted, done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A data set and a run that nothing disturbed."""
    place = tmp_path_factory.mktemp("user")
    draw_demo(place / "demo", sizes={"train": 8, "val": 2, "test": 1, "support": 1}, processes=1)
    code, told = train(place, "undisturbed", "")
    assert code == 0, told
    return place


def train(place: Path, name: str, streams: str) -> tuple[int, str]:
    return shell(f"{sys.executable} -m fsdet train {ROOT / 'configs/demo/stage_1.yaml'} data.path=demo/data.yaml "
                 f"{SMALL} log.wandb.mode=disabled run.dir={name} {streams}", place)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("streams", [">&- 2>&- <&-", ">/dev/full 2>/dev/full", "2>&1 | true; exit ${PIPESTATUS[0]}"])
def test_a_training_is_the_undisturbed_one_whatever_becomes_of_its_words(place, streams):
    name = f"run{len(list(place.iterdir()))}"
    code, told = train(place, name, streams)
    assert code == 0, told
    one, other = (load(place / run / "last.pt") for run in ("undisturbed", name))
    assert same(one["model"], other["model"]) and one["step"] == other["step"] == 2
    lines = [(place / run / "metrics.jsonl").read_text() for run in ("undisturbed", name)]
    assert lines[0] == lines[1]
