# SPDX-License-Identifier: AGPL-3.0-or-later
"""The first signal finishes the step, saves and says how to go on; the second leaves at once."""

import os
import signal
import threading

import pytest

from engine.test_trainer import same
from engine.toy import ToyTask, trainer
from fsdet.engine.checkpoint import is_finished, load
from fsdet.engine.history import read_history
from fsdet.engine.signals import Signals
from fsdet.errors import Stopped


def signalled(number: int, at: int) -> ToyTask:
    def spoil(batch, report):
        if batch.index == at:
            os.kill(os.getpid(), number)
        return report

    return ToyTask(spoil=spoil)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("at", [0, 4, 6])
def test_a_signal_finishes_the_step_and_the_resumed_run_is_the_straight_one(tmp_path, number, code, at):
    trainer(ToyTask(), tmp_path / "a").fit()
    with pytest.raises(Stopped, match=r"fsdet train --resume .*b") as stopped:
        trainer(signalled(number, at), tmp_path / "b").fit()
    assert stopped.value.exit_code == code
    assert load(tmp_path / "b/last.pt")["step"] == at + 1 and not is_finished(tmp_path / "b")
    reason = read_history(tmp_path / "b").ending
    assert reason == f"stopped by signal {number} after step {at + 1}; the state is saved."
    trainer(ToyTask(), tmp_path / "b", resume=True).fit()
    assert same(load(tmp_path / "a/last.pt"), load(tmp_path / "b/last.pt"))
    for name in ("metrics.jsonl", "results.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_second_signal_leaves_at_once(monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (signals.received, left) == (signal.SIGTERM, [])
        os.kill(os.getpid(), signal.SIGINT)
    assert left == [130]


def test_handlers_are_put_back_and_other_threads_listen_to_nothing():
    before = signal.getsignal(signal.SIGTERM)
    with Signals():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    seen = []
    thread = threading.Thread(target=lambda: seen.append(Signals().__enter__().received))
    thread.start()
    thread.join()
    assert seen == [0] and signal.getsignal(signal.SIGTERM) == before
