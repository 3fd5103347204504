# SPDX-License-Identifier: AGPL-3.0-or-later
"""The loop: a resumed run is the straight run to the last bit, boundaries happen once, and a run says how it ended."""

import csv
import json
import math
from dataclasses import replace

import pytest
import torch

from engine.test_step import spoiled
from engine.toy import ToyTask, trainer
from fsdet.config import Guard, Log, Save
from fsdet.engine.checkpoint import is_finished, load, newest
from fsdet.engine.folder import RUNNING
from fsdet.engine.runlog import RunLog
from fsdet.engine.schedule import lr_factor
from fsdet.errors import CheckpointError, ConfigError, RunFailed

NAN = float("nan")


def rows(folder, kind=None):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in found if kind in (None, r["kind"])]


def same(a, b) -> bool:
    """Equal to the last bit, whatever the nesting."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


class Power(Exception):
    """The plug is pulled."""


def pull_the_plug_at(task: ToyTask, call: int) -> ToyTask:
    calls = iter(range(1, 10**6))

    def spoil(batch, report):
        if next(calls) == call:
            raise Power
        return report

    task.spoil = spoil
    return task


SETTINGS = [
    ({}, {}),
    ({"name": "adamw", "accumulate": 2}, {"save": Save(every_steps=1)}),
    ({"schedule": "plateau"}, {"precision": "bf16"}),
    ({"ema": 0}, {"precision": "fp16"}),
]


@pytest.mark.parametrize("changes, more", SETTINGS)
@pytest.mark.parametrize("call", [4, 9])
def test_a_resumed_run_is_the_straight_run_to_the_last_bit(tmp_path, changes, more, call):
    """Dropout draws, BatchNorm moves, momentum is channels-last, and saves fall into the middle of epochs."""
    common = {"changes": changes, "save": Save(every_steps=2), "eval_every": 0.6} | more
    straight = trainer(ToyTask(), tmp_path / "a", **common).fit()
    with pytest.raises(Power):
        trainer(pull_the_plug_at(ToyTask(), call), tmp_path / "b", **common).fit()
    resumed = trainer(ToyTask(seed=0), tmp_path / "b", resume=True, **common).fit()
    assert resumed.steps == straight.steps and resumed.metrics == straight.metrics
    for name in ("last.pt", "best.pt"):
        assert same(load(tmp_path / "a" / name), load(tmp_path / "b" / name))
    for name in ("metrics.jsonl", "results.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_workers_may_change_on_resume(tmp_path):
    trainer(ToyTask(), tmp_path / "a", save=Save(every_steps=1)).fit()
    with pytest.raises(Power):
        trainer(pull_the_plug_at(ToyTask(), 4), tmp_path / "b", save=Save(every_steps=1), workers=2).fit()
    trainer(ToyTask(), tmp_path / "b", save=Save(every_steps=1), workers=1, resume=True).fit()
    assert same(load(tmp_path / "a/last.pt"), load(tmp_path / "b/last.pt"))


def test_a_truncated_last_checkpoint_costs_nothing_but_a_warning(tmp_path, caplog):
    trainer(ToyTask(), tmp_path / "a", save=Save(every_steps=2)).fit()
    with pytest.raises(Power):
        trainer(pull_the_plug_at(ToyTask(), 8), tmp_path / "b", save=Save(every_steps=2)).fit()
    last = tmp_path / "b/last.pt"
    last.write_bytes(last.read_bytes()[:-50])
    trainer(ToyTask(), tmp_path / "b", save=Save(every_steps=2), resume=True).fit()
    assert "last.pt" in caplog.text and same(load(tmp_path / "a/last.pt"), load(tmp_path / "b/last.pt"))


def test_an_epoch_is_a_row_an_evaluation_and_a_checkpoint(tmp_path):
    result = trainer(ToyTask(scores=[0.2, 0.5, 0.4]), tmp_path / "r", changes={"epochs": 3}).fit()
    table = list(csv.DictReader((tmp_path / "r/results.csv").read_text().splitlines()))
    assert [(r["epoch"], r["step"], r["val/score"]) for r in table] == [
        ("1", "5", "0.2"),
        ("2", "10", "0.5"),
        ("3", "15", "0.4"),
    ]
    assert (result.best_metric, result.metrics, result.steps) == (0.5, {"val/score": 0.4}, 15)
    assert load(result.best)["step"] == 10 and load(tmp_path / "r/last.pt")["step"] == 15
    assert is_finished(tmp_path / "r") and load(tmp_path / "r/last.pt")["spec"] == {"kind": "toy", "rows": 4}
    means = [sum(r["raw"]["bbox"] for r in rows(tmp_path / "r", "step")[i : i + 5]) / 5 for i in (0, 5, 10)]
    assert [float(r["train/bbox_loss"]) for r in table] == pytest.approx(means)


@pytest.mark.parametrize(
    "every, expected", [(0, [15]), (1, [5, 10, 15]), (0.4, [2, 4, 6, 8, 10, 12, 14, 15]), (2, [10, 15])]
)
def test_evaluations_fall_where_they_were_asked_for_and_once_at_the_end(tmp_path, every, expected):
    trainer(ToyTask(), tmp_path / "r", changes={"epochs": 3}, eval_every=every).fit()
    assert [r["step"] for r in rows(tmp_path / "r", "val")] == expected
    table = list(csv.DictReader((tmp_path / "r/results.csv").read_text().splitlines()))
    assert [row["step"] for row in table] == ["5", "10", "15"]
    assert [int(row["step"]) for row in table if row["val/score"]] == [step for step in expected if step % 5 == 0]


def test_the_first_evaluation_writes_best_even_when_it_is_nan(tmp_path):
    result = trainer(ToyTask(scores=[NAN, NAN]), tmp_path / "r").fit()
    assert load(result.best)["step"] == 5


def test_remainder_windows_are_used_and_end_with_their_epoch(tmp_path):
    trainer(ToyTask(), tmp_path / "r", changes={"accumulate": 2}).fit()
    assert [(r["step"], r["batch"], r["epoch"]) for r in rows(tmp_path / "r", "step")] == [
        (1, 2, 1), (2, 4, 1), (3, 5, 1), (4, 7, 2), (5, 9, 2), (6, 10, 2)]  # fmt: skip


def test_a_run_that_ends_within_an_epoch_has_a_row_of_its_rest_with_the_last_evaluation(tmp_path):
    def table():
        found = csv.DictReader((tmp_path / "r/results.csv").read_text().splitlines())
        return [(row["epoch"], row["step"], row["val/score"]) for row in found]

    scores = [0.1, 0.2, 0.3, 0.4]
    trainer(ToyTask(scores=scores), tmp_path / "r", changes={"epochs": None, "steps": 6}).fit()
    assert table() == [("1", "5", "0.1"), ("2", "6", "0.2")]
    longer = {"epochs": None, "steps": 10}
    trainer(ToyTask(scores=scores[2:]), tmp_path / "r", resume=True, changes=longer).fit()
    assert [row[:2] for row in table()] == [("1", "5"), ("2", "6"), ("2", "10")]


def test_steps_count_committed_ones_and_replace_epochs(tmp_path):
    task = ToyTask(spoil=lambda b, r: spoiled("bbox", NAN)(b, r) if b.index in (1, 4) else r)
    result = trainer(task, tmp_path / "r", changes={"epochs": None, "steps": 7}).fit()
    told = rows(tmp_path / "r", "step")
    assert result.steps == 7 and told[-1]["batch"] == 9
    assert [r["batch"] for r in told if r["outcome"] == "bad_loss"] == [2, 5]
    committed = [r for r in told if r["outcome"] == "committed"]
    assert committed[1]["lr"]["head"] == pytest.approx(0.05), "the rejected step did not advance the schedule"


def test_the_schedule_counts_committed_steps_not_batches(tmp_path):
    task = ToyTask(spoil=lambda b, r: spoiled("bbox", NAN)(b, r) if b.index == 4 else r)
    run = trainer(task, tmp_path / "r", changes={"accumulate": 2, "epochs": 3})
    run.fit()
    told = [r for r in rows(tmp_path / "r", "step") if r["outcome"] == "committed"]
    plan = [0.05 * lr_factor(s, 9, run.warmup_steps, "cosine", 1e-4 / 0.05) for s in range(8)]
    assert [r["lr"]["head"] for r in told] == pytest.approx(plan) and run.total_steps == 9


def test_what_the_guard_counted_survives_a_resume(tmp_path):
    def bad(batch, report):
        return spoiled("bbox", NAN)(batch, report) if batch.index in (1, 7) else report

    task = pull_the_plug_at(ToyTask(), 8)  # the bad batch is run forward twice
    plug = task.spoil
    task.spoil = lambda b, r: bad(b, plug(b, r))
    trainer(ToyTask(spoil=bad), tmp_path / "a").fit()
    with pytest.raises(Power):
        trainer(task, tmp_path / "b").fit()
    trainer(ToyTask(spoil=bad), tmp_path / "b", resume=True).fit()
    kept = load(tmp_path / "b/last.pt")
    assert kept["guard"]["totals"]["bad_loss"] == 2 and same(load(tmp_path / "a/last.pt"), kept)


def test_a_rejected_step_leaves_an_incident_and_lines_to_grep(tmp_path):
    task = ToyTask(spoil=lambda b, r: spoiled("bbox", NAN)(b, r) if b.index == 3 else r)
    trainer(task, tmp_path / "r").fit()
    log = (tmp_path / "r/training_debug.log").read_text()
    assert log.count("Skipping optimizer step") == 1 and log.count("NaN/Inf gradient") == 0
    assert "bbox_loss (rows [1] of image_3_1)" in log
    report = json.loads((tmp_path / "r/incidents/step_3/report.json").read_text())
    assert (report["outcome"], report["batches"], report["raw"]["bbox"]) == ("bad_loss", [3], None)
    assert len(report["last_norms"]) == 3
    batch = torch.load(tmp_path / "r/incidents/step_3/batch.pt", weights_only=True)[0]
    assert torch.equal(batch["pixels"], task.batch(3).pixels)


def test_a_rejected_step_is_an_alert_and_its_report_has_the_evidence(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(
        RunLog, "incident", lambda self, report, path: heard.append((report.outcome, path.name, path.parent.name))
    )
    task = ToyTask(spoil=lambda b, r: spoiled("bbox", NAN)(b, r) if b.index == 3 else r)
    trainer(task, tmp_path / "r").fit()
    assert heard == [("bad_loss", "report.json", "step_3")]
    evidence = json.loads((tmp_path / "r/incidents/step_3/report.json").read_text())["evidence"]
    assert evidence["losses"] == {"bbox": {"rows": [1], "images": ["image_3_1"]}} and evidence["cause"] == "loss"


def test_a_short_run_in_half_precision_lets_its_loss_scale_grow(tmp_path):
    """50 steps, a doubling every 20 of them; with torch's 2000 it could only fall."""
    run = trainer(
        ToyTask(), tmp_path / "r", precision="fp16", changes={"epochs": 10, "ema": 0}, guard=Guard(init_scale=8)
    )
    run.fit()
    assert run.controller.scaler.get_scale() == 8 * 2**2


