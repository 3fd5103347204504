# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every command and every guard works for each task through the table of tasks; the engine knows none of them."""

import ast
import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import get_args

import pytest
import torch

from fsdet import tasks
from fsdet.cli.main import main
from fsdet.config import Config
from fsdet.engine.trainer import Trainer
from fsdet.errors import CheckpointError, DataError, RunFailed, Stopped
from fsdet.evaluation.masks import MaskScorer
from fsdet.tasks import supply
from fsdet.types import Task
from tasks import others

pytestmark = pytest.mark.usefixtures("free_fsync")
ENGINE = Path(tasks.__file__).resolve().parents[1] / "engine"
NAN = float("nan")
LOSSES = {"classifier": {"cls"}, "maskrcnn": {"objectness", "rpn_box_reg", "classifier", "box_reg", "mask"}}
PARTS = {
    "classifier": ["backbone", "attention", "classifier"],
    "maskrcnn": ["backbone", "rpn", "box_head", "mask_head"],
}


@pytest.fixture(params=others.TASKS)
def name(request):
    return request.param


@pytest.fixture
def line(name, sets, tmp_path):
    """A command line's configuration and overrides for the task; its run is `run`."""
    return lambda *more: others.words(name, sets[name], tmp_path / "run", *more)


@pytest.fixture
def small(name, of_task):
    return partial(of_task, name)


