# SPDX-License-Identifier: AGPL-3.0-or-later
"""Exit codes and messages of the command line; nothing a user can do wrong shows a traceback."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fsdet.cli._arguments import processes
from fsdet.cli.main import INTERRUPTED, PIPE_CLOSED, VERBS, main
from fsdet.errors import RunFailed, Stopped, UserError

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/demo/stage_1.yaml")


@pytest.fixture
def verb(monkeypatch):
    """A verb whose work is whatever the test says."""

    def install(work):
        module = importlib.import_module("fsdet.cli.info")
        monkeypatch.setattr(module, "parse", lambda parser, argv: None)
        monkeypatch.setattr(module, "run", lambda args: work())
        return ["info"]

    return install


def raising(error):
    def work():
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("expected x"), 2),
        (RunFailed("see report"), 1),
        (Stopped("saved", 15), 143),
        (Stopped("saved", 2), 130),
    ],
)
def test_an_error_of_ours_is_its_message_and_its_code(error, code, verb, capsys):
    assert main(verb(raising(error))) == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_interrupt_is_130(verb, capsys):
    assert main(verb(raising(KeyboardInterrupt()))) == INTERRUPTED == 130


def test_any_other_exception_is_a_bug_and_keeps_its_traceback(verb):
    with pytest.raises(ZeroDivisionError):
        main(verb(lambda: 1 / 0))


def test_a_reader_that_goes_away_is_no_traceback():
    command = f"'{sys.executable}' -m fsdet info '{CONFIG}' | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, cwd=ROOT / "src")
    assert done.stdout.strip() in ("0", str(PIPE_CLOSED)) and done.stderr == ""


def test_the_first_use_on_a_machine_prints_nothing_more_than_the_second(tmp_path):
    """Ultralytics makes its settings file then, and says so on stdout, in the midst of a YAML or JSON of ours."""
    command = [sys.executable, "-m", "fsdet", "info", CONFIG]
    environment = {**os.environ, "YOLO_CONFIG_DIR": str(tmp_path)}
    first, second = (subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT / "src",
                                    env=environment, check=True) for _ in range(2))  # fmt: skip
    assert any(tmp_path.rglob("settings.json"))
    assert first.stdout == second.stdout and first.stderr == second.stderr == ""


def test_help_lists_every_verb_and_each_verb_has_help(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for name, text in VERBS.items():
        assert name in listed and text in listed
        assert main([name, "--help"]) == 0
        assert "Example" in capsys.readouterr().out


def test_nothing_at_all_is_help_and_exit_2(capsys):
    assert main([]) == 2 and "usage: fsdet" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("fsdet ")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["trian"], "unknown command 'trian'. Did you mean 'train'?"),
        (["train"], "expected CONFIG or --resume"),
        (["train", "nowhere.yaml"], "got no file at 'nowhere.yaml'. The shipped ones are in configs/."),
        (["train", CONFIG, "optim.lrr=3"], "Did you mean 'lr'?"),
        (["train", CONFIG, "--resmue"], "Did you mean '--resume'?"),
        (["train", CONFIG, "extra"], "unrecognized arguments: extra"),
        (["train", "--resume", "no/such/run"], "expected a run folder, got nothing there"),
        (["check", CONFIG, "optim.lr=fast"], "expected a number"),
        (["probe"], "expected CONFIG, or --incident DIR"),
        (["probe", "--incident", "none"], "none/batch.pt: expected an incident's batch.pt, got nothing there"),
        (["info", "none.pt"], "got nothing there"),
        (["eval"], "expected CHECKPOINT, --table"),
        (["eval", "none.pt"], "none.pt: expected a checkpoint, got nothing there"),
        (["eval", "none.pt", "--shots", "1,x"], "expected numbers such as 1,3,5, got '1,x'"),
        (["eval", "none.pt", "--shots", "0"], "expected numbers from 1 up"),
        (["eval", "none.pt", "--seeds", "1,2"], "expected one number"),
        (["bank", "drop", "a.bank", "mug", "x"], "expected numbers such as 1,3,5, got 'x'"),
        (["bank", "drop", "a.bank", "mug", "0"], "expected numbers from 1 up, got '0'"),
        (["eval", "--table", "none.json"], "none.json: expected a results.json"),
        (["eval", "none.pt", "--device", "gpu"], "expected auto, cpu, mps, cuda or cuda:N, got 'gpu'"),
        (["register", "none.pt", "--support", "x", "--out", "b"], "expected a checkpoint"),
        (["predict", "none.pt", "--source", "x", "--out", "y"], "expected a checkpoint"),
        (["predict", "a", "--source", "x", "--out", "y", "--conf", "2"], "expected a number from 0 to 1, got '2'"),
        (["predict", "a", "--support", "s", "--bank", "b", "--source", "x", "--out", "y"], "not allowed with"),
        (["bank", "list", "none.bank"], "expected a bank file, got nothing there"),
        (["data"], "required: demo|check|shots|convert"),
        (["data", "check", "none"], "none: expected a data YAML"),
        (["data", "convert", "none", "out"], "required: --to"),
        (["data", "demo", str(ROOT / "configs")], "expected a new or empty folder"),
    ],
)
def test_a_slip_of_the_user_is_one_clear_message_and_exit_2(argv, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    message = capsys.readouterr().err
    assert told in message and message.startswith("error: ") and "Traceback" not in message
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_one_message(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    assert main(["data", "demo", "file/below"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "file" in told and "Traceback" not in told


def test_check_refuses_a_device_that_is_not_there_as_train_does(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["check", CONFIG, "run.device=cuda:63"]) == 2
    assert "run.device: expected a cuda device that exists" in capsys.readouterr().err


def test_torchrun_is_told_by_what_it_leaves_and_only_train_shares_work(monkeypatch, capsys):
    left = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "h"}
    assert [processes(e) for e in ({}, {"WORLD_SIZE": "4"}, left)] == [1, 1, 2]
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert main(["info", CONFIG]) == 2
    assert "torchrun with 2 processes: expected fsdet train, which alone shares its work" in capsys.readouterr().err