def test_rejections_in_a_row_end_the_run_with_a_reason_and_a_checkpoint(tmp_path):
    task = ToyTask(batches_per_epoch=50, spoil=lambda b, r: spoiled("bbox", NAN)(b, r) if b.index >= 6 else r)
    with pytest.raises(RunFailed, match=r"(?s)4 steps in a row.*bad_loss.*bbox_loss.*report\.json"):
        trainer(task, tmp_path / "r", guard=Guard(max_rejected_in_row=4, max_rewinds=0)).fit()
    _, state = newest(tmp_path / "r")
    assert (state["step"], state["batch"], state["finished"]) == (6, 10, False)
    assert len(list((tmp_path / "r/incidents").iterdir())) == 4


def test_an_all_frozen_run_says_so(tmp_path):
    with pytest.raises(RunFailed, match=r"stage\.freeze"):
        trainer(ToyTask(batches_per_epoch=50), tmp_path / "r", freeze=["backbone", "head"]).fit()


def test_a_run_whose_every_step_is_rejected_divides_by_nothing(tmp_path):
    trainer(ToyTask(spoil=spoiled("bbox", NAN)), tmp_path / "r").fit()
    assert "no step committed" in (tmp_path / "r/training_debug.log").read_text()


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    trainer(ToyTask(), tmp_path / "r").fit()
    with pytest.raises(ConfigError, match="--resume"):
        trainer(ToyTask(), tmp_path / "r")
    trainer(ToyTask(), tmp_path / "r", exist_ok=True, changes={"epochs": 1}).fit()
    assert load(tmp_path / "r/last.pt")["step"] == 5
    assert {p.name for p in (tmp_path / "r").glob("step*")} == {"step_00000005.pt"}


