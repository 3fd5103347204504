# SPDX-License-Identifier: AGPL-3.0-or-later
"""Batches come in order of their index, whatever the number of workers, and a lost worker costs nothing."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from engine.test_trainer import same
from engine.toy import ToyBatch, ToyTask, trainer
from fsdet.config import Guard
from fsdet.engine import feed
from fsdet.engine.checkpoint import load
from fsdet.engine.feed import Failed, Feed
from fsdet.errors import DataError, RunFailed

a_dead_worker_leaves_its_socket = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("start, stop", [(0, 6), (4, 9), (3, 3)])
def test_order_and_content_do_not_depend_on_workers(workers, start, stop):
    task, state = ToyTask(), torch.get_rng_state()
    batches = list(Feed(task, start, stop, workers))
    assert [b.index for b in batches] == list(range(start, stop))
    assert all(torch.equal(b.pixels, task.batch(b.index).pixels) for b in batches)
    assert torch.equal(state, torch.get_rng_state()), "the loader drew from the training's generator"


def test_more_workers_than_cpus_are_as_many_as_cpus_and_say_so(monkeypatch, caplog):
    caplog.set_level("INFO", logger="fsdet")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    assert [Feed(ToyTask(), 0, 1, asked).workers for asked in (0, 3, 64)] == [0, 3, 3]
    assert [r.message for r in caplog.records] == ["data.workers is 64, but there are 3 CPUs: 3 loader workers"]


def test_without_a_stop_it_goes_on():
    endless = iter(Feed(ToyTask(), 10, None, 0))
    assert [next(endless).index for _ in range(4)] == [10, 11, 12, 13]


@pytest.mark.parametrize("error", [OSError("truncated"), ValueError("bad label"), DataError("no such file")])
def test_a_batch_that_raises_becomes_a_failed_one_in_its_place(error):
    def tamper(batch):
        if batch.index == 1:
            raise error
        return batch

    first, second, third = Feed(ToyTask(tamper=tamper), 0, 3, 0)
    assert isinstance(second, Failed) and str(error) in second.reason and not second.finite()
    assert (first.index, second.index, third.index) == (0, 1, 2)


def test_a_batch_is_asked_where_it_is_made_whether_it_is_finite(monkeypatch):
    """In the worker, so that the step finds the answer and need not look at every pixel again."""
    asked = []
    monkeypatch.setattr(ToyBatch, "finite", lambda self: asked.append(self.index) or True)
    assert [b.index for b in Feed(ToyTask(), 0, 3, 0)] == asked == [0, 1, 2]


@a_dead_worker_leaves_its_socket
def test_a_killed_worker_is_replaced_at_the_same_position(tmp_path, caplog, monkeypatch):
    def tamper(batch):
        if batch.index == 3 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    monkeypatch.setattr(feed, "CHECK_SECONDS", 1)
    batches = list(Feed(ToyTask(tamper=tamper), 0, 6, 1))
    gc.collect()
    assert [b.index for b in batches] == list(range(6)) and "starting them again" in caplog.text


@a_dead_worker_leaves_its_socket
def test_workers_that_keep_dying_end_the_run_with_the_index(monkeypatch):
    def tamper(batch):
        if batch.index == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    monkeypatch.setattr(feed, "CHECK_SECONDS", 1)
    monkeypatch.setattr(feed, "RESTARTS", 1)
    with pytest.raises(RunFailed, match=r"at batch [01].*data\.workers=0"):
        list(Feed(ToyTask(tamper=tamper), 0, 3, 1))
    gc.collect()


@pytest.mark.parametrize("workers", [0, 1])
def test_it_can_be_sent_elsewhere_and_skipped_batches_are_not_even_made(workers):
    def tamper(batch):
        assert batch.index not in (3, 8, 9), "made"
        return batch

    task = ToyTask(tamper=tamper)
    source = Feed(task, 1, 10, workers)
    batches = iter(source)
    assert [next(batches).index for _ in range(2)] == [1, 2]
    source.seek(2, {3, 8, 9})
    assert [b.index for b in batches] == [2, 4, 5, 6, 7], "and it ends although the last ones are skipped"


def once(path, strike):
    """A tamper that strikes at batch 3, the first time only."""

    def tamper(batch):
        if batch.index == 3 and not path.exists():
            path.touch()
            strike()
        return batch

    return tamper


@a_dead_worker_leaves_its_socket
@pytest.mark.parametrize("strike", ["sleeps", "is stopped"])
def test_a_hung_worker_is_replaced_at_the_same_position_and_leaves_no_process(tmp_path, caplog, strike):
    """A stopped process ignores every request but SIGKILL; waiting for it would hang the end of the program."""
    hang = {"sleeps": lambda: time.sleep(600), "is stopped": lambda: os.kill(os.getpid(), signal.SIGSTOP)}[strike]
    workers = Feed(ToyTask(tamper=once(tmp_path / "hung", hang)), 0, 6, 2, timeout=1)
    began, batches = time.monotonic(), list(workers)
    assert time.monotonic() - began < 20 and "no batch within 1 s" in caplog.text
    assert [b.index for b in batches] == list(range(6))
    assert all(torch.equal(b.pixels, ToyTask().batch(b.index).pixels) for b in batches)
    workers.close()
    gc.collect()
    assert not multiprocessing.active_children()


@a_dead_worker_leaves_its_socket
def test_three_restarts_then_the_run_fails_and_names_the_very_batch(monkeypatch, caplog):
    """Two workers and prefetching: the batch that kills is not the one that is waited for at first."""

    def tamper(batch):
        if batch.index == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch

    monkeypatch.setattr(feed, "CHECK_SECONDS", 0.2)
    seen = []
    with pytest.raises(RunFailed, match=r"4 times in a row at batch 4; .*data\.workers=0"):
        seen.extend(batch.index for batch in Feed(ToyTask(tamper=tamper), 0, 8, 2))
    gc.collect()
    assert caplog.text.count("died at batch 4") == 3


@a_dead_worker_leaves_its_socket
@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGSTOP])
def test_a_training_whose_workers_are_struck_from_outside_is_the_undisturbed_one(tmp_path, monkeypatch, signum):
    """Every worker there is, at three places of the run."""
    monkeypatch.setattr(feed, "CHECK_SECONDS", 0.2)
    trainer(ToyTask(), tmp_path / "a", workers=2, changes={"epochs": 4}).fit()

    def spoil(batch, report):
        if batch.index in (2, 9, 10):
            for child in multiprocessing.active_children():
                os.kill(child.pid, signum)
        return report

    guard = Guard(loader_timeout=2)
    trainer(ToyTask(spoil=spoil), tmp_path / "b", workers=2, changes={"epochs": 4}, guard=guard).fit()
    gc.collect()
    assert same(load(tmp_path / "a/last.pt"), load(tmp_path / "b/last.pt"))
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_every_way_of_starting_a_process_gives_the_same_batches(tmp_path, method):
    """In a process of its own: a method can be set once. Another folder to stand in, with letters outside ASCII."""
    place = tmp_path / "köln 東京"
    place.mkdir()
    code = f"""
import multiprocessing, sys, torch
sys.path[:0] = {sys.path!r}
if __name__ == "__main__":
    from engine.toy import ToyTask
    from fsdet.engine.feed import Feed
    multiprocessing.set_start_method({method!r})
    torch.set_num_threads(1)
    task = ToyTask()
    found = list(Feed(task, 2, 6, 2))
    assert [b.index for b in found] == [2, 3, 4, 5]
    assert all(torch.equal(b.pixels, task.batch(b.index).pixels) for b in found)
    print("equal")
"""
    (place / "run.py").write_text(code)
    done = subprocess.run([sys.executable, "run.py"], cwd=place, capture_output=True, text=True, timeout=100)
    assert done.stdout == "equal\n", done.stderr
