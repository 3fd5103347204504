# SPDX-License-Identifier: AGPL-3.0-or-later
"""Adaptive clip norms are numpy's percentile and z-score of the last norms, and survive a resume to the last bit."""

import json
import math

import numpy as np
import pytest

from engine.test_trainer import Power, pull_the_plug_at, rows, same
from engine.toy import ToyTask, optim, trainer
from fsdet.config import Save
from fsdet.engine.checkpoint import load
from fsdet.engine.clipping import LEAST, Clipping

RNG = np.random.default_rng(0)
NORMS = [float(v) for v in RNG.lognormal(0, 1, 60)]


def filled(kind: str, norms=NORMS, limit: float = 0.0, **more) -> Clipping:
    clipping = Clipping(optim(clip_adaptive=kind, **{"clip_window": 50, **more}))
    for norm in norms:
        clipping.add(norm, limit)
    return clipping


@pytest.mark.parametrize("share", [0.0, 0.1, 0.95, 1.0])
def test_a_percentile_is_numpys_over_the_window(share):
    clipping = filled("percentile", clip_percentile=share)
    assert clipping.limit(0.0) == pytest.approx(np.quantile(NORMS[-50:], share), rel=1e-12)


def test_a_z_score_is_that_many_deviations_above_the_mean():
    expected = np.mean(NORMS[-50:]) + 2.5 * np.std(NORMS[-50:])
    assert filled("zscore", clip_zscore=2.5).limit(0.0) == pytest.approx(expected, rel=1e-12)


def test_a_spike_does_not_widen_the_band_that_clips_it():
    clipping = filled("zscore", [1.0, 1.2] * 20)
    limit = clipping.limit(0.0)
    clipping.add(1e6, limit)
    assert clipping.limit(0.0) < 1.05 * limit
    raw = filled("percentile", [1.0, 1.2] * 20)
    raw.add(1e6, raw.limit(0.0))
    assert raw.limit(0.0) == pytest.approx(1.2), "one of 41 is above the 95th percentile"


def test_the_fixed_norm_is_a_ceiling_and_rules_alone_until_enough_is_known():
    assert filled("percentile", NORMS[: LEAST - 1]).limit(7.0) == 7.0
    assert filled("percentile", [100.0] * LEAST).limit(7.0) == 7.0
    assert filled("percentile", [2.0] * LEAST).limit(7.0) == 2.0
    assert filled("none").limit(7.0) == 7.0 and filled("none").limit(0.0) == 0.0 and not filled("none").norms
    assert filled("percentile", [0.0] * LEAST).limit(7.0) == 7.0, "norms of 0 say nothing"
    assert filled("zscore", [2.0] * 3, clip_window=3).limit(7.0) == 2.0, "a window shorter than that is full"


def test_the_state_is_plain_and_complete():
    one, two = filled("zscore", limit=3.0), Clipping(optim(clip_adaptive="zscore", clip_window=50))
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.limit(0.0) == one.limit(0.0)
    two.load_state_dict({})
    assert two.limit(0.0) == 0.0


@pytest.mark.parametrize("kind", ["percentile", "zscore"])
def test_a_resumed_run_clips_as_the_straight_one(tmp_path, kind):
    common = {"changes": {"clip_adaptive": kind, "clip_window": 4, "clip_norm": 0, "clip_percentile": 0.4,
                          "clip_zscore": 0.2}, "save": Save(every_steps=2)}  # fmt: skip
    trainer(ToyTask(), tmp_path / "a", **common).fit()
    with pytest.raises(Power):
        trainer(pull_the_plug_at(ToyTask(), 8), tmp_path / "b", **common).fit()
    resumed = trainer(ToyTask(), tmp_path / "b", resume=True, **common)
    assert len(resumed.clipping.norms) == 4
    resumed.fit()
    assert same(load(tmp_path / "a/last.pt"), load(tmp_path / "b/last.pt"))
    told = rows(tmp_path / "a", "step")
    before = [r["grad_l2_preclip"] for r in told]
    assert all(r["clip_ratio"] == 1.0 for r in told[:4]) and any(r["clip_ratio"] > 1.0 for r in told[4:])
    for i, r in enumerate(told[4:], 4) if kind == "percentile" else ():
        limit = float(np.quantile(before[i - 4 : i], 0.4))
        assert r["grad_l2_postclip"] == pytest.approx(min(before[i], limit), rel=1e-6)
    assert f"threshold {math.floor(told[-1]['grad_l2_postclip'] * 10) / 10}"[:11] in (
        tmp_path / "a/training_debug.log").read_text()  # fmt: skip
