# SPDX-License-Identifier: AGPL-3.0-or-later
"""The guard counts, flags and ends runs by the thresholds of its section, and its state survives a resume."""

import json
import math
from dataclasses import replace

import pytest

from engine.toy import ToyTask
from fsdet.config import Guard
from fsdet.engine import guard as guards
from fsdet.engine.guard import StepGuard, jsonable
from fsdet.types import StepReport


def report(outcome="committed", step=1, norm=1.0, ratio=1.0, scale=1.0, total=1.0, **raw) -> StepReport:
    raw = raw or {"bbox": 1.0}
    return StepReport(outcome, step, norm, norm / ratio, ratio, scale, {"head": 0.1}, total, raw, raw, "head.weight",
                      evidence={"parameter": "head.weight", "cause": "loss"})  # fmt: skip


def names(guard: StepGuard, *reports: StepReport, warm=True) -> list[str]:
    return [flag.name for r in reports for flag in guard.see(r, warm)]


@pytest.mark.parametrize(
    "seen, flags",
    [
        (report(norm=1e4), []),
        (report(norm=1.01e4), ["norm_warning"]),
        (report(norm=1.01e5), ["norm_explosion"]),
        (report(ratio=101), ["clip_ratio"]),
        (report(scale=0.5), ["loss_scale"]),
        (report("amp_backoff", scale=0.5), ["loss_scale"]),
        (report(dfl=5.1), ["dfl_high"]),
        (report(dfl=4.9, cpe=0.0), ["cpe_zero"]),
        (replace(report(), saturated={"dfl": 0.06, "cpe": 0.04}), ["saturated"]),
        (replace(report(), saturated={"dfl": 0.05}), []),
        (report("bad_loss", norm=math.nan, total=math.nan), []),
    ],
)
def test_a_step_raises_its_red_flags(tmp_path, seen, flags):
    assert names(StepGuard(Guard(), tmp_path), seen) == flags


def test_the_flag_of_saturated_rows_names_the_losses_and_their_share(tmp_path):
    [flag] = StepGuard(Guard(), tmp_path).see(replace(report(), saturated={"dfl": 0.25, "cpe": 0.0}), warm=False)
    assert "dfl 25%" in flag.message and "cpe" not in flag.message


def test_dfl_and_cpe_are_not_judged_during_warm_up(tmp_path):
    assert names(StepGuard(Guard(), tmp_path), report(dfl=9.0, cpe=0.0), warm=False) == []


def test_clipping_is_judged_after_warm_up_and_norms_always(tmp_path):
    guard = StepGuard(Guard(), tmp_path)
    assert names(guard, report(ratio=101), warm=False) == []
    assert names(guard, report(norm=1.01e4, ratio=101), report(norm=1.01e5, ratio=101), warm=False) == [
        "norm_warning",
        "norm_explosion",
    ]
    assert names(guard, report(ratio=101)) == ["clip_ratio"]  # not counted as raised before


def test_a_jump_of_the_loss_is_told_against_its_running_mean(tmp_path):
    guard = StepGuard(Guard(), tmp_path)
    assert names(guard, *[report(total=1.0)] * 30, report(total=1.9)) == []
    assert names(guard, report(total=2.5)) == ["loss_jump"]


def test_mostly_clipped_steps_are_told_once_in_a_hundred(tmp_path):
    guard = StepGuard(Guard(window=10), tmp_path)
    assert names(guard, *[report(ratio=2.0)] * 60, warm=False) == [], "the first gradients are large by nature"
    assert names(guard, *[report(ratio=2.0)] * 60).count("clipped_share") == 1
    assert names(guard, *[report(ratio=2.0)] * 60).count("clipped_share") == 1


@pytest.mark.parametrize("outcome", guards.REJECTED)
def test_too_many_rejections_in_a_row_end_the_run_with_advice(tmp_path, outcome):
    guard = StepGuard(Guard(max_rejected_in_row=3), tmp_path)
    names(guard, *[report(outcome)] * 2)
    assert guard.verdict() is None
    names(guard, report(outcome))
    assert outcome in guard.verdict() and guards.ADVICE[outcome] in guard.verdict()