@pytest.fixture(scope="session")
def runs(sets, tmp_path_factory):
    """{task: a finished run of two epochs}, not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    more = ("eval.every=1", "log.tensorboard=true", "log.wandb.mode=offline")
    return {n: tasks.build(others.settings(n, sets[n], folder / n, *more)).fit().folder for n in others.TASKS}


def test_the_engine_branches_on_no_task_and_reads_none_of_their_sections():
    """Its words and imports: no task, no part of one, nothing from the floors that know what is learnt."""
    forbidden = {
        *tasks.KINDS,
        "maskrcnn",
        "mask_head",
        "attention",
        "rpn",
        "Classifier",
        "MaskRcnn",
        "EpisodeCfg",
        "Stage",
    }
    for path in sorted(ENGINE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            word = getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "value", None)
            assert not (isinstance(word, str) and word in forbidden), f"{path.name}: {word}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                module = getattr(node, "module", None) or node.names[0].name
                assert not re.match(r"fsdet\.(tasks|models|losses|data|detect|evaluation|objective)", module), path.name
            if isinstance(node, ast.Compare):
                assert ".name" not in ast.unparse(node).replace("optim.name", "") or "task.name" not in ast.unparse(
                    node
                )
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                assert "task" not in ast.unparse(node), path.name


def test_every_task_of_the_schema_has_its_row_and_keeps_the_protocol(small, name):
    assert set(get_args(Config.model_fields["task"].annotation)) == set(tasks.KINDS)
    for method in ("read", "create", "restored", "network", "planned", "told", "advice", "judge"):
        assert all(callable(getattr(kind, method)) for kind in tasks.KINDS.values()), method
    task = others.built(small())
    assert isinstance(task, Task) and list(task.param_groups()) == PARTS[name]
    everything = {id(p) for p in task.model.parameters()}
    listed = [id(p) for members in task.param_groups().values() for _, p in members]
    assert len(listed) == len(set(listed)) and set(listed) == everything


def test_each_task_file_is_short():
    for kind in ("classifier", "maskrcnn"):
        lines = (ENGINE.parent / "tasks" / f"{kind}.py").read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 250, kind


def test_batches_are_a_function_of_seed_and_index(small):
    one, again, other = others.built(small()), others.built(small()), others.built(small("run.seed=1"))
    assert (
        torch.equal(one.batch(1).images, again.batch(1).images) and one.batch(1).image_ids == again.batch(1).image_ids
    )
    assert not torch.equal(one.batch(1).images, one.batch(0).images)
    assert not torch.equal(one.batch(1).images, other.batch(1).images)
    assert one.batch(0).finite()


def test_a_file_that_is_gone_is_replaced_and_told(small, monkeypatch):
    task = others.built(small())
    honest, victim = task.supply.store.sample, task.supply.planner.plan(0).queries[1]

    def sample(index):
        if index == victim:
            raise OSError("gone")
        return honest(index)

    before = task.batch(0)
    monkeypatch.setattr(task.supply.store, "sample", sample)
    batch = task.batch(0)
    name = task.supply.store.records[victim].image_id
    assert [r.sample for r in batch.replaced] == [name] and name not in batch.image_ids and not before.replaced
    assert len(batch.image_ids) == len(before.image_ids) and torch.equal(batch.images[0], before.images[0])
    assert task.samples == 8


def test_an_image_of_val_that_cannot_be_read_is_left_out_and_named(small, tmp_path, caplog):
    """The figures are those of the split without it; as an empty image it would be missed objects or a wrong class."""
    task, without = others.built(small()), others.built(small())
    records, broken = task.judge.store.records, tmp_path / "broken.png"
    broken.write_bytes(b"<html>")
    records[1] = replace(records[1], path=broken)
    without.judge.store.records.pop(1)
    if task.name == "maskrcnn":
        without.judge.scorer = MaskScorer(without.judge.store.records, len(without.data.names))
    found, wanted = task.evaluate(task.model.eval()), without.evaluate(task.model)
    assert found == pytest.approx(wanted, nan_ok=True) and len(task.judge.store.records) == 5
    assert [m for m in caplog.messages if m.startswith("left out of validation, 5 images") and "broken.png" in m]
    records = task.judge.store.records
    records[0] = replace(records[0], path=broken)
    task.judge.store._kept.clear()
    assert task.illustrate(task.model, tmp_path / "run/episodes", 1)[0].is_file()
    for i, record in enumerate(task.judge.store.records):
        task.judge.store.records[i] = replace(record, path=broken)
    task.judge.store._kept.clear()
    with pytest.raises(DataError, match=r"broken\.png"):
        task.evaluate(task.model)


def test_check_probe_and_info_look_at_a_configuration(line, name, capsys):
    assert main(["check", *line()]) == 0
    shown = capsys.readouterr().out
    assert "one dry step: " in shown and "2 steps an epoch" in shown and all(f"{n} " in shown for n in LOSSES[name])
    assert main(["probe", *line()]) == 0
    shown = capsys.readouterr().out
    assert LOSSES[name] <= {row.split()[0] for row in shown.splitlines() if row} and "NOT FINITE" not in shown
    assert main(["info", *line()]) == 0
    shown = capsys.readouterr().out
    assert f"task: {name}" in shown and all(re.search(rf"^#   {part} ", shown, re.M) for part in PARTS[name])


def test_the_first_losses_are_what_an_untrained_model_should_show(small, name):
    task = others.built(small("episode.queries=8"))
    report = task.losses(task.batch(0))
    assert set(report.raw) == LOSSES[name]
    for loss, expected in task.expected_initial(report).items():
        assert expected / 1.6 < float(report.raw[loss].detach()) < expected * 1.6, loss


@pytest.mark.slow
def test_a_run_is_reported_diagnosed_told_and_judged(runs, name, tmp_path, capsys):
    run = runs[name]
    assert main(["report", str(run)]) == 0 and "finished" in capsys.readouterr().out
    assert main(["doctor", str(run)]) == 0 and "none rejected" in capsys.readouterr().out
    assert main(["info", str(run / "best.pt")]) == 0
    shown = capsys.readouterr().out
    assert tasks.KINDS[name].told(torch.load(run / "best.pt", weights_only=True)["spec"]) in shown
    assert all(f"  {part} " in shown for part in PARTS[name])
    out = tmp_path / "judged" / "results.json"
    assert main(["eval", str(run / "best.pt"), "--json", str(out), "--device", "cpu"]) == 0
    results = json.loads(out.read_text())
    assert results["task"] == name and results["images"] == 6 and results["split"] == "test"
    assert (out.parent / "episodes/eval_test.jpg").is_file()
    assert (out.parent / "confusion.png").is_file() == (name == "classifier")
    assert main(["eval", str(run / "best.pt"), "--json", str(out), "--device", "cpu"]) == 0, "its own file is replaced"
    capsys.readouterr()
    assert main(["eval", str(run / "best.pt"), "--shots", "1"]) == 2
    assert "which a split alone judges" in capsys.readouterr().err
    assert main(["predict", str(run / "best.pt"), "--support", str(run), "--source", str(run), "--out", "o"]) == 2
    assert "a checkpoint of the few-shot detector" in capsys.readouterr().err


def test_a_training_looks_at_part_of_a_large_split_and_an_evaluation_at_all_of_it(small, monkeypatch):
    monkeypatch.setattr(supply, "MOST", 3)
    task = others.built(small())
    records = task.data.split(task.split)
    assert len(records) > 4 and [r.path for r in task.judge.store.records] == [r.path for r in records[::2]]
    whole = tasks.KINDS[task.name].judge(task.model.eval(), task.config, task.data, task.split, None)
    assert whole["images"] == len(records)


@pytest.mark.slow
def test_a_results_json_is_shown_by_report(runs, name, tmp_path, capsys):
    run = shutil.copytree(runs[name], tmp_path / "copy")
    assert main(["eval", str(run / "best.pt"), "--json", str(run / "results.json"), "--device", "cpu"]) == 0
    table = capsys.readouterr().out.strip()
    assert main(["report", str(run)]) == 0
    assert table in capsys.readouterr().out


@pytest.mark.slow
def test_validation_and_its_pictures_land_in_the_run(runs, name):
    rows = others.rows(runs[name], "val")
    assert len(rows) == 2 and all("val/fitness" in row for row in rows)
    assert len(list((runs[name] / "episodes").glob("step_*.jpg"))) == 2
    assert list((runs[name] / "tensorboard").glob("events*")) and list((runs[name] / "wandb").rglob("*.wandb"))
    steps = others.rows(runs[name], "step")
    assert set(steps[0]["raw"]) == LOSSES[name] and set(steps[0]["lr"]) == set(PARTS[name])


def test_a_rate_for_each_part(small, name):
    first = PARTS[name][0]
    trainer = tasks.build(small(f"optim.lr_scale.{first}=0.25"))
    rates = {g["group"]: g["lr"] for g in trainer.optimizer.param_groups}
    whole = trainer.optim.lr
    assert rates == {part: whole * (0.25 if part == first else 1.0) for part in PARTS[name]}


def stop_after(epoch, monkeypatch):
    """A signal that arrives when `epoch` has ended and its checkpoint is on disk."""
    honest = Trainer._end_epoch

    def end(self, ended):
        honest(self, ended)
        if ended == epoch:
            self._save(wait=True)
            raise Stopped("stopped", 15)

    monkeypatch.setattr(Trainer, "_end_epoch", end)


def resumed_exactly(name, sets, tmp_path, monkeypatch, at, *more):
    straight, broken = (others.settings(name, sets[name], tmp_path / n, *more) for n in ("straight", "broken"))
    tasks.build(straight).fit()
    with monkeypatch.context() as patch:
        stop_after(at, patch)
        with pytest.raises(Stopped):
            tasks.build(broken).fit()
    trainer = tasks.build(broken, resume=True)
    assert trainer.position.epochs_told == at
    trainer.fit()
    a, b = others.weights(tmp_path / "straight"), others.weights(tmp_path / "broken")
    assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []
    assert others.rows(tmp_path / "straight", "step") == others.rows(tmp_path / "broken", "step")


@pytest.mark.slow
def test_a_classifier_resumes_after_epoch_26_of_40_to_the_last_bit(sets, tmp_path, monkeypatch):
    """With the rate's restarts, stages that thaw at epochs 10 and 30, dropout and a warm-up of three epochs."""
    resumed_exactly("classifier", sets, tmp_path, monkeypatch, 26, "optim.epochs=40", "optim.warmup_epochs=3",
                    "optim.schedule=restarts", "optim.min_lr=1e-8", "episode.per_epoch=1", "optim.name=adamw",
                    "stage.freeze={1: [backbone], 10: [backbone.conv1, backbone.layer1], 30: []}",
                    "optim.lr_scale.backbone=0.1")  # fmt: skip


