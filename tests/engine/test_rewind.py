# SPDX-License-Identifier: AGPL-3.0-or-later
"""Too many rejected steps: back to a good checkpoint, without their batches, at a lower LR; thrice, then the end."""

import math

import pytest
import torch

from engine.test_step import spoiled
from engine.test_trainer import NAN, Power, pull_the_plug_at, rows, same
from engine.toy import ToyTask, optim, trainer
from fsdet.config import Guard, Save
from fsdet.engine import trainer as trainers
from fsdet.engine.checkpoint import load, newest
from fsdet.engine.ema import Ema
from fsdet.engine.history import read_history
from fsdet.engine.optimizer import build_optimizer
from fsdet.engine.position import Position
from fsdet.engine.runlog import RunLog
from fsdet.engine.schedule import lr_factor
from fsdet.engine.step import StepController
from fsdet.errors import RunFailed

EPOCH = 10  # batches
STRICT = Guard(max_rejected_in_row=3)


def task_with(bad, **more) -> ToyTask:
    """The losses of batches in `bad` are NaN."""
    return ToyTask(
        batches_per_epoch=EPOCH, spoil=lambda b, r: spoiled("bbox", NAN)(b, r) if b.index in bad else r, **more
    )


def by_hand(windows, rewound_at, factor=0.5, epochs=2, accumulate=1):
    """A run that never sees any other batch: [[index, ...], ...] in order, the LR lower from a committed step on."""
    task, o = ToyTask(batches_per_epoch=EPOCH), optim()
    torch.manual_seed(0)
    task.model.to(memory_format=torch.channels_last)
    made = StepController(task, build_optimizer(task.param_groups(), o), device=torch.device("cpu"), guard=Guard(),
                          ema=Ema(task.model, o.ema, o.ema_warmup))  # fmt: skip
    task.model.train()
    per_epoch = math.ceil(EPOCH / accumulate)
    for window in windows:
        planned = lr_factor(
            made.step, epochs * per_epoch, round(o.warmup_epochs * per_epoch), "cosine", o.min_lr / o.lr
        )
        lower = factor if made.step >= rewound_at else 1.0
        assert made.run([task.batch(i) for i in window], lr_factor=lower * planned, clip_norm=o.clip_norm).committed
    return made


