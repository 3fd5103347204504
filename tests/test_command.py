# SPDX-License-Identifier: AGPL-3.0-or-later
"""A told command runs when it is pasted."""

import shlex
import subprocess
import sys
from pathlib import Path

from fsdet import __version__
from fsdet.command import typed


def test_the_interpreter_is_relative_below_the_folder_and_whole_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv/bin/python"))
    assert typed("fsdet report runs/a") == ".venv/bin/python -m fsdet report runs/a"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert typed("fsdet report runs/a") == f"{tmp_path}/.venv/bin/python -m fsdet report runs/a"


def test_a_path_with_a_space_is_one_word(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", "/some folder/python")
    assert shlex.split(typed("fsdet --version")) == ["/some folder/python", "-m", "fsdet", "--version"]


def test_what_is_told_runs(monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[1] / "src")
    done = subprocess.run(["bash", "-c", typed("fsdet --version")], capture_output=True, text=True)
    assert done.stdout == f"fsdet {__version__}\n"