def test_a_committed_step_and_a_backoff_end_a_row_of_rejections(tmp_path):
    guard = StepGuard(Guard(max_rejected_in_row=3), tmp_path)
    names(
        guard, *[report("bad_loss")] * 2, report(), *[report("bad_grad")] * 2, report("amp_backoff"), report("no_grad")
    )
    assert guard.verdict() is None and guard.in_row == 1


def test_the_last_norms_are_those_of_committed_steps(tmp_path):
    guard = StepGuard(Guard(), tmp_path)
    names(
        guard,
        report(norm=2.0),
        report("bad_grad", norm=math.inf),
        report("amp_backoff", norm=math.nan),
        report(norm=3.0),
    )
    assert list(guard.last_norms) == [2.0, 3.0]


def test_a_share_of_rejections_ends_the_run_and_backoffs_do_not_count(tmp_path):
    guard = StepGuard(Guard(max_rejected_share=0.2, window=10), tmp_path)
    names(guard, *[report("amp_backoff")] * 30)
    assert guard.verdict() is None
    for _ in range(3):
        names(guard, *[report()] * 2, report("bad_grad"))
    assert "3 of the last 10" in guard.verdict()


def test_a_loss_scale_that_stays_low_ends_the_run(tmp_path):
    guard = StepGuard(Guard(max_low_scale=4), tmp_path)
    names(guard, *[report("amp_backoff", scale=0.5)] * 3)
    assert guard.verdict() is None
    names(guard, report("amp_backoff", scale=0.25))
    assert "loss scale stayed below 1" in guard.verdict()


def test_going_back_helps_against_data_and_weights_only(tmp_path):
    guard = StepGuard(Guard(max_low_scale=3, max_rejected_in_row=2), tmp_path)
    names(guard, *[report("bad_loss")] * 2)
    assert guard.verdict() and guard.curable
    names(guard, report("no_grad"))
    assert guard.verdict() and not guard.curable
    names(guard, report(), *[report("amp_backoff", scale=0.5)] * 3)
    assert guard.verdict() and not guard.curable
    totals = dict(guard.totals)
    guard.pardon()
    assert guard.verdict() is None and guard.totals == totals
    names(guard, report("bad_grad"))
    assert guard.verdict() is None, "it begins to count anew"


def test_incidents_are_bounded_and_a_full_disk_is_a_warning(tmp_path, caplog):
    guard, batch = StepGuard(Guard(), tmp_path), ToyTask().batch(7)
    paths = [guard.record(report("bad_grad", step=3, norm=math.inf), [batch], b, 1) for b in range(30)]
    assert len({p for p in paths if p}) == guards.INCIDENTS and paths[-1] is None
    content = json.loads(paths[0].read_text())
    assert (content["culprit"], content["batches"], content["grad_l2_preclip"]) == ("head.weight", [7], None)
    assert content["evidence"] == {"parameter": "head.weight", "cause": "loss"}
    assert StepGuard(Guard(), tmp_path).record(report("amp_backoff"), [batch], 0, 1) is None
    blocked = StepGuard(Guard(), tmp_path / "file")
    (tmp_path / "file").write_text("")
    assert blocked.record(report("bad_grad"), [batch], 0, 1) is None and "not written" in caplog.text


def test_the_state_goes_through_a_checkpoint(tmp_path):
    one, two = StepGuard(Guard(), tmp_path), StepGuard(Guard(), tmp_path)
    names(one, *[report(total=t, ratio=2) for t in range(40)], report("bad_loss"), report(norm=1e6))
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.state_dict() == one.state_dict()
    assert names(one, report(norm=1e6), report(total=1e3)) == names(two, report(norm=1e6), report(total=1e3))


def test_json_has_no_nan():
    assert jsonable({"a": [math.nan, 1.0, (math.inf, "x")]}) == {"a": [None, 1.0, [None, "x"]]}