@pytest.mark.parametrize(
    "bad, guard, every, accumulate, back_to, skipped",
    [
        ({5, 6, 7}, STRICT, 4, 1, 4, {5, 6, 7}),
        ({5, 7, 8, 9}, STRICT, 4, 1, 4, {5, 7, 8, 9}),  # the epoch ends in them
        ({5, 6, 7}, STRICT, 0, 1, 0, {5, 6, 7}),  # nothing is saved yet: the beginning is in memory
        ({13, 14, 15}, STRICT, 0, 1, 10, {13, 14, 15}),
        ({3, 6, 9}, Guard(window=10, max_rejected_share=0.2), 0, 1, 0, {3, 6, 9}),
        ({5}, Guard(max_rejected_in_row=1, rewind_lr=0.25), 2, 2, 2, {4, 5}),
    ],
)
def test_after_a_rewind_the_run_is_one_that_never_saw_these_batches(
    tmp_path, bad, guard, every, accumulate, back_to, skipped
):
    changes = {"accumulate": accumulate, "epochs": 2}
    result = trainer(task_with(bad), tmp_path / "r", changes=changes, guard=guard, save=Save(every_steps=every)).fit()
    state, told = load(tmp_path / "r/last.pt"), rows(tmp_path / "r", "step")
    windows = [range(i, min(i + accumulate, EPOCH * (i // EPOCH + 1))) for i in range(0, 2 * EPOCH, accumulate)]
    seen = [list(w) for w in windows if not {*w} & (bad | skipped)]
    twin = by_hand(seen, back_to, guard.rewind_lr, accumulate=accumulate)
    assert result.steps == twin.step == len(seen)
    assert same(state["model"], twin.task.model.state_dict()) and same(state["ema"], twin.ema.state_dict())
    assert same(state["optimizer"]["state"], twin.optimizer.state_dict()["state"])
    assert torch.equal(state["rng"]["cpu"], torch.get_rng_state()), "dropout drew for a batch that is skipped"
    ends = [w[-1] + 1 for w in seen]
    for place in range(back_to, len(ends)):
        while ends[place] in skipped:  # a position does not rest on what is skipped
            ends[place] += 1
    assert [r["batch"] for r in told if r["outcome"] == "committed"] == ends
    [row] = rows(tmp_path / "r", "rewind")
    assert (row["to_step"], set(row["skipped"]), row["number"]) == (back_to, skipped, 1)
    assert row["lr_factor"] == guard.rewind_lr and "rejected, " in row["reason"]
    assert not {r["batch"] - 1 for r in told if r["outcome"] != "committed"} & skipped, "their rows were taken back"


def test_the_rows_of_the_way_that_was_left_are_gone_and_the_incidents_are_not(tmp_path):
    trainer(task_with({12, 13, 14}), tmp_path / "r", guard=STRICT, eval_every=0.3).fit()
    told = rows(tmp_path / "r")
    batches = [r["batch"] for r in told]
    assert batches == sorted(batches), "in the order of the way that was taken"
    assert [r["step"] for r in told if r["kind"] == "val"] == [3, 6, 9, 12, 15, 17]
    assert sorted(p.name for p in (tmp_path / "r/incidents").iterdir()) == [
        "step_12", "step_12_batch_13", "step_12_batch_14"]  # fmt: skip
    assert "rewind 1 of 3: back from step 12 to step 10" in (tmp_path / "r/training_debug.log").read_text()
    assert load(tmp_path / "r/last.pt")["guard"]["incidents"] == 3, "their number is bounded over the whole run"
    history = read_history(tmp_path / "r")
    assert len(history.rewinds) == 1 and history.rejected == [] and history.last_step == 17


def test_what_is_wrong_with_the_weights_is_cured_by_going_back(tmp_path):
    """A weight breaks in memory in step 6: every batch is rejected, none is to blame, and the checkpoint is sound."""
    task = ToyTask(batches_per_epoch=EPOCH)

    def tamper(batch):
        if batch.index == 6 and not task.evaluated:
            task.evaluated.append(1)
            task.model.head.bias.data.fill_(NAN)
        return batch

    task.tamper = tamper
    result = trainer(task, tmp_path / "r", guard=STRICT, save=Save(every_steps=2)).fit()
    assert result.steps == 17 and all(p.isfinite().all() for p in task.model.parameters())
    assert load(tmp_path / "r/last.pt")["position"]["rewinds"][0]["skipped"] == [6, 7, 8]


def test_after_the_last_rewind_the_run_ends_with_all_that_was_tried_and_a_sound_checkpoint(tmp_path):
    with pytest.raises(RunFailed) as failed:
        trainer(task_with(range(4, 999)), tmp_path / "r", changes={"epochs": 5}, guard=STRICT,
                save=Save(every_steps=2, keep=3)).fit()  # fmt: skip
    told = str(failed.value)
    assert failed.value.exit_code == 1
    for words in (
        "3 steps in a row",
        "rewind 3 of 3",
        "LR x 0.125",
        "culprit: bbox_loss",
        "report.json",
        "fsdet doctor",
    ):
        assert words in told
    *_, probe, incident = told.split()
    assert probe == "--incident" and incident in {str(p.parent) for p in (tmp_path / "r/incidents").glob("*/batch.pt")}
    assert told in (tmp_path / "r/training_debug.log").read_text()
    _, state = newest(tmp_path / "r")
    rewinds = state["position"]["rewinds"]
    assert [r["to_step"] for r in rewinds] == [4, 2, 4], "the second time one before it: the first led nowhere"
    assert (state["step"], state["batch"], state["finished"]) == (4, 16, False)
    assert [r["skipped"] for r in rewinds] == [[4, 5, 6], [7, 8, 9], [10, 11, 12]]
    with pytest.raises(RunFailed, match=r"(?s)rewind 3 of 3.*doctor"):  # a resume counts on
        trainer(task_with(range(4, 999)), tmp_path / "r", changes={"epochs": 5}, guard=STRICT, resume=True).fit()


@pytest.mark.parametrize("freeze", [["backbone", "head"], {1: [], 2: ["backbone", "head"]}])
def test_nothing_that_would_be_there_again_is_rewound(tmp_path, freeze):
    with pytest.raises(RunFailed, match=r"(?s)no_grad.*stage\.freeze"):
        trainer(ToyTask(), tmp_path / "r", freeze=freeze, guard=STRICT, changes={"epochs": 4}).fit()
    assert rows(tmp_path / "r", "rewind") == []


def test_a_loss_scale_that_stays_low_is_not_rewound(tmp_path):
    task = ToyTask(batches_per_epoch=50)
    task.model.head.weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(RunFailed, match="loss scale stayed below 1"):
        limits = Guard(init_scale=1.0, max_low_scale=4, max_rejected_in_row=99, max_rejected_share=1.0)
        trainer(task, tmp_path / "r", precision="fp16", guard=limits).fit()
    assert rows(tmp_path / "r", "rewind") == []


def test_a_run_that_is_broken_from_its_first_batch_is_not_sent_back_to_it(tmp_path):
    with pytest.raises(RunFailed, match="3 steps in a row"):
        trainer(task_with(range(99)), tmp_path / "r", guard=STRICT).fit()
    assert rows(tmp_path / "r", "rewind") == []


BAD = {5, 6, 7, 13, 14, 15}
COMMON = {"guard": STRICT, "save": Save(every_steps=4), "eval_every": 0.5}


def files(folder) -> list[bytes]:
    return [(folder / name).read_bytes() for name in ("metrics.jsonl", "results.csv")]


@pytest.fixture(scope="module")
def twice(tmp_path_factory):
    """A run that is rewound twice and never stopped."""
    folder = tmp_path_factory.mktemp("twice") / "r"
    trainer(task_with(BAD), folder, **COMMON).fit()
    assert [r["to_step"] for r in rows(folder, "rewind")] == [5, 8]
    return folder


@pytest.mark.parametrize("call, workers", [(6, 0), (9, 0), (13, 0), (13, 1), (19, 0), (24, 0)])
def test_a_resume_goes_the_same_way(tmp_path, twice, call, workers):
    """The plug is pulled before, within and after each rewind; a rejected batch is run forward twice."""
    task = pull_the_plug_at(ToyTask(batches_per_epoch=EPOCH), call)
    plug, bad = task.spoil, task_with(BAD).spoil
    task.spoil = lambda b, r: bad(b, plug(b, r))
    with pytest.raises(Power):
        trainer(task, tmp_path / "r", **COMMON).fit()
    trainer(
        task_with(BAD), tmp_path / "r", resume=bool([*(tmp_path / "r").glob("*.pt")]), workers=workers, **COMMON
    ).fit()
    assert same(load(twice / "last.pt"), load(tmp_path / "r/last.pt")) and files(twice) == files(tmp_path / "r")


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("owner, name", [(RunLog, "cut"), (trainers.rewind, "go_back"), (RunLog, "rewind")])
def test_a_kill_within_a_rewind_costs_nothing(tmp_path, twice, monkeypatch, owner, name, number):
    """Before the rows are taken back, before the state is, and when it is saved and its row is not written."""
    calls, done = [], getattr(owner, name)

    def dying(*args):
        calls.append(1)
        if len(calls) == number:
            raise Power
        return done(*args)

    with monkeypatch.context() as patch, pytest.raises(Power):
        patch.setattr(owner, name, dying)
        trainer(task_with(BAD), tmp_path / "r", **COMMON).fit()
    trainer(task_with(BAD), tmp_path / "r", resume=True, **COMMON).fit()
    assert same(load(twice / "last.pt"), load(tmp_path / "r/last.pt")) and files(twice) == files(tmp_path / "r")


def test_a_resume_from_before_a_rewind_rewinds_anew_and_tells_it_once(tmp_path, twice):
    """What was saved after it is damaged: the older checkpoint knows of no rewind, so its row has to go."""
    task = pull_the_plug_at(ToyTask(batches_per_epoch=EPOCH), 13)
    plug, bad = task.spoil, task_with(BAD).spoil
    task.spoil = lambda b, r: bad(b, plug(b, r))
    with pytest.raises(Power):
        trainer(task, tmp_path / "r", **COMMON).fit()
    assert len(rows(tmp_path / "r", "rewind")) == 1
    for path in (tmp_path / "r").glob("*.pt"):
        if load(path)["step"] > 4:
            path.write_bytes(b"")
    trainer(task_with(BAD), tmp_path / "r", resume=True, **COMMON).fit()
    assert same(load(twice / "last.pt"), load(tmp_path / "r/last.pt")) and files(twice) == files(tmp_path / "r")


def test_a_batch_that_was_rejected_before_the_checkpoint_is_not_named_again(tmp_path):
    trainer(task_with({1, 5, 6, 7}), tmp_path / "r", guard=STRICT, save=Save(every_steps=3)).fit()
    [row] = rows(tmp_path / "r", "rewind")
    assert (row["to_step"], row["to_batch"], row["skipped"]) == (3, 4, [5, 6, 7])
    assert [r["batch"] for r in rows(tmp_path / "r", "step") if r["outcome"] == "bad_loss"] == [2]


def test_a_position_passes_over_what_is_skipped():
    position = Position(batch=3, rewinds=[{"skipped": [4, 5]}, {"skipped": [8, 9]}])
    assert [position.after(n) for n in range(5)] == [3, 6, 7, 10, 11]
    assert [position.left(end) for end in (4, 6, 10, 12)] == [1, 1, 3, 5]
    position.reject([1, 2])
    position.carry_over(10, 5)
    assert (position.batch, position.skipped, position.rejected) == (1, frozenset(), [])
