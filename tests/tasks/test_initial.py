# SPDX-License-Identifier: AGPL-3.0-or-later
"""Stage 3 takes its instances from any shot file that has its K; a stage takes what corrects from the one before."""

import json

import pytest
import torch

from fsdet import config as configs
from fsdet.data import sources
from fsdet.data.shots import ShotFile, as_shots
from fsdet.errors import CheckpointError, ConfigError, DataError
from fsdet.tasks import build, build_task, read_data, recipe
from fsdet.tasks.fewshot import spec_of
from fsdet.tasks.initial import shots_of


@pytest.fixture
def support(small_demo):
    """(data set, {novel class of the demo: its first two instances}), of the classes that have two in the support."""
    data = sources.load(small_demo)
    rows: dict[int, list] = {c: [] for c in range(data.num_base, len(data.names))}
    for i, record in enumerate(data.split("support")):
        for j, label in enumerate(record.labels.tolist()):
            if label in rows and not record.crowd[j]:
                rows[label].append((i, j))
    return data, {c: found[:2] for c, found in rows.items() if len(found) > 1}


@pytest.mark.parametrize("unit", ["instance", "image"])
def test_stage_3_reads_files_of_both_units(support, settings, tmp_path, unit):
    data, found = support
    drawn = ShotFile.draw(data, [1], 7, classes=[data.names[c] for c in found], unit=unit)
    drawn.save(tmp_path / "s.json")
    picks, split = shots_of(settings("episode.shots=1", f"data.shots={tmp_path / 's.json'}"), data)
    assert split == "support" and picks == drawn.picks(data, 1) and set(picks) == set(found)


def test_stage_3_takes_the_list_of_its_k_and_no_other(support, settings, tmp_path):
    data, found = support
    records = data.split("support")
    lists = {k: {data.names[c]: as_shots(data, records, rows[-k:]) for c, rows in found.items()} for k in (1, 2)}
    published = ShotFile(data.names, (1, 2), 0, "support", lists, nested=False, sampler="tfa-coco")
    published.save(tmp_path / "s.json")
    told = f"data.shots={tmp_path / 's.json'}"
    assert shots_of(settings("episode.shots=1", told), data)[0] == {c: rows[1:] for c, rows in found.items()}
    assert shots_of(settings("episode.shots=2", told), data)[0] == found
    with pytest.raises(DataError, match="a list of 3 shots, got lists of 1, 2"):
        shots_of(settings("episode.shots=3", told), data)


OFF = ("model.refine=false", "model.objectness=false")
EPISODES = ("stage.name=episodic", "episode.ways=2", "episode.shots=1")


def test_what_corrects_may_come_in_with_the_episodes_and_is_not_dropped(settings, best, tmp_path):
    told = f"stage.init_from={best}"
    with pytest.raises(CheckpointError, match=r"model\.refine true there, false here; model\.objectness true there"):
        build(settings(*EPISODES, told, *OFF))
    first = build(settings("optim.steps=1", *OFF, f"run.dir={tmp_path / 'plain'}")).fit().best
    config = settings(*EPISODES, f"stage.init_from={first}")
    task, report = build_task(config, read_data(config), resume=False)
    assert "10 start fresh (head.objectness.0.bias" in report
    assert task.model.head.refine[-1].weight.abs().sum() == 0, "as if it were not there"


@pytest.mark.parametrize(
    ("given", "few", "many"), [("auto", False, True), ("true", True, True), ("false", False, False)]
)
def test_auto_takes_what_corrects_where_base_classes_are_many(settings, given, few, many):
    for key in ("refine", "objectness"):
        other = {"refine": "objectness", "objectness": "refine"}[key]
        config = settings(f"model.{key}={given}", f"model.{other}=false")
        assert bool(spec_of(config, 63, 63).get(key)) is few and bool(spec_of(config, 64, 64).get(key)) is many
        assert bool(spec_of(config, 80, 63).get(key)) is few, "novel classes of stage 3 have taught nothing before"
        assert other not in spec_of(config, 80, 80)
    with pytest.raises(ConfigError, match=r"model\.refine"):
        settings("model.refine=perhaps")


def test_a_run_of_before_these_keys_resumes(settings, tmp_path):
    build(settings(*OFF)).fit()
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)
    assert not {"refine", "objectness"} & set(state["spec"]["model"])
    for key in ("refine", "objectness"):
        del state["config"]["model"][key]
    for path in (tmp_path / "run").glob("*.pt"):
        torch.save(state, path)
    (tmp_path / "run/manifest.json").unlink()
    build(settings(*OFF), resume=True)
    with pytest.raises(CheckpointError, match=r"another: model\.refine None -> True, model\.objectness None -> True"):
        build(settings(), resume=True)


def test_a_start_from_a_run_that_was_left_before_its_end_is_told(settings, tmp_path, caplog):
    """Its folder says so; where a run has ended, and where a checkpoint lies alone, there is nothing to tell."""
    folder = tmp_path / "run before"
    first = build(settings("optim.steps=1", f"run.dir={folder}")).fit().best
    config = settings(f"stage.init_from={first}")
    manifest = folder / "manifest.json"
    ended = manifest.read_text()
    for content, told in ((ended, 0), (json.dumps(json.loads(ended) | {"finished": False}), 1), (None, 0)):
        caplog.clear()
        manifest.write_text(content) if content else manifest.unlink()
        build_task(config, read_data(config), resume=False)
        found = [r.getMessage() for r in caplog.records if "has not come to its end" in r.getMessage()]
        assert len(found) == told
        assert all(f"{first} is of a run" in text and f"--resume '{folder}'" in text for text in found)


@pytest.mark.parametrize("stage", [("stage.name=base",), EPISODES, ("stage.name=finetune", "episode.shots=1",
                                                                    "stage.recipe=auto")])  # fmt: skip
def test_a_run_folder_stands_for_its_best_checkpoint(settings, best, monkeypatch, stage):
    """It is named where the weights come from; config.yaml has what was given, and resumes."""
    seen = []
    monkeypatch.setattr(recipe, "rehearse", lambda trained, *_: seen.append(trained.path) or 1.0)
    config = settings(*stage, f"stage.init_from={best.parent}", "optim.steps=1")
    trainer = build(config)
    assert f"init_from {best}: " in trainer.init_report and seen in ([], [best])
    folder = trainer.fit().folder
    again = configs.load(folder / "config.yaml", ["optim.steps=2"])
    assert again.stage.init_from == str(best.parent) and build(again, resume=True).fit().steps == 2


def test_a_folder_without_a_best_checkpoint_is_told(settings, tmp_path):
    with pytest.raises(CheckpointError, match=r"best\.pt: expected a checkpoint file, got nothing there"):
        build(settings(f"stage.init_from={tmp_path}"))


def test_a_run_folder_of_another_task_stands_for_its_best_checkpoint_too(of_task, tmp_path):
    best = build(of_task("classifier", "optim.epochs=1")).fit().best
    config = of_task("classifier", f"stage.init_from={best.parent}", f"run.dir={tmp_path / 'two'}")
    _, report = build_task(config, read_data(config), resume=False)
    assert report.endswith(f"tensors from {best}")
