# SPDX-License-Identifier: AGPL-3.0-or-later
"""W&B and TensorBoard show what metrics.jsonl says, in every stage; panels and the sweep name what exists."""

import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from engine.test_runlog import inspected
from engine.test_trainer import rows
from fsdet import config, yaml_strict
from fsdet.tasks import build
from tasks import conftest as small_world

small_demo = small_world.small_demo  # the fixture
ROOT = Path(__file__).resolve().parents[1]
FIGURES = {"train_step/total_loss": "total", "train_step/grad_norm": "grad_l2_preclip",
           "train_step/grad_l2_preclip": "grad_l2_preclip", "train_step/grad_l2_postclip": "grad_l2_postclip",
           "train_step/clip_ratio": "clip_ratio", "train_step/loss_scale": "loss_scale"}  # fmt: skip
ALL_LOSSES = ["loss.weights.supcon=0.1", "loss.weights.cpe=0.1", "loss.weights.triplet=0.1"]
STAGES = {
    "base": [],
    "episodic": ["stage.name=episodic", "episode.ways=3", "episode.shots=2"],
    "finetune": ["stage.name=finetune", "episode.shots=2", "stage.freeze=[backbone]"],
}


@pytest.fixture(scope="module")
def dashboard():
    """scripts/dashboard.py as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        yield importlib.import_module("dashboard")


def figures(row: dict) -> dict[str, float]:
    """What W&B and TensorBoard have to show of a step's row, by the names of the contract."""
    out = {key: row[name] for key, name in FIGURES.items()}
    out |= {f"train_step/{name}_loss": value for name, value in row["raw"].items()}
    out |= {f"train_step/weighted/{name}": value for name, value in row["weighted"].items()}
    return out | {f"train_step/lr/{group}": value for group, value in row["lr"].items()}


def history(folder: Path) -> list[dict]:
    """Every record that W&B keeps of the run's curves and pictures."""
    records = [json.loads(line) for line in inspected(folder).splitlines()]
    return [record["history"]["item"] for record in records if record["type"] == "history"]


@pytest.fixture(scope="module", params=STAGES)
def stage(request, small_demo, tmp_path_factory) -> Path:
    """Four steps of a stage with every sink on."""
    folder = tmp_path_factory.mktemp("stages") / request.param
    options = [*ALL_LOSSES, "optim.steps=4", "episode.per_epoch=2", "eval.every=1", "log.every=1",
               "log.tensorboard=true", "log.probe_every=2", "log.wandb.mode=offline",
               *STAGES[request.param]]  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if request.param == "finetune":
            before = build(small_world.small(small_demo, folder.with_name("before"))).fit().best
            options.append(f"stage.init_from={before}")
        build(small_world.small(small_demo, folder, *options)).fit()
    return folder


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore")
def test_an_offline_run_of_each_stage_shows_what_metrics_jsonl_says(stage, dashboard):
    seen = history(stage)
    steps = {item["train_step/global_step"]: item for item in seen if "train_step/total_loss" in item}
    logged = {row["step"]: figures(row) for row in rows(stage, "step")}
    assert sorted(steps) == sorted(logged) == [1, 2, 3, 4]
    for step, wanted in logged.items():
        assert {key: steps[step].get(key) for key in wanted} == pytest.approx(wanted, rel=1e-12), step
    judged = [item for item in seen if any(key.startswith("val/") for key in item)]
    assert len(judged) == len(rows(stage, "val")) == 2
    for item, row in zip(judged, rows(stage, "val"), strict=True):
        wanted = {key: value for key, value in row.items() if key.startswith("val/") and value is not None}
        assert wanted and {key: item.get(key) for key in wanted} == pytest.approx(wanted)
        assert item["epoch"] == row["epoch"]
    for row in rows(stage, "probe"):
        (item,) = [i for i in seen if f"probe/{row['name']}/norm" in i and i["train_step/global_step"] == row["step"]]
        assert item[f"probe/{row['name']}/norm"] == pytest.approx(row["norm"])
    tensorboard_agrees(stage, logged)
    pictures_are_there(stage, seen)
    keys = {shown for item in seen for key in item for shown in (key, key.partition(".")[0])}  # pictures are nested
    named = {key for panels in dashboard.SECTIONS.values() for panel in panels for key in panel.keys}
    assert named - keys <= ({key for key in named if "by_prototype" in key} if stage.name != "episodic" else set())
    for panel in (panel for panels in dashboard.SECTIONS.values() for panel in panels if panel.regex):
        assert any(re.fullmatch(panel.regex, key) for key in keys), panel.regex


