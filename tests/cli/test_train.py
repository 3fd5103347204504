# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet train`: which configuration is trained, and what --resume means."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from fsdet import config, tasks
from fsdet.cli import train
from fsdet.cli.main import main


@dataclass(frozen=True)
class Result:
    folder: Path
    steps: int = 7


@pytest.fixture
def built(monkeypatch, tmp_path):
    """What tasks.build was called with, in an empty working folder; nothing is trained."""
    calls = []

    def build(settings, *, resume, exist_ok, peers):
        assert peers.alone
        calls.append((settings, resume, exist_ok))
        parts = {"fit": lambda self: Result(Path(settings.run.dir)), "controller": SimpleNamespace(step=3)}
        return type("Trainer", (), parts)()

    monkeypatch.setattr(tasks, "build", build)
    monkeypatch.chdir(tmp_path)
    Path("c.yaml").write_text("run: {dir: checkpoints/a, seed: 5}\n", encoding="utf-8")
    return calls


def a_run(name: str, finished: bool, age: int) -> Path:
    folder = Path("checkpoints") / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        config.dump(config.load(None, [f"run.dir={folder}", f"run.seed={age}"])), "utf-8"
    )
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "finished": finished, "files": {}}), "utf-8")
    (folder / "last.pt").write_bytes(b"")
    os.utime(folder / "last.pt", (1e9 - age, 1e9 - age))
    return folder


def test_overrides_may_stand_anywhere_among_the_arguments(built, capsys):
    assert main(["train", "run.seed=1", "c.yaml", "--exist-ok", "optim.lr=1e-3", "optim.min_lr=0"]) == 0
    settings, resume, exist_ok = built[0]
    assert (settings.run.seed, settings.optim.lr, resume, exist_ok) == (1, 1e-3, False, True)
    assert "7 steps; run folder: checkpoints/a" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv",
    [
        ["c.yaml", "--resume"],
        ["--resume", "c.yaml"],
        ["c.yaml", "--resume", "run.seed=5"],
        ["--resume", "run.seed=5", "c.yaml"],
    ],
)
def test_resume_beside_a_config_means_its_run_dir_and_never_an_override(argv, built):
    assert main(["train", *argv]) == 0
    settings, resume, _ = built[0]
    assert (settings.run.dir, settings.run.seed, resume) == ("checkpoints/a", 5, True)


@pytest.mark.parametrize("named", ["checkpoints/old", "checkpoints/old/last.pt"])
def test_resume_of_a_run_reads_its_own_config_under_the_overrides(named, built):
    a_run("old", finished=False, age=3)
    assert main(["train", "--resume", named, "run.threads=2"]) == 0
    settings, resume, _ = built[0]
    assert (settings.run.dir, settings.run.seed, settings.run.threads, resume) == ("checkpoints/old", 3, 2, True)


def test_resume_alone_takes_the_newest_unfinished_run(built):
    a_run("newest", finished=True, age=0)
    a_run("newer", finished=False, age=1)
    a_run("older", finished=False, age=2)
    assert main(["train", "--resume"]) == 0
    assert built[0][0].run.dir == "checkpoints/newer"


def test_resume_alone_takes_run_dir_when_it_is_given(built):
    a_run("newer", finished=False, age=1)
    a_run("older", finished=False, age=2)
    assert main(["train", "--resume", "run.dir=checkpoints/older"]) == 0
    assert (built[0][0].run.dir, built[0][0].run.seed) == ("checkpoints/older", 2)


def test_nothing_to_resume_is_told(built, capsys):
    a_run("done", finished=True, age=0)
    assert main(["train", "--resume"]) == 2
    assert "checkpoints: expected an unfinished run to resume, got none" in capsys.readouterr().err and built == []


def test_a_run_folder_without_config_is_told(built, capsys):
    Path("empty").mkdir()
    assert main(["train", "--resume", "empty"]) == 2
    assert "expected the run's config.yaml" in capsys.readouterr().err


def test_newest_unfinished_looks_only_at_runs(built):
    (Path("checkpoints") / "notes").mkdir(parents=True)
    folder = a_run("one", finished=False, age=9)
    assert train.newest_unfinished(Path("checkpoints")) == folder


def test_a_checkpoint_that_is_not_the_newest_is_told_to_stand_for_its_run(built, capsys):
    folder = a_run("b", False, 1)
    (folder / "step_00000002.pt").write_bytes(b"")
    assert main(["train", "--resume", str(folder / "step_00000002.pt")]) == 0
    told = capsys.readouterr().out
    assert "goes on from its newest checkpoint, last.pt" in told and "stage.init_from=" in told
    assert main(["train", "--resume", str(folder / "last.pt")]) == 0 and "newest" not in capsys.readouterr().out
