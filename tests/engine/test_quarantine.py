# SPDX-License-Identifier: AGPL-3.0-or-later
"""Samples that cannot be used are told once, counted across a resume, and end the run above the ceiling."""

import json
import shlex
from dataclasses import dataclass

import pytest

from engine.test_trainer import Power, pull_the_plug_at, same
from engine.toy import ToyBatch, ToyTask, trainer
from fsdet.config import Guard
from fsdet.engine.checkpoint import load
from fsdet.engine.history import read_history
from fsdet.engine.quarantine import Quarantine
from fsdet.errors import RunFailed
from fsdet.types import Replaced


@dataclass(frozen=True, eq=False)
class Mended(ToyBatch):
    replaced: tuple[Replaced, ...] = ()


def task(bad, samples=100, **options):
    """Batch i could not use the samples `bad[i]`."""

    def tamper(batch):
        return Mended(**vars(batch), replaced=tuple(Replaced(s, f"{s}: truncated") for s in bad.get(batch.index, ())))

    made = ToyTask(tamper=tamper, **options)
    if samples:
        made.samples = samples
    return made


def listed(folder):
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]


def test_a_sample_is_told_once_with_its_file_and_training_goes_on(tmp_path, caplog):
    result = trainer(task({2: ["a.jpg"], 4: ["a.jpg"]}), tmp_path / "r").fit()
    assert result.steps == 10
    (line,) = [r.message for r in caplog.records if "quarantined" in r.message]
    assert line == "quarantined at batch 2: a.jpg: truncated"
    assert listed(tmp_path / "r") == [{"sample": "a.jpg", "batch": 2, "reason": "a.jpg: truncated"}]
    assert load(tmp_path / "r/last.pt")["quarantine"] == {
        "found": {"a.jpg": {"batch": 2, "reason": "a.jpg: truncated"}}
    }


@pytest.mark.parametrize("samples, share, allowed", [(1000, 0.01, 10), (50, 0.01, 1), (1000, 0.0, 0), (99, 0.1, 9)])
def test_the_ceiling_is_a_share_of_the_samples_and_one_file_alone_ends_nothing(tmp_path, samples, share, allowed):
    ledger = Quarantine(tmp_path, samples, share)
    batch = task({0: [f"{i}.jpg" for i in range(allowed)], 1: ["0.jpg"] * bool(allowed), 2: ["last.jpg"]}).batch
    ledger.see(batch(0), 0)
    ledger.see(batch(1), 1)  # known: no new sample
    with pytest.raises(RunFailed, match=rf"{allowed + 1} of {samples} samples.*allows {allowed}\nlast: last\.jpg"):
        ledger.see(batch(2), 2)


@pytest.mark.parametrize(("kind", "more"), [("fewshot", []), ("classifier", ["--task", "classifier"])])
def test_a_run_that_is_ended_names_the_command_for_its_own_data(tmp_path, kind, more):
    resolved = {"task": kind, "data": {"path": "my set/data.yaml"}}
    with pytest.raises(RunFailed) as ended:
        trainer(task({1: ["a.jpg"], 2: ["b.jpg"]}), tmp_path / "r", resolved=resolved).fit()
    told = str(ended.value).partition("next: ")[2].partition(", mend")[0]
    assert shlex.split(told)[1:] == ["-m", "fsdet", "data", "check", "my set/data.yaml", "--deep", *more]


def test_a_run_that_is_ended_says_why_in_its_records_until_it_goes_on(tmp_path):
    bad = {5: ["a.jpg"], 7: ["b.jpg"]}
    with pytest.raises(RunFailed, match="where it has saved"):
        trainer(task(bad), tmp_path / "r").fit()
    assert read_history(tmp_path / "r").ending.startswith("training stopped before batch 7: 2 of 100 samples")
    assert "last: b.jpg: truncated" in (tmp_path / "r/training_debug.log").read_text()
    trainer(task({5: ["a.jpg"]}), tmp_path / "r", resume=True).fit()
    assert "end" not in read_history(tmp_path / "r").rows
    trainer(task({5: ["a.jpg"]}), tmp_path / "straight").fit()
    assert (tmp_path / "r/metrics.jsonl").read_bytes() == (tmp_path / "straight/metrics.jsonl").read_bytes()


def test_without_a_number_of_samples_an_epoch_of_draws_counts(tmp_path):
    """5 batches of 4 images: one of 20 at 1 %."""
    with pytest.raises(RunFailed, match="2 of 20 samples"):
        trainer(task({1: ["a"], 3: ["b"]}, samples=0), tmp_path / "r").fit()


def test_above_the_ceiling_the_run_ends_saved_and_goes_on_once_the_files_are_mended(tmp_path, caplog):
    bad = {1: ["a.jpg"], 7: ["b.jpg"]}
    trainer(task({1: ["a.jpg"]}), tmp_path / "straight").fit()
    with pytest.raises(RunFailed, match=r"(?s)before batch 7.*quarantine\.jsonl.*data check.*--resume"):
        trainer(task(bad), tmp_path / "r").fit()
    assert load(tmp_path / "r/last.pt")["batch"] == 7 and [row["sample"] for row in listed(tmp_path / "r")] == [
        "a.jpg", "b.jpg"]  # fmt: skip
    with pytest.raises(RunFailed, match=r"before batch 8"):
        trainer(task({7: ["b.jpg"], 8: ["c.jpg"]}), tmp_path / "r", resume=True).fit()
    trainer(task({}), tmp_path / "r", resume=True).fit()
    assert "tried again" in caplog.text and listed(tmp_path / "r") == []
    assert same(load(tmp_path / "straight/last.pt")["model"], load(tmp_path / "r/last.pt")["model"])


def test_a_resumed_run_remembers_them(tmp_path, caplog):
    bad = {1: ["a.jpg"], 8: ["a.jpg"]}
    trainer(task(bad), tmp_path / "a").fit()
    with pytest.raises(Power):
        trainer(pull_the_plug_at(task(bad), 8), tmp_path / "b").fit()
    caplog.clear()
    trainer(task(bad), tmp_path / "b", resume=True).fit()
    assert "quarantined" not in caplog.text and same(load(tmp_path / "a/last.pt"), load(tmp_path / "b/last.pt"))
    assert listed(tmp_path / "a") == listed(tmp_path / "b")


def test_a_ceiling_of_zero_allows_none(tmp_path):
    with pytest.raises(RunFailed, match="allows 0"):
        trainer(task({0: ["a.jpg"]}), tmp_path / "r", guard=Guard(max_quarantined=0)).fit()


def test_a_list_that_cannot_be_written_costs_a_warning(tmp_path, caplog):
    (tmp_path / "quarantine.jsonl").mkdir()
    Quarantine(tmp_path, 100, 0.01).see(task({0: ["a"]}).batch(0), 0)
    assert "quarantine.jsonl cannot be written" in caplog.text


def test_an_error_that_does_not_name_its_sample_is_told_with_it(tmp_path, caplog):
    batch = ToyTask(tamper=lambda b: Mended(**vars(b), replaced=(Replaced("a.jpg", "ValueError: bad"),))).batch(0)
    Quarantine(tmp_path, 100, 0.01).see(batch, 0)
    assert "a.jpg: ValueError: bad" in caplog.text


def test_a_run_that_is_overwritten_starts_with_an_empty_list(tmp_path):
    trainer(task({2: ["a.jpg"]}), tmp_path / "r").fit()
    trainer(task({}), tmp_path / "r", exist_ok=True).fit()
    assert not (tmp_path / "r/quarantine.jsonl").exists()
