# SPDX-License-Identifier: AGPL-3.0-or-later
"""stage.recipe: auto follows the rehearsal, a resumed run keeps its choice, base images are not given up untold."""

import numpy as np
import pytest
import torch

from fsdet import config as configs
from fsdet import tasks
from fsdet.data.shots import draw_shots
from fsdet.data.sources import load
from fsdet.data.store import ImageStore
from fsdet.errors import ConfigError
from fsdet.tasks import recipe, rehearsal
from fsdet.tasks.loading import load_trained

STAGE_3 = ("stage.name=finetune", "episode.shots=1", "stage.recipe=auto")


@pytest.fixture
def told(settings, best, monkeypatch):
    """A stage-3 config whose rehearsal reaches what it is told."""

    def make(ap50, *overrides):
        monkeypatch.setattr(recipe, "rehearse", lambda *_: ap50)
        config = settings(*STAGE_3, f"stage.init_from={best}", "optim.steps=4", *overrides)
        return tasks.build_task(config, tasks.read_data(config), resume=False)

    return make


def test_classes_that_carry_over_keep_the_file_and_slow_the_backbone(told):
    task, report = told(recipe.CARRIES_OVER, "optim.lr_scale={head: 2}")
    optim = recipe.applied(task.config).optim
    assert optim.lr_scale == {"backbone": 0.5, "head": 2} and optim.steps == 4
    assert f"recipe near: registration alone finds copies of the shots with AP50 {recipe.CARRIES_OVER:.3f}" in report
    rates = {g["group"]: g["base_lr"] for g in tasks.trainer_of(task, report).optimizer.param_groups}
    assert rates["backbone"] == 0.5 * rates["neck"] == 0.25 * rates["head"]


def test_a_lr_scale_of_the_users_own_stays(told):
    task, _ = told(0.9, "optim.lr_scale={backbone: 0.1}")
    assert recipe.applied(task.config).optim.lr_scale == {"backbone": 0.1}


def test_other_classes_move_everything_faster_and_longer_on_more_of_their_own_images(told):
    task, report = told(0.1, "optim.lr=0.01", "optim.muon_lr=0.02", "data.augment.paste=0.6", "data.augment.whole=0.1")
    used = recipe.applied(task.config)
    assert (used.optim.lr, used.optim.muon_lr, used.optim.steps, used.optim.lr_scale) == (0.02, 0.04, 6, {})
    mix = used.data.augment
    assert (mix.paste, mix.whole, mix.pastes, mix.match_size) == (0.35, 0.4, 3, 0.0) and "recipe far" in report
    assert task.batches.config == used, "the batches follow the recipe too"
    assert task.config.optim.steps == 4 and task.config.stage.recipe == "far", "config.yaml keeps the file's values"
    assert tasks.trainer_of(task, report).total_steps == 6


def test_many_shots_of_other_classes_take_twice_that_time(told, monkeypatch):
    task, report = told(0.1)
    assert task.config.stage.recipe == "far", "one shot a class is few"
    monkeypatch.setattr(recipe, "FEW", 0)
    task, report = told(0.1)
    assert task.config.stage.recipe == "far_long" and recipe.applied(task.config).optim.steps == 12
    assert "recipe far_long" in report and "longer still" in report
    mix = recipe.applied(task.config).data.augment
    assert (mix.paste, mix.whole, mix.pastes, mix.match_size) == (0.5, 0.3, 3, 0.0)
    task, _ = told(0.9)
    assert task.config.stage.recipe == "near", "classes that carry over need no more"


def test_epochs_grow_where_the_length_is_in_epochs():
    optim = recipe.applied(configs.load(None, [*STAGE_3, "stage.recipe=far", "optim.epochs=3"])).optim
    assert optim.epochs == 4.5 and optim.steps is None


@pytest.mark.parametrize("again", ["its file", "the run"])
def test_a_resumed_run_keeps_its_recipe_and_takes_other_changes(settings, best, monkeypatch, again):
    monkeypatch.setattr(recipe, "rehearse", lambda *_: 0.0)
    asked = settings(*STAGE_3, f"stage.init_from={best}")
    folder = tasks.build(asked).fit().folder
    monkeypatch.setattr(recipe, "rehearse", lambda *_: pytest.fail("rehearsed again"))
    source = configs.load(folder / "config.yaml", ["optim.steps=4", "data.workers=1"])
    if again == "its file":
        source = settings(*STAGE_3, f"stage.init_from={best}", "optim.steps=4", "data.workers=1")
    task = tasks.build_task(source, tasks.read_data(source), resume=True)[0]
    used = recipe.applied(task.config)
    assert used.optim.steps == 6 and used.optim.muon_lr == 2 * asked.optim.muon_lr, "the choice, once"
    assert used.data.workers == 1, "what is no recipe's is the user's"


