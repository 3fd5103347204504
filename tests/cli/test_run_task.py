# SPDX-License-Identifier: AGPL-3.0-or-later
"""scripts/run_task.py brings another task about from whatever is missing."""

import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest

from fsdet import config
from fsdet.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    yield importlib.import_module("run_task")
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture
def called(script, monkeypatch, tmp_path):
    """The commands that were run, in an empty folder; training leaves a checkpoint, drawing a data set."""
    commands = []
    monkeypatch.chdir(tmp_path)

    def fsdet(argv):
        commands.append(argv)
        if argv[0] == "data":
            Path(argv[2]).mkdir(parents=True)
            Path(argv[2], "data.yaml").write_text("train: train\ntest: test\n")
        if argv[0] == "train":
            settings = config.load(argv[1], [w for w in argv[2:] if "=" in w])
            folder = Path(settings.run.dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(config.dump(settings))
            (folder / "last.pt").write_bytes(b"")
            (folder / "manifest.json").write_text(json.dumps({"finished": True}))
        return 0

    monkeypatch.setattr(script, "fsdet", fsdet)
    return commands


@pytest.mark.parametrize(("task", "file", "run", "demo"), [
    ("classifier", "docuforge.yaml", "documents", "documents"), ("maskrcnn", "maskrcnn.yaml", "instances", "instances"),
])  # fmt: skip
def test_from_nothing_it_draws_trains_and_judges_and_afterwards_only_judges(script, called, task, file, run, demo):
    assert script.main([task]) == 0
    assert [c[0] for c in called] == ["data", "train", "eval"]
    assert called[0] == ["data", "demo", f"datasets/{demo}", "--task", task]
    assert Path(called[1][1]).name == file and "--resume" not in called[1]
    assert called[2][1:4] == [f"checkpoints/{run}/best.pt", "--split", "test"]
    called.clear()
    assert script.main([task]) == 0 and [c[0] for c in called] == ["eval"]
    called.clear()
    Path(f"checkpoints/{run}/manifest.json").write_text(json.dumps({"finished": False}))
    assert script.main([task]) == 0 and "--resume" in called[0]


@pytest.mark.parametrize(("task", "splits", "asked", "split"), [
    ("maskrcnn", "train val test", "val", "val"), ("maskrcnn", "train val", "test", "val"),
    ("maskrcnn", "train", "test", "train"), ("classifier", "train", "test", "val"),
    ("classifier", "train test", "test", "test"),
])  # fmt: skip
def test_the_split_that_is_asked_for_is_judged_or_one_that_is_there(script, called, task, splits, asked, split, capsys):
    Path("data.yaml").write_text("".join(f"{name}: {name}\n" for name in splits.split()))
    assert script.main([task, "data.path=data.yaml", f"eval.split={asked}"]) == 0
    assert called[-1][2:4] == ["--split", split]
    told = capsys.readouterr().out
    assert (f"no split {asked}: split {split} is judged" in told) == (split != asked)
    assert ("the training has seen" in told) == (split == "train")


def test_a_finished_run_of_other_settings_is_not_passed_off_as_the_answer(script, called, capsys):
    """Refused with exit 2, and nothing is called; what does not shape the result may differ, and --exist-ok trains."""
    assert script.main(["classifier"]) == 0
    called.clear()
    assert script.guarded(lambda: script.main(["classifier", "optim.lr=0.5"])) == 2 and called == []
    told = capsys.readouterr().err
    assert "optim.lr" in told and "-> 0.5" in told and "--exist-ok" in told
    assert script.main(["classifier", "data.workers=1", "log.every=3"]) == 0 and [c[0] for c in called] == ["eval"]
    called.clear()
    assert script.main(["classifier", "--exist-ok", "optim.lr=0.5"]) == 0 and "--exist-ok" in called[0]
    Path("checkpoints/documents/config.yaml").unlink()
    assert script.guarded(lambda: script.main(["classifier"])) == 2 and "config.yaml" in capsys.readouterr().err


def test_the_commands_that_are_told_can_be_pasted(script, called, capsys):
    assert script.main(["classifier", "run.dir=my runs/one"]) == 0
    told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("== train: fsdet "))
    assert shlex.split(told.partition("fsdet ")[2]) == [str(word) for word in called[1]]


def test_the_head_multiplier_is_that_of_every_part_but_the_backbone(script):
    for task, parts in (("maskrcnn", {"rpn", "box_head", "mask_head"}), ("classifier", {"classifier"})):
        request = script.requested(task, ["--lr", "5e-3", "--head-lr-multiplier", "5", "--batch_size", "3"])
        got = config.load(request.config, request.overrides)
        assert got.task == task and got.optim.lr == 5e-3 and got.episode.queries == 3
        assert {part for part, scale in got.optim.lr_scale.items() if scale == 5} == parts
    request = script.requested("maskrcnn", ["--head-lr-multiplier", "5", "optim.lr_scale.rpn=1"])
    assert config.load(request.config, request.overrides).optim.lr_scale["rpn"] == 1, "key=value wins over a flag"


def test_a_configuration_of_another_task_is_refused(script, called):
    with pytest.raises(ConfigError, match="expected task: maskrcnn, got classifier"):
        script.main(["maskrcnn", str(ROOT / "configs/docuforge.yaml")])
    assert called == []
