# SPDX-License-Identifier: AGPL-3.0-or-later
"""A run's memory, descriptors and logs do not grow with its length; the measuring sees it when they do."""

import pytest


@pytest.fixture(scope="module")
def endurance(module):
    return module("endurance")


def test_what_grows_is_seen_and_what_does_not_is_not(endurance):
    Sample, grown = endurance.Sample, endurance.grown
    assert grown([Sample(i, 1 << 30, 20, 5) for i in range(50)]) == []
    leak = [Sample(i, (1 << 30) + (i << 20), 20 + i // 10, 5) for i in range(50)]
    assert [text.split()[0] for text in grown(leak)] == ["rss", "files"]
    warm = [Sample(i, (1 << 30) - (max(0, 8 - i) << 26), 20, 5) for i in range(50)]
    assert grown(warm) == [], "what is filled at the start is no leak"


@pytest.mark.slow
@pytest.mark.parametrize("workers, steps", [(0, 1500), (2, 600)])
def test_a_short_endurance_run_is_flat(endurance, tmp_path, workers, steps):
    samples, size = endurance.endure(steps, workers, tmp_path / "run")
    assert len(samples) >= 50 and endurance.grown(samples) == []
    assert size < endurance.LINE * steps * (1 / 10 + 1 / endurance.REJECTED) + 200_000
