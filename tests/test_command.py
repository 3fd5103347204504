# SPDX-License-Identifier: AGPL-3.0-or-later
"""A told command runs when it is pasted."""

import ast
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


def test_values_are_one_word_each_whatever_they_hold():
    told = typed("fsdet train --resume {} data.path={}", Path("runs/my run"), "a'b; rm {}")
    assert shlex.split(told)[3:] == ["train", "--resume", "runs/my run", "data.path=a'b; rm {}"]


def test_no_path_is_written_into_a_command_unquoted():
    """As `typed(f"... {path}")` would."""
    root = Path(__file__).resolve().parents[1]
    files = [*root.glob("src/**/*.py"), *root.glob("scripts/**/*.py")]
    calls = [(file.name, node.lineno, node.args[0]) for file in files
             for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
             if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "typed"]  # fmt: skip
    assert len(calls) > 15
    assert [call for call in calls if isinstance(call[2], ast.JoinedStr)] == []


def test_what_is_told_runs(monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[1] / "src")
    done = subprocess.run(["bash", "-c", typed("fsdet --version")], capture_output=True, text=True)
    assert done.stdout == f"fsdet {__version__}\n"
