# SPDX-License-Identifier: AGPL-3.0-or-later
"""Batches come in order of their index, whatever the number of workers, and a lost worker costs nothing."""

import gc
import os
import signal

import pytest
import torch

from engine.toy import ToyBatch, ToyTask
from fsdet.engine import feed
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