@pytest.mark.slow
def test_mask_rcnn_resumes_to_the_last_bit(sets, tmp_path, monkeypatch):
    resumed_exactly("maskrcnn", sets, tmp_path, monkeypatch, 2, "optim.epochs=3")


@pytest.mark.slow
def test_checkpoints_in_the_middle_of_an_epoch(small):
    run = tasks.build(small("save.every_steps=1", "save.keep=9")).fit().folder
    assert [p.name for p in sorted(run.glob("step_*.pt"))] == [f"step_{i:08d}.pt" for i in (1, 2, 3, 4)]


def spoil(task, monkeypatch, at):
    """The total of batches `at` becomes NaN through its first loss."""
    honest = task.losses

    def losses(batch):
        report = honest(batch)
        if batch.index in at:
            first = next(iter(report.weighted))
            for values in (report.raw, report.weighted):
                values[first] = values[first] * NAN
            object.__setattr__(report, "total", sum(report.weighted.values()))
        return report

    monkeypatch.setattr(task, "losses", losses)


@pytest.mark.slow
def test_a_nan_in_epoch_27_is_rejected_reported_and_survived(small, name, monkeypatch, caplog):
    """The story: 26 good epochs, then one batch. Nothing of it may reach weights, statistics or the average."""
    trainer = tasks.build(small("optim.epochs=30", "episode.per_epoch=1", "optim.ema=0.9"))
    spoil(trainer.task, monkeypatch, {26})
    with caplog.at_level("INFO", "fsdet"):
        result = trainer.fit()
    rejected = [row for row in others.rows(result.folder, "step") if row["outcome"] != "committed"]
    assert [(row["outcome"], row["epoch"]) for row in rejected] == [("bad_loss", 27)] and result.steps == 29
    [report] = (result.folder / "incidents").glob("*/report.json")
    facts = json.loads(report.read_text())
    first = next(iter(facts["raw"]))
    assert facts["epoch"] == 27 and f"{first}_loss" in facts["culprit"]
    assert facts["image_ids"] == list(trainer.task.batch(26).image_ids)
    assert all(v.isfinite().all() for v in others.weights(result.folder).values() if v.is_floating_point())
    told = [m for m in caplog.messages if m.startswith("epoch 27:")]
    assert "bad_loss 1" in told[0] and "replay its batch" in told[0], "advice at the end of the epoch"


