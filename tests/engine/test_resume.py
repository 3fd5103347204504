# SPDX-License-Identifier: AGPL-3.0-or-later
"""A run that dies at any moment goes on as if it had not, and one that goes on with other settings says so."""

import builtins
import functools
import os
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.test_step import spoiled
from engine.test_trainer import NAN, rows, same
from engine.toy import ToyTask, trainer
from fsdet import files
from fsdet.config import Guard, Save
from fsdet.engine import agreement, checkpoint, records
from fsdet.engine.checkpoint import candidates, is_finished, load
from fsdet.engine.position import Position
from fsdet.engine.runlog import RunLog
from fsdet.engine.trainer import Trainer
from fsdet.errors import CheckpointError

PER_EPOCH = 4


class Dead(BaseException):
    """Passes every handler, as SIGKILL does."""


class Machine:
    """File operations are counted, and at number `at` the machine dies: that write is cut short, nothing follows.

    saving: when the writer's thread runs, at once or at the latest moment, so that the loop is ahead of it.
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int | None, saving: str) -> None:
        self.at, self.count, self.files = at, 0, []
        for name in ("replace", "unlink", "mkdir", "fsync"):
            patch.setattr(os, name, self._counted(getattr(os, name)))
        for module in (files, records):
            patch.setattr(module, "open", self._open, raising=False)
        patch.setattr(checkpoint, "threading", SimpleNamespace(Thread=functools.partial(Inline, saving)))

    def tick(self) -> None:
        self.count += 1
        if self.at is not None and self.count >= self.at:
            raise Dead

    def _counted(self, call):
        def counted(*args, **kwargs):
            self.tick()
            return call(*args, **kwargs)

        return counted

    def _open(self, *args, **kwargs):
        self.tick()
        self.files.append(builtins.open(*args, **kwargs))
        return Handle(self.files[-1], self)

    def __enter__(self) -> "Machine":
        return self

    def __exit__(self, *exc) -> None:
        for file in self.files:  # as a kernel does
            file.close()


class Handle:
    """An open file whose write may be the last thing that happens, half done."""

    def __init__(self, file, machine: Machine) -> None:
        self.file, self.machine = file, machine

    def write(self, data):
        try:
            self.machine.tick()
        except Dead:
            if self.machine.count == self.machine.at:
                self.file.write(data[: len(data) // 2])
            raise
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __iter__(self):
        return iter(self.file)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()


class Inline:
    """A thread that is none: its work is done at `start` or at `join`, where an exception reaches the caller."""

    def __init__(self, moment: str, target, args, **options) -> None:
        self.moment, self.work = moment, lambda: target(*args)

    def start(self) -> None:
        if self.moment == "at once":
            self.work()

    def join(self) -> None:
        if self.moment == "late":
            self.work()


def task() -> ToyTask:
    """Batches 2 and 9 are bad pixels, 5 and 6 bad losses; with `GUARD` the latter send the run back."""

    def tamper(batch):
        if batch.index in (2, 9):
            batch.pixels[0, 0, 0, 0] = NAN
        return batch

    return ToyTask(PER_EPOCH, tamper=tamper,
                   spoil=lambda b, r: spoiled("bbox", NAN)(b, r) if b.index in (5, 6) else r)  # fmt: skip


GUARD = Guard(max_rejected_in_row=2)
FREEZE = {1: [], 2: ["backbone"], 3: []}
SETTINGS = {
    "sgd, epochs": {"changes": {"epochs": 3, "clip_adaptive": "percentile"}, "eval_every": 0.75},
    "adamw in fp16, steps, accumulated": {
        "changes": {"name": "adamw", "lr": 0.01, "accumulate": 2, "epochs": None, "steps": 5}, "precision": "fp16",
        "save": Save(every_steps=1), "eval_every": 0},
    "muon in bf16, two epochs and a half": {"changes": {"name": "muon", "epochs": 2.5}, "precision": "bf16",
                                            "save": Save(every_steps=2, keep=1)},
    "plateau, no EMA": {"changes": {"schedule": "plateau", "ema": 0, "epochs": 3}, "save": Save(every_steps=3)},
}  # fmt: skip


def fit(folder: Path, name: str, *, resume: bool = False, **more) -> None:
    options = {"guard": GUARD, "freeze": FREEZE, "save": Save(every_steps=2)} | SETTINGS[name] | more
    trainer(task(), folder, resume=resume, **options).fit()


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """{setting: (folder of the undisturbed run, its file operations)}"""
    found = {}
    for name in SETTINGS:
        folder = tmp_path_factory.mktemp("straight") / "r"
        with pytest.MonkeyPatch.context() as patch:
            machine = Machine(patch, None, "at once")
            fit(folder, name)
        found[name] = folder, machine.count
    return found


def contents(folder: Path) -> dict:
    """All that the two runs must share."""
    text = {name: (folder / name).read_text() for name in ("metrics.jsonl", "results.csv")}
    return text | {path.name: load(path) for path in candidates(folder)}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("saving", ["at once", "late"])
def test_a_machine_may_die_at_any_file_operation(tmp_path, straight, name, saving):
    """Some of them, drawn; a run that died may die again on its way, and has as many workers as it likes."""
    whole, count = straight[name]
    rng = random.Random(f"{name} {saving}")
    for number, at in enumerate(sorted(rng.sample(range(5, count), 4))):
        folder = tmp_path / str(at)
        for again in range(1 + number % 2):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Dead):
                with Machine(patch, at if again == 0 else 30, saving):
                    fit(folder, name, resume=bool(candidates(folder)))
            assert not is_finished(folder) or load(folder / "last.pt")["finished"], "it says so too early"
        fit(folder, name, resume=bool(candidates(folder)), workers=int(number == 3))
        assert same(contents(whole), contents(folder)), f"{name}: died at file operation {at} of {count}"
        assert not [*folder.glob(".*")], "what a killed process had begun to write is left"


def test_the_settings_reach_what_they_are_there_for(straight):
    """Rewinds, rejections, a frozen epoch, remainders: what the test above claims to cover happens."""
    for name, (folder, count) in straight.items():
        outcomes = {row["outcome"] for row in rows(folder, "step")}
        assert "bad_input" in outcomes and count > 100, name
        assert rows(folder, "rewind") or "accumulate" in SETTINGS[name]["changes"], name


def config(**changes) -> dict:
    """A resolved configuration of a few keys."""
    known = {"task": "toy", "optim": {"epochs": 2, "lr": 0.05}, "data": {"workers": 0, "path": "a"},
             "stage": {"name": "base"}, "run": {"dir": "r"}, "log": {"every": 1}, "save": {"keep": 2}}  # fmt: skip
    for key, value in changes.items():
        section, _, name = key.partition("__")
        known = {**known, section: {**known[section], name: value} if name else value}
    return known


def test_what_has_no_say_in_the_numbers_may_change_and_nothing_is_said(tmp_path, caplog):
    trainer(ToyTask(), tmp_path / "r", resolved=config()).fit()
    other = config(data__workers=2, run__dir="elsewhere", log__every=5, save__keep=3)
    trainer(ToyTask(), tmp_path / "r", resume=True, workers=1, resolved=other).fit()
    assert "not exact" not in caplog.text


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"optim__epochs": 3}, "optim.epochs 2 -> 3"),
        ({"optim__lr": 0.1, "data__path": "b"}, "optim.lr 0.05 -> 0.1, data.path a -> b"),
        ({"optim": {"epochs": 2, "lr": 0.05, "clip_norm": 10.0}}, "optim.clip_norm None -> 10.0"),
    ],
)
def test_what_has_a_say_is_told_and_the_run_goes_on(tmp_path, caplog, changes, told):
    trainer(ToyTask(), tmp_path / "r", resolved=config()).fit()
    epochs = {"changes": {"epochs": 3}} if "optim__epochs" in changes else {}
    result = trainer(ToyTask(), tmp_path / "r", resume=True, resolved=config(**changes), **epochs).fit()
    assert result.steps == (15 if epochs else 10)
    [line] = [r.message for r in caplog.records if "not exact" in r.message]
    assert told in line and line.startswith("this resume is not exact, the run goes on with other settings")


class Named(ToyTask):
    """Describes itself with classes."""

    classes = ("cat", "dog", "owl")

    def describe(self):
        return {"kind": "toy", "rows": self.rows, "classes": list(self.classes), "image_size": 64}


@pytest.mark.parametrize(
    "classes, changes, told",
    [
        (("cat", "owl", "elk"), {}, "classes without dog with elk"),
        (("owl", "cat", "dog"), {}, r"classes \['cat', 'dog', 'owl'\] -> \['owl', 'cat', 'dog'\]"),
        (Named.classes, {"task": "other"}, "task toy -> other"),
        (Named.classes, {"stage__name": "episodic"}, "stage.name base -> episodic"),
        (("cat", "dog"), {"stage__name": "episodic"}, "classes without owl, stage.name base -> episodic"),
    ],
)
def test_another_run_is_refused_with_what_differs(tmp_path, monkeypatch, classes, changes, told):
    trainer(Named(), tmp_path / "r", resolved=config()).fit()
    before = (tmp_path / "r/last.pt").read_bytes()
    monkeypatch.setattr(Named, "classes", classes)
    with pytest.raises(CheckpointError, match=rf"last\.pt: expected a checkpoint of this config's run, .*{told}.*Next"):
        trainer(Named(), tmp_path / "r", resume=True, resolved=config(**changes))
    assert (tmp_path / "r/last.pt").read_bytes() == before


def test_other_versions_and_threads_are_not_exact():
    saved = {"config": config(), "threads": torch.get_num_threads(), "versions": {"torch": str(torch.__version__)}}
    assert agreement.not_exact(saved, config()) is None
    other = saved | {"threads": 7, "versions": {"torch": "1.0", "fsdet": "0.0.1", "gone": "2"}}
    told = agreement.not_exact(other, config())
    assert "torch 1.0 -> " in told and "fsdet 0.0.1 -> " in told and ", not 7" in told and "gone" not in told


@pytest.mark.parametrize("now", [2, 8])
def test_another_batch_size_goes_on_as_far_into_the_same_epoch(tmp_path, caplog, now):
    """So that an epoch has half or twice as many batches: the rows of before stay, and a second resume knows them."""
    trainer(ToyTask(PER_EPOCH), tmp_path / "r", changes={"epochs": 1.5}).fit()
    before = (tmp_path / "r/metrics.jsonl").read_text()
    log = ""
    for epochs in (2, 3):
        trainer(ToyTask(now), tmp_path / "r", resume=True, changes={"epochs": epochs}).fit()
        log, caplog_text = (tmp_path / "r/metrics.jsonl").read_text(), caplog.text
        assert log.startswith(before)
        before = log
    assert f"an epoch has {now} batches, not 4: the run goes on at batch {now * 3 // 2}" in caplog_text
    assert caplog_text.count("batches, not 4") == 1, "the second resume is exact"
    steps = [row["step"] for row in rows(tmp_path / "r", "step")]
    assert steps == list(range(1, 6 + now // 2 + now + 1))
    assert [row["epoch"] for row in rows(tmp_path / "r", "step")][6:] == [2] * (now // 2) + [3] * now


def test_a_finished_run_that_is_resumed_is_what_it_was(tmp_path):
    longer = {"changes": {"epochs": 1.5}}
    trainer(ToyTask(PER_EPOCH), tmp_path / "r", **longer).fit()
    before = contents(tmp_path / "r")
    assert trainer(ToyTask(PER_EPOCH), tmp_path / "r", resume=True, **longer).fit().steps == 6
    assert same(before, contents(tmp_path / "r"))


@pytest.mark.parametrize("where", ["evaluation", "epoch", "save"])
def test_a_kill_at_the_very_end_leaves_no_row_twice(tmp_path, monkeypatch, where):
    """The last step was saved; the last evaluation and the last row of results.csv were written, or one of them."""
    options = {"save": Save(every_steps=1), "eval_every": 0, "changes": {"epochs": 1.5}}
    trainer(ToyTask(PER_EPOCH), tmp_path / "a", **options).fit()
    owner, name = {"evaluation": (RunLog, "pictures"), "epoch": (Position, "close_epoch"), "save": (Trainer, "_save")}[
        where
    ]
    done = getattr(owner, name)

    def dying(self, *args, **how):
        last = {"pictures": args[1:] == (6,), "close_epoch": args[:1] == (2,), "_save": how.get("wait")}[name]
        if last:
            raise Dead
        return done(self, *args, **how)

    with monkeypatch.context() as patch, pytest.raises(Dead):
        patch.setattr(owner, name, dying)
        trainer(ToyTask(PER_EPOCH), tmp_path / "b", **options).fit()
    assert len(rows(tmp_path / "b", "val")) == 1
    trainer(ToyTask(PER_EPOCH), tmp_path / "b", resume=True, **options).fit()
    assert same(contents(tmp_path / "a"), contents(tmp_path / "b"))


def test_evaluating_more_rarely_after_a_resume_takes_effect_at_once(tmp_path):
    trainer(ToyTask(PER_EPOCH), tmp_path / "r", changes={"epochs": 2}, eval_every=0.25).fit()
    trainer(ToyTask(PER_EPOCH), tmp_path / "r", changes={"epochs": 4}, eval_every=1, resume=True).fit()
    assert [row["batch"] for row in rows(tmp_path / "r", "val")] == [1, 2, 3, 4, 5, 6, 7, 8, 12, 16]
