# SPDX-License-Identifier: AGPL-3.0-or-later
"""Several processes train as one: they decide alike, one of them writes, and none waits for ever."""

import math
import os
import pickle
import signal
import time
from dataclasses import replace

import pytest
import torch

import processes
from engine.test_trainer import rows, same
from engine.toy import ToyBatch, ToyTask, trainer
from fsdet.config import Guard, Save
from fsdet.engine.checkpoint import load
from fsdet.engine.quarantine import Quarantine
from fsdet.engine.runlog import RunLog, Untold
from fsdet.errors import ConfigError
from fsdet.peers import ALONE, PeerOutOfMemory, Peers
from fsdet.types import Replaced
from processes import together

NAN = math.nan


class Halving(ToyBatch):
    """A batch that can be run in parts."""

    def halves(self):
        cut = len(self.image_ids) // 2
        return tuple(
            replace(self, pixels=self.pixels[part], answer=self.answer[part], image_ids=self.image_ids[part])
            for part in (slice(None, cut), slice(cut, None))
        )


def parted(peers: Peers, tamper=None, **more) -> ToyTask:
    """The toy, of whose batches of 4 each process has its part; `tamper` sees the whole batch."""

    def part(batch):
        batch = tamper(batch) if tamper else batch
        places = peers.part(4, "rows")
        mine = slice(places.start, places.stop)
        return replace(batch, pixels=batch.pixels[mine], answer=batch.answer[mine], image_ids=batch.image_ids[mine])

    return ToyTask(norm=False, tamper=part, **more)


def fit(peers: Peers, folder, task: ToyTask | None = None, **more) -> dict:
    """Train; what the run came to in this process."""
    run = trainer(task or parted(peers), folder, peers=peers, **more)
    run.fit()
    return state_of(run)


def state_of(run) -> dict:
    state = run.state.take()
    return {"model": state["model"], "ema": state["ema"], "optimizer": state["optimizer"], "step": run.controller.step,
            "totals": dict(run.guard.totals), "found": sorted(run.quarantine.found)}  # fmt: skip


def test_a_process_alone_is_its_own_world():
    x = torch.ones(2, 3, requires_grad=True)
    assert (ALONE.rank, ALONE.world, ALONE.leads, ALONE.alone) == (0, 1, True, True)
    assert ALONE.total(x) is x and ALONE.rows(x, x[:1])[0] == (x, slice(0, 2)) and ALONE.tell(7) == [7]
    assert ALONE.given(x) is x and ALONE.most(3) == 3 and ALONE.add_up([x], x[0]).equal(x[0])


def test_the_parts_of_a_batch_are_equal_and_in_order_or_refused():
    assert [list(Peers(rank, 3).part(6, "k")) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    with pytest.raises(ConfigError, match=r"episode\.queries: expected a multiple of 4 processes, got 6"):
        Peers(0, 4).part(6, "episode.queries")


def test_meetings_hand_round_what_they_say():
    def meet(peers):
        own = torch.full((peers.rank + 1, 2), float(peers.rank), requires_grad=True)
        (every, mine), (none, _) = peers.rows(own, own[:0])
        every.square().sum().backward()
        gradients = [torch.ones(2, 2).t() * peers.rank, torch.arange(3.0) + peers.rank]
        extra = peers.add_up(gradients, torch.tensor([1.0]))
        return {"total": peers.total(torch.tensor([1.0 + peers.rank])).item(), "rows": every.detach(), "mine": mine,
                "none": none.shape, "grad": own.grad, "told": peers.tell({"rank": peers.rank, "nan": None}),
                "given": peers.given({"t": torch.arange(2), "r": peers.rank}, 2), "most": peers.most(peers.rank * 5),
                "sums": gradients, "extra": extra.item(), "sent": type(pickle.loads(pickle.dumps(peers)))}  # fmt: skip

    found = together(meet, world=3)
    for rank, one in enumerate(found):
        assert one["total"] == 6.0 and one["most"] == 10 and one["extra"] == 3.0
        assert one["rows"][:, 0].tolist() == [0, 1, 1, 2, 2, 2] and one["none"] == (0, 2)
        assert one["mine"] == slice((0, 1, 3)[rank], (1, 3, 6)[rank]) and (one["grad"] == 2.0 * rank).all()
        assert one["told"] == [{"rank": r, "nan": None} for r in range(3)]
        assert one["given"]["r"] == 2 and one["given"]["t"].tolist() == [0, 1]
        assert (one["sums"][0] == 3).all() and one["sums"][1].tolist() == [3.0, 6.0, 9.0]
        assert one["sent"] is Peers  # a loader worker gets the numbers, not the connections


@pytest.mark.parametrize("ends", [lambda: os._exit(3), lambda: time.sleep(60)], ids=["dies", "hangs"])
def test_forks_that_never_join_are_made_again(ends, monkeypatch, tmp_path):
    real = processes.ranks.joined

    def stillborn(*args):
        if os.environ["RANK"] == "1" and not (tmp_path / "once").exists():
            (tmp_path / "once").touch()
            ends()
        return real(*args)

    monkeypatch.setattr(processes.ranks, "joined", stillborn)
    monkeypatch.setattr(processes, "JOINING", 8)
    begun = time.monotonic()
    assert together(lambda peers: peers.rank) == [0, 1] and (tmp_path / "once").exists()
    assert time.monotonic() - begun < 40


def test_one_that_is_out_of_memory_gets_the_others_out_of_their_meeting():
    def meet(peers):
        try:
            if peers.rank == 1:
                peers.confess()
            else:
                peers.total(torch.ones(3))
        except PeerOutOfMemory as error:
            return str(error), peers.most(4)
        return "", peers.most(4)

    assert together(meet) == [("process 1 of 2 is out of memory", 4), ("", 4)]


def test_processes_at_different_places_are_told_apart():
    def meet(peers):
        return peers.most(1) if peers.rank else peers.total(torch.ones(3))

    first, second = together(meet)
    assert first.kind == second.kind == "RunFailed"
    assert "expected all processes at a sum [3, 0, 0, 0] in process 0, got process 1 is at a vote" in first.text


@pytest.mark.parametrize("how", ["raises", "dies", "sleeps"])
def test_who_does_not_come_is_named_in_time(how):
    def meet(peers):
        if peers.rank == 1:
            if how == "raises":
                raise ValueError("a disk that is gone")
            if how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3)
        peers.wait("the evaluation")

    found = together(meet, world=3, timeout=1.5)
    for error in (found[0], found[2]):
        assert error.seconds < 6, "gloo itself waits half an hour"
        assert error.kind == "RunFailed"
        if how == "raises":
            assert error.text == "process 1 of 3 failed: ValueError: a disk that is gone"
        else:
            assert "process 1 of 3 is missing" in error.text
            assert how == "dies" or "expected the evaluation within 1.5 s (guard.rank_timeout)" in error.text