@pytest.mark.slow
def test_an_incident_is_run_again(small, name, monkeypatch, capsys):
    trainer = tasks.build(small())

    def poison(index, honest=trainer.task.batch):
        batch = honest(index)
        if index == 1:
            batch.images[0, 0, 0, 0] = NAN
        return batch

    monkeypatch.setattr(trainer.task, "batch", poison)
    folder = trainer.fit().folder
    [incident] = (folder / "incidents").iterdir()
    assert json.loads((incident / "report.json").read_text())["outcome"] == "bad_input"
    assert main(["probe", "--incident", str(incident)]) == 0
    shown = capsys.readouterr().out
    assert "bad_input at step 1" in shown and "first output that is not finite: " in shown
    assert main(["doctor", str(folder)]) == 0 and "bad_input 1" in capsys.readouterr().out


@pytest.mark.slow
def test_a_poisoned_checkpoint_is_neither_resumed_nor_started_from(runs, name, tmp_path, line, capsys):
    run = shutil.copytree(runs[name], tmp_path / "poisoned")
    (run / "manifest.json").unlink()  # as an older program left it: nothing but the tensors tells
    for path in run.glob("*.pt"):
        state = torch.load(path, weights_only=True)
        value = next(v for v in state["model"].values() if v.is_floating_point())
        value[(0,) * value.dim()] = NAN
        torch.save(state, path)
    assert main(["train", "--resume", str(run)]) == 2
    shown = capsys.readouterr().err
    assert "expected an intact checkpoint, got only damaged ones" in shown
    assert main(["train", *line(f"stage.init_from={run / 'last.pt'}")]) == 2
    assert "NaN or inf in model" in capsys.readouterr().err


@pytest.mark.slow
def test_weights_of_a_run_start_another_and_those_of_another_task_do_not(runs, name, small, tmp_path):
    trainer = tasks.build(small(f"stage.init_from={runs[name] / 'last.pt'}"))
    assert isinstance(trainer, Trainer)
    given = torch.load(runs[name] / "last.pt", weights_only=True)["ema"]
    assert all(torch.equal(v, given[k]) for k, v in trainer.task.model.state_dict().items())
    foreign = runs[others.TASKS[1 - others.TASKS.index(name)]] / "last.pt"
    with pytest.raises(CheckpointError, match=f"expected a checkpoint of task '{name}'"):
        tasks.build(small(f"stage.init_from={foreign}", f"run.dir={tmp_path / 'new'}"))