def test_a_folder_without_a_checkpoint_may_be_started_afresh_but_not_resumed(tmp_path):
    trainer(ToyTask(), tmp_path / "r").fit()
    for path in (*(tmp_path / "r").glob("*.pt"), tmp_path / "r/manifest.json"):
        path.unlink()
    (tmp_path / "r/metrics.jsonl").write_text("old\n")
    with pytest.raises(CheckpointError, match="none"):
        trainer(ToyTask(), tmp_path / "r", resume=True)
    trainer(ToyTask(), tmp_path / "r").fit()
    assert rows(tmp_path / "r")


def test_a_resume_of_what_is_not_there_makes_no_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a run to continue, got nothing there\. Next: check run\.dir="):
        trainer(ToyTask(), tmp_path / "typo", resume=True)
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("exist_ok", [False, True])
def test_files_that_no_run_wrote_are_not_replaced(tmp_path, exist_ok):
    texts = {"config.yaml": "mine: 1", "environment.json": '{"mine": 1}', "results.csv": "a,b", "results.json": "{}"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(
        ConfigError, match=r"config\.yaml, environment\.json, results\.csv, results\.json. Next: run\.dir="
    ):
        trainer(ToyTask(), tmp_path, exist_ok=exist_ok)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == texts


def test_a_run_that_is_overwritten_leaves_nothing_that_would_tell_of_it(tmp_path):
    """Tables and pictures of the old weights go with them; what somebody put there of their own stays."""
    folder = tmp_path / "r"
    trainer(ToyTask(spoil=spoiled("bbox", NAN)), folder).fit()
    assert list(folder.glob("incidents/*/report.json"))
    (folder / "episodes").mkdir(exist_ok=True)
    for name in ("results.json", "shots.png", "labels.png", "report.html", "episodes/eval_1shot_0.jpg",
                 "episodes/step_000009.json", "notes.txt", "episodes/mine.jpg"):  # fmt: skip
        (folder / name).write_text("old")
    trainer(ToyTask(), folder, exist_ok=True).fit()
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {name for name in left if (folder / name).read_bytes() == b"old"} == {"notes.txt", "episodes/mine.jpg"}
    assert not list(folder.glob("incidents/*")) and "results.csv" in left


def test_a_folder_that_cannot_be_made_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir"):
        trainer(ToyTask(), tmp_path / "file" / "r")


def test_resuming_into_another_architecture_or_optimizer_is_refused(tmp_path):
    trainer(ToyTask(), tmp_path / "r").fit()
    other = ToyTask()
    other.model.head = torch.nn.Linear(4, 2)
    with pytest.raises(CheckpointError, match=r"head\.weight"):
        trainer(other, tmp_path / "r", resume=True)
    with pytest.raises(CheckpointError, match="bf16"):
        trainer(ToyTask(), tmp_path / "r", resume=True, precision="bf16")


def test_a_finished_run_can_be_lengthened(tmp_path):
    trainer(ToyTask(), tmp_path / "r").fit()
    result = trainer(ToyTask(), tmp_path / "r", resume=True, changes={"epochs": 3}).fit()
    assert result.steps == 15 and [r["step"] for r in rows(tmp_path / "r", "val")] == [5, 10, 15]


def test_an_evaluation_that_fails_does_not_lose_the_epoch(tmp_path):
    task = ToyTask()
    task.evaluate = lambda model: (_ for _ in ()).throw(Power())
    with pytest.raises(Power):
        trainer(task, tmp_path / "r").fit()
    assert newest(tmp_path / "r")[1]["step"] == 5
    assert trainer(ToyTask(), tmp_path / "r", resume=True).fit().steps == 10
    assert [r["step"] for r in rows(tmp_path / "r", "val")] == [5, 10]


def test_freezing_by_epoch_keeps_bytes_and_batchnorm_and_survives_a_resume(tmp_path):
    task = ToyTask()
    before = {k: v.clone() for k, v in task.model.backbone.state_dict().items()}
    freeze = {1: ["backbone"], 2: []}
    trainer(task, tmp_path / "r", changes={"epochs": 1}, freeze=freeze).fit()
    kept = load(tmp_path / "r/last.pt")
    assert all(torch.equal(v, kept["model"][f"backbone.{k}"]) for k, v in before.items())
    trainer(ToyTask(), tmp_path / "r", resume=True, freeze=freeze).fit()
    moved = load(tmp_path / "r/last.pt")
    assert not any(torch.equal(v, moved["model"][f"backbone.{k}"]) for k, v in before.items())


def test_freeze_norm_keeps_every_running_statistic(tmp_path):
    task = ToyTask()
    trainer(task, tmp_path / "r", freeze_norm=True).fit()
    assert task.model.backbone[1].num_batches_tracked == 0
    assert not torch.equal(task.model.backbone[1].weight, torch.ones(4)), "its parameters still train"


def test_a_freeze_prefix_that_matches_nothing_is_told(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean 'backbone'"):
        trainer(ToyTask(), tmp_path / "r", freeze=["backbon"])


def test_out_of_memory_says_what_to_lower(tmp_path):
    def spoil(batch, report):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(RunFailed, match=r"optim\.accumulate"):
        trainer(ToyTask(spoil=spoil), tmp_path / "r").fit()


def test_the_debug_log_has_the_gradient_block_and_components(tmp_path):
    trainer(ToyTask(), tmp_path / "r", log=Log(every=1, debug=True)).fit()
    log = (tmp_path / "r/training_debug.log").read_text()
    block = log[log.index("Gradient Norms:") :].splitlines()
    assert block[1].startswith("  total: ") and "head." in "".join(block[2:6]) and "Loss Components:" in log


def test_a_state_that_cannot_be_saved_does_not_hide_why_the_run_ended(tmp_path):
    task = ToyTask()
    with torch.no_grad():
        task.model.head.bias.fill_(math.nan)
    with pytest.raises(RunFailed, match="steps in a row were rejected") as failed:
        trainer(task, tmp_path / "r", guard=Guard(max_rejected_in_row=3)).fit()
    told = str(failed.value)
    assert "could not be saved: NaN or inf in model.head.bias" in told and f"doctor {tmp_path / 'r'}" in told


def test_evaluating_more_often_does_not_change_what_is_learned(tmp_path):
    for name, every in (("a", 0), ("b", 0.2)):
        trainer(ToyTask(), tmp_path / name, eval_every=every).fit()
    assert same(load(tmp_path / "a/last.pt")["model"], load(tmp_path / "b/last.pt")["model"])


def test_a_batch_that_cannot_be_made_is_skipped_and_named(tmp_path):
    def tamper(batch):
        if batch.index == 2:
            raise OSError("image truncated: cat.jpg")
        return replace(batch)

    result = trainer(ToyTask(tamper=tamper), tmp_path / "r").fit()
    (bad,) = [r for r in rows(tmp_path / "r", "step") if r["outcome"] == "bad_input"]
    assert result.steps == 9 and "cat.jpg" in bad["culprit"] and bad["batch"] == 3


def test_a_run_has_its_folder_for_itself_from_its_first_step_to_its_end_or_failure(tmp_path):
    seen = []

    def look(batch, report):
        seen.append((tmp_path / "a" / RUNNING).exists())
        return report

    task = ToyTask()
    task.spoil = look
    trainer(task, tmp_path / "a").fit()
    assert seen and all(seen) and not (tmp_path / "a" / RUNNING).exists()
    with pytest.raises(Power):
        trainer(pull_the_plug_at(ToyTask(), 2), tmp_path / "b").fit()
    assert not (tmp_path / "b" / RUNNING).exists()