def test_auto_is_for_stage_3(settings, best):
    config = settings("stage.recipe=auto", f"stage.init_from={best}")
    with pytest.raises(ConfigError, match=r"stage\.recipe=auto"):
        tasks.build_task(config, tasks.read_data(config), resume=False)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("data.augment.paste=0", "data.augment.whole=1"), "forgotten"),
        (("data.augment.paste=0.7", "data.augment.whole=0.4"), "at most 1"),
    ],
)
def test_base_images_are_not_given_up_untold(settings, best, change, told):
    config = settings("stage.name=finetune", f"stage.init_from={best}", "episode.shots=1", *change)
    with pytest.raises(ConfigError, match=told):
        tasks.build_task(config, tasks.read_data(config), resume=False)


def test_they_are_when_told(settings, best):
    alone = ("data.augment.paste=0", "data.augment.whole=1", "stage.forget=true")
    config = settings("stage.name=finetune", f"stage.init_from={best}", "episode.shots=1", *alone)
    batch = tasks.build_task(config, tasks.read_data(config), resume=False)[0].batch(0)
    labels = batch.targets.base_labels[batch.targets.valid]
    assert (labels >= 80).all() and len(labels)


@pytest.fixture
def shots(small_demo):
    data = load(small_demo)
    novel = list(range(data.num_base, len(data.names)))
    records = data.split("support")
    here = [c for c in novel if sum((r.labels == c).sum() for r in records) >= 2]
    return data, here, ImageStore(records, 96), ImageStore(data.split("train"), 96)


def test_a_rehearsal_knows_a_perfect_embedding_from_a_blind_one(shots, best, monkeypatch):
    """Scores replaced by an oracle that reads each copy's class off the scene, and by one that always errs."""
    data, here, store, canvases = shots
    trained = load_trained(best)
    drawn = draw_shots(data.split("support"), here, [2], 0, data.names)
    for found, expected in ((lambda s: s.labels, 1.0), (lambda s: np.full(len(s.labels), here[0]), None)):

        def oracle(_, scenes, words, found=found):
            assert set(words.prototype_labels) <= set(here)
            return [rehearsal.Detections(torch.from_numpy(s.boxes), torch.ones(len(s.boxes)),
                                         torch.as_tensor(found(s)), torch.ones(len(s.boxes), dtype=torch.uint8))
                    for s in scenes]  # fmt: skip

        monkeypatch.setattr(rehearsal, "_detections", oracle)
        ap50 = rehearsal.rehearse(trained, canvases, drawn, store)
        assert ap50 == pytest.approx(1.0) if expected else ap50 < 0.3


def test_no_half_of_the_shots_looks_for_itself(shots, best, monkeypatch):
    data, here, store, canvases = shots
    asked = []
    monkeypatch.setattr(rehearsal, "_words", lambda trained, rows, labels: asked.append(rows))
    monkeypatch.setattr(rehearsal, "_detections", lambda trained, scenes, words: [_nothing() for _ in scenes])
    rehearsal.rehearse(load_trained(best), canvases, draw_shots(data.split("support"), here, [2], 0, data.names), store)
    first, second = asked
    assert len(first) == len(second) == len(here)
    assert not any((a == b).all() for a in first for b in second)


def test_a_rehearsal_repeats_itself(shots, best):
    data, here, store, canvases = shots
    drawn = draw_shots(data.split("support"), here, [1], 0, data.names)
    a, b = (rehearsal.rehearse(load_trained(best), canvases, drawn, store, seed=3) for _ in range(2))
    assert a == b and 0 <= a <= 1


def _nothing():
    return rehearsal.Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64),
                                torch.zeros(0, dtype=torch.uint8))  # fmt: skip


def test_the_shipped_stage_3_files_ask_for_it():
    for path in ("configs/stage_3.yaml", "configs/demo/stage_3.yaml"):
        assert configs.load(path).stage.recipe == "auto"