def test_a_poisoned_weights_file_is_refused(name, small, tmp_path):
    task = others.built(small())
    state = {k.removeprefix("backbone.") if name == "classifier" else k: v for k, v in task.model.state_dict().items()}
    torch.save(state, tmp_path / "good.pth")
    tasks.build_task(small(f"{name}.weights={tmp_path / 'good.pth'}"), task.data, resume=False)
    state["layer1.0.conv1.weight" if name == "classifier" else "rpn.head.cls_logits.bias"].view(-1)[0] = NAN
    torch.save(state, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match="NaN or inf in"):
        tasks.build_task(small(f"{name}.weights={tmp_path / 'bad.pth'}"), task.data, resume=False)
    torch.save({"other": torch.zeros(3)}, tmp_path / "none.pth")
    with pytest.raises(CheckpointError, match="not one that fits"):
        tasks.build_task(small(f"{name}.weights={tmp_path / 'none.pth'}"), task.data, resume=False)


@pytest.mark.slow
def test_a_run_of_rejections_ends_with_a_diagnosis_and_sound_weights(small, name, monkeypatch, capsys):
    trainer = tasks.build(small("optim.epochs=9", "guard.max_rejected_in_row=3", "guard.max_rewinds=0"))
    spoil(trainer.task, monkeypatch, set(range(4, 99)))
    with pytest.raises(RunFailed, match="3 steps in a row were rejected"):
        trainer.fit()
    assert all(v.isfinite().all() for v in others.weights(trainer.folder).values() if v.is_floating_point())
    assert main(["doctor", str(trainer.folder)]) == 0 and "3 rejected" in capsys.readouterr().out


@pytest.mark.slow
def test_a_few_images_are_learnt(small, name):
    """Eight images as they are: the loss falls far below that of a model that knows nothing."""
    own = {"classifier": ("optim.name=adamw", "optim.lr=3e-3", "optim.epochs=40", "classifier.dropout=0"),
           "maskrcnn": ("optim.lr=2e-2", "optim.epochs=15")}[name]  # fmt: skip
    still = [f"data.augment.{key}=0" for key in ("translate", "scale", "degrees")]
    trainer = tasks.build(small("optim.schedule=constant", "log.every=5", *still, *own))
    start = float(trainer.task.losses(trainer.task.batch(0)).total.detach())
    trainer.fit()
    rows = others.rows(trainer.folder, "step")
    assert sum(row["total"] for row in rows[-4:]) / 4 < 0.7 * start


def test_messages_name_the_task_that_they_are_about(sets, tmp_path, capsys, monkeypatch):
    """A classifier's run in the hands of the few-shot commands: one sentence each, exit 2, the way on in it."""
    monkeypatch.chdir(tmp_path)
    config, run = others.settings("classifier", sets["classifier"], tmp_path / "run"), tmp_path / "run"
    best = tasks.build(config).fit().best
    assert main(["eval", str(best), "--json", str(run / "results.json"), "--device", "cpu"]) == 0
    capsys.readouterr()
    picture = next((sets["classifier"].parent / "test").rglob("*.png"))
    (tmp_path / "note.md").write_text("no checkpoint")
    page = others.words("classifier", sets["classifier"], tmp_path / "new", "stage.freeze=[nothing]")
    for argv, told in (
        (["eval", "--table", str(run / "results.json")], "got results of the classifier. Next: see them with"),
        (["predict", str(best), "--source", str(picture), "--out", "out"], "got one of the task classifier. Next"),
        (["train", "--resume", "note.md"], "note.md: expected a run folder or a checkpoint in one, got another file"),
        (["data", "check", str(sets["classifier"].parent / "train")], "--task classifier"),
        (["eval", str(best), "--data", "note.md"], "folders named after their classes, got a file"),
        (["check", *page], "stage.freeze: expected a group"),
    ):
        assert main(argv) == 2, argv
        assert told in (err := capsys.readouterr().err) and len(err.strip().splitlines()) == 1, (argv, err)
    assert main(["train", "--resume", str(run)]) == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert main(["report", str(run)]) == 0 and "confusion.png" in capsys.readouterr().out
