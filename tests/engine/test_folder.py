# SPDX-License-Identifier: AGPL-3.0-or-later
"""A run folder belongs to one process at a time; a process that was killed holds nothing."""

import subprocess
import sys

import pytest

from fsdet.engine import folder
from fsdet.errors import ConfigError

HOLD = """
import sys, time
from pathlib import Path
from fsdet.engine import folder
with folder.held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that trains into tmp_path."""
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.mark.parametrize(("resume", "exist_ok"), [(False, False), (True, False), (False, True)])
def test_a_folder_that_another_process_trains_into_is_refused_before_anything_is_removed(other, tmp_path, resume,
                                                                                         exist_ok):  # fmt: skip
    half = tmp_path / ".last.pt.tmp"
    half.write_bytes(b"half a checkpoint")
    for ask in (lambda: folder.claim(tmp_path, resume, exist_ok), lambda: folder.held(tmp_path).__enter__()):
        with pytest.raises(ConfigError, match=r"got a training under way.* run.dir= names another"):
            ask()
    assert half.read_bytes() == b"half a checkpoint"
    other.kill()
    other.wait()
    assert (tmp_path / folder.RUNNING).exists(), "what a killed process leaves"
    folder.claim(tmp_path, resume, exist_ok)
    with folder.held(tmp_path):
        assert not half.exists()
    assert not (tmp_path / folder.RUNNING).exists()


def test_where_the_file_system_knows_no_locks_a_folder_is_anybodys(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no locks available")

    monkeypatch.setattr("fcntl.lockf", refuse)
    with folder.held(tmp_path):
        assert (tmp_path / folder.RUNNING).exists()
    assert not (tmp_path / folder.RUNNING).exists()