def tensorboard_agrees(folder: Path, logged: dict[int, dict[str, float]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    for key in logged[1]:
        shown = {event.step: event.value for event in events.Scalars(key)}
        assert shown == pytest.approx({step: values[key] for step, values in logged.items()}, rel=1e-6), key
    for name in {key for row in rows(folder, "val") for key in row if key.startswith("val/")}:
        told = [row[name] for row in rows(folder, "val")]
        assert [event.value for event in events.Scalars(name)] == pytest.approx(told, rel=1e-6)
    assert len(events.Images("media/episodes")) == 2


def pictures_are_there(folder: Path, seen: list[dict]) -> None:
    """Both evaluations show the same validation images, with as many true boxes as the list beside the sheet says."""
    shown = [item for item in seen if any(key.partition(".")[0] == "media/validation" for key in item)]
    lists = [json.loads(path.read_text()) for path in sorted((folder / "episodes").glob("step_*.json"))]
    assert len(shown) == len(lists) == 2
    first, second = ([image["path"] for image in content["images"]] for content in lists)
    assert first == second and first
    media = next(folder.glob("wandb/offline-run-*/files/media"))
    files = list((media / "metadata/boxes2D").rglob("*.json"))
    drawn = sum(len(json.loads(path.read_text())["box_data"]) for path in files)
    images = [image for content in lists for image in content["images"]]
    assert drawn == sum(len(image["true"]) + len(image["found"]) for image in images) > 0
    assert {path.suffix for path in (media / "images/media").glob("validation*")} == {".jpg"}


def test_panels_are_placed_without_overlap_and_told_in_words(dashboard, capsys):
    for panels in dashboard.SECTIONS.values():
        places = dashboard.places(panels)
        taken = [(x + i, y) for panel, (x, y) in zip(panels, places, strict=True) for i in range(panel.width)]
        assert len(taken) == len(set(taken)) and max(x for x, _ in taken) < dashboard.FULL
    assert dashboard.main([]) == 0
    assert "train_step/grad_norm" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        dashboard.main(["--check"])
    assert "expected --entity" in capsys.readouterr().err


def test_a_missing_extra_is_told(dashboard, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert dashboard.main(["--entity", "me", "--check"]) == 2
    assert 'pip install -e ".[dashboard]"' in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_the_workspace_is_built_offline(dashboard, capsys):
    pytest.importorskip("wandb_workspaces", reason="the extra dashboard is not installed")
    assert dashboard.main(["--entity", "me", "--check"]) == 0
    built = json.loads(capsys.readouterr().out)
    sections = built["spec"]["section"]["panelBankConfig"]["sections"]
    assert [s["name"] for s in sections if s["panels"]] == list(dashboard.SECTIONS)
    text = json.dumps(built)
    for panels in dashboard.SECTIONS.values():
        for panel in panels:
            assert all(f'"{key}"' in text for key in panel.keys) and json.dumps(panel.title) in text


def agent_line(values: dict) -> list[str]:
    """The command of the sweep as W&B's agent makes it of drawn values."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    sweep = yaml_strict.parse((ROOT / "configs/sweep.yaml").read_text(encoding="utf-8"), "sweep.yaml").value
    filled = create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    out = []
    for word in create_sweep_command(sweep["command"]):
        out += filled[word[2:-1]] if word.startswith("${") and word[2:-1] in filled else [word]
    return out


def test_the_sweep_starts_runs_that_the_configuration_takes(tmp_path):
    sweep = yaml_strict.parse((ROOT / "configs/sweep.yaml").read_text(encoding="utf-8"), "sweep.yaml")
    assert sweep.problems == [] and sweep.value["metric"]["name"] == "val/fitness"
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(0o755)
    for pick in (0, -1):  # the least and the most of every parameter
        values = {k: float(p["min"] if pick == 0 else p["max"]) if "min" in p else p["values"][pick]
                  for k, p in sweep.value["parameters"].items()}  # fmt: skip
        done = subprocess.run(agent_line(values), capture_output=True, text=True, check=True, timeout=20,
                              env={**os.environ, "FSDET_PYTHON": str(fake), "WANDB_RUN_ID": "ab12"})  # fmt: skip
        module, name, verb, path, *overrides = done.stdout.split()
        assert (module, name, verb) == ("-m", "fsdet", "train")
        settings = config.load(ROOT / path, overrides)
        assert settings.run.dir == "checkpoints/sweep/ab12" and settings.optim.lr == values["optim.lr"]
        assert settings.log.wandb.mode == "online" and len(overrides) == len(values) + 2