def test_two_processes_train_as_one_and_only_the_first_writes(tmp_path):
    """Without BatchNorm and dropout: the same losses, the same parameters, to rounding; the same in both processes."""
    alone = fit(ALONE, tmp_path / "one")
    first, second = together(lambda peers: fit(peers, tmp_path / ("two" if peers.leads else "other")))
    assert same(first, second) and first["totals"]["committed"] == 10
    for name, value in alone["model"].items():
        torch.testing.assert_close(first["model"][name], value, rtol=0, atol=1e-6)
    assert not (tmp_path / "other").exists()
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert (a["kind"], a["step"], a["batch"]) == (b["kind"], b["step"], b["batch"])
        for key in ("total", "grad_l2_preclip", "raw", "norm", "cosine", "rows", "val/score"):
            assert key not in a or b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6)


def test_running_statistics_are_the_mean_over_the_processes_and_stay_the_same_everywhere(tmp_path):
    """At a rate of next to nothing, so that two runs alone, each with the images of one process, are the oracle."""
    slow = {"changes": {"lr": 1e-9, "min_lr": 0.0}}

    def task(shift):
        return ToyTask(seed=0, tamper=lambda b: replace(b, pixels=(1 + shift) * b.pixels + shift))

    first, second = together(lambda peers: fit(peers, tmp_path / "r", task(peers.rank), **slow))
    assert same(first, second)
    oracle = [fit(ALONE, tmp_path / str(shift), task(shift), **slow)["model"] for shift in range(2)]
    for name in ("backbone.1.running_mean", "backbone.1.running_var"):
        assert not torch.allclose(oracle[0][name], oracle[1][name], rtol=1e-2)
        torch.testing.assert_close(first["model"][name], (oracle[0][name] + oracle[1][name]) / 2, rtol=1e-4, atol=1e-5)


BAD = "image_2_3"  # of the second process's half


def spoil_pixels(batch):
    if batch.index == 2:
        batch.pixels[3, 0, 0, 0] = NAN
    return batch


def spoil_losses(batch, report):
    if BAD not in batch.image_ids:
        return report
    weighted = {**report.weighted, "bbox": report.weighted["bbox"] * NAN}
    rows = report.row_values["bbox"].clone()
    rows[1] = NAN
    return replace(report, total=sum(weighted.values()), weighted=weighted, row_values={"bbox": rows})


def spoil_gradient(batch, report):
    if BAD in batch.image_ids:
        report.total.register_hook(lambda g: g * NAN)
    return report


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"tamper": spoil_pixels}, "bad_input"),
        ({"spoil": spoil_losses}, "bad_loss"),
        ({"spoil": spoil_gradient}, "bad_grad"),
    ],
)
def test_what_is_not_finite_in_one_process_is_rejected_by_all_and_its_image_named(tmp_path, changes, outcome):
    first, second = together(lambda peers: fit(peers, tmp_path / "r", parted(peers, **changes)))
    assert same(first, second)
    assert first["totals"] == {**dict.fromkeys(first["totals"], 0), "committed": 9, outcome: 1}
    (row,) = [row for row in rows(tmp_path / "r") if row["kind"] == "step" and row["outcome"] != "committed"]
    assert row["outcome"] == outcome and row["culprit"].startswith("process 1: ")
    assert outcome == "bad_grad" or BAD in row["culprit"]
    assert row["image_ids"] == [f"image_2_{i}" for i in range(4)]
    (kept,) = torch.load(tmp_path / "r/incidents/step_2/batch.pt", weights_only=True)
    assert list(kept["image_ids"]) == ["image_2_2", "image_2_3"]  # of the process that is to blame


def test_a_branch_that_only_one_process_uses_hangs_nobody_and_moves_everywhere(tmp_path):
    def run(peers):
        def spoil(batch, report):
            if peers.leads:
                return report
            return replace(
                report, total=report.total.detach(), weighted={n: v.detach() for n, v in report.weighted.items()}
            )

        return fit(peers, tmp_path / "r", parted(peers, spoil=spoil), freeze=["backbone"])

    first, second = together(run)
    assert same(first, second) and first["totals"]["committed"] == 10


def test_out_of_memory_in_one_process_halves_the_batch_in_all(tmp_path):
    def run(peers):
        told = []

        def spoil(batch, report):
            told.append(len(batch.image_ids))
            if peers.rank == 1 and len(told) == 3:
                raise torch.OutOfMemoryError("no room")
            return report

        task = parted(peers, spoil=spoil)
        made = task.batch
        task.batch = lambda index: Halving(**vars(made(index)))
        return fit(peers, tmp_path / "r", task), told

    (first, sizes), (second, others) = together(run)
    assert same(first, second) and first["totals"]["committed"] == 10
    assert sizes[-16:] == others[-16:] == [1] * 16
    whole = fit(ALONE, tmp_path / "one")
    for name, value in whole["model"].items():
        torch.testing.assert_close(first["model"][name], value, rtol=0, atol=1e-6)


def test_samples_that_one_process_cannot_use_count_in_all(tmp_path):
    def run(peers):
        task = parted(peers)
        made = task.batch

        def batch(index):
            found = made(index)
            object.__setattr__(found, "replaced", (Replaced(f"torn_{peers.rank}", "torn"),) if index == 3 else ())
            return found

        task.batch = batch
        return fit(peers, tmp_path / "r", task, guard=Guard(max_quarantined=0.5))

    first, second = together(run)
    assert first["found"] == second["found"] == ["torn_0", "torn_1"]
    listed = (tmp_path / "r/quarantine.jsonl").read_text().splitlines()
    assert len(listed) == 2


def test_a_rewind_takes_all_processes_back(tmp_path):
    def spoil(batch, report):
        return spoil_losses(batch, report) if batch.index == 2 else report

    def run(peers):
        folder = tmp_path / ("r" if peers.leads else "elsewhere")  # another machine does not see the files
        return fit(peers, folder, parted(peers, spoil=spoil), guard=Guard(max_rejected_in_row=1),
                   save=Save(every_steps=1))  # fmt: skip

    first, second = together(run)
    assert same(first, second) and first["totals"]["committed"] == 9
    (entry,) = [row for row in rows(tmp_path / "r") if row["kind"] == "rewind"]
    assert entry["skipped"] == [2]


def test_a_signal_to_one_stops_all_after_the_same_step_and_the_resumed_run_is_the_straight_one(tmp_path):
    def stopped(peers):
        def spoil(batch, report):
            if batch.index == 4 and peers.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return report

        return fit(peers, tmp_path / "b", parted(peers, spoil=spoil))

    together(lambda peers: fit(peers, tmp_path / "a"))
    first, second = together(stopped)
    assert first.kind == second.kind == "Stopped" and "after step 5" in first.text and "after step 5" in second.text
    assert load(tmp_path / "b/last.pt")["step"] == 5
    together(lambda peers: fit(peers, tmp_path / "b", resume=True))
    assert same(load(tmp_path / "a/last.pt"), load(tmp_path / "b/last.pt"))
    for name in ("metrics.jsonl", "results.csv"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_resume_by_another_number_of_processes_says_what_is_not_exact(tmp_path, caplog):
    together(lambda peers: fit(peers, tmp_path / "r", changes={"epochs": 1}))
    fit(ALONE, tmp_path / "r", resume=True)
    assert "not exact" in caplog.text and "1 process, not 2 (the same images in each step" in caplog.text


def test_processes_with_different_runs_are_refused(tmp_path):
    def run(peers):
        return fit(peers, tmp_path / "r", changes={"epochs": 1 + peers.rank})

    first, second = together(run)
    assert first.kind == second.kind == "RunFailed"
    assert "expected the same run in all processes, got of process 1: steps 10, not 5" in first.text


def test_the_log_of_a_process_that_does_not_lead_has_every_event():
    events = {name for name in vars(RunLog) if not name.startswith("_")}
    assert events == {name for name in vars(Untold) if not name.startswith("_")}


def test_a_ledger_that_does_not_tell_writes_nothing(tmp_path):
    ledger = Quarantine(tmp_path, 10, 0.5, tells=False)
    ledger.see(replace_batch(("torn",)), 3)
    assert ledger.found and not list(tmp_path.iterdir())


def replace_batch(samples):
    class Batch:
        image_ids = ("a",)
        replaced = tuple(Replaced(name, "torn") for name in samples)

    return Batch()
