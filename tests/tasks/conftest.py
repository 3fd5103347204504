# SPDX-License-Identifier: AGPL-3.0-or-later
"""A small drawn set and a config that a step takes a moment on."""

import os
from pathlib import Path

import pytest

from fsdet import config, tasks
from fsdet.data.synthetic import draw_demo


@pytest.fixture(scope="session")
def small_demo(tmp_path_factory):
    """data.yaml of a demo set of a few images a split."""
    out = tmp_path_factory.mktemp("data") / "demo"
    return draw_demo(out, sizes={"train": 48, "val": 6, "test": 8, "support": 24}, processes=1)


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """{task: data.yaml} of small sets for the tasks beside few-shot detection."""
    from tasks import others

    return others.draw(tmp_path_factory.mktemp("others"))


@pytest.fixture
def of_task(sets, tmp_path):
    """Call with a task beside few-shot detection and overrides: its small config, whose run folder is `run`."""
    from tasks import others

    return lambda name, *more: others.settings(name, sets[name], tmp_path / "run", *more)


@pytest.fixture
def free_fsync(monkeypatch):
    """Files are written without a wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def small(data: Path, folder: Path, *overrides: str) -> config.Config:
    """A config of 96 px images and two steps."""
    plain = [f"data.path={data}", f"run.dir={folder}", "run.threads=1", "data.image_size=96", "data.support_size=64",
             "data.workers=0", "episode.queries=2", "optim.steps=2", "eval.every=0", "optim.warmup_epochs=0",
             "model.embed_dim=16", "model.refine=true", "model.objectness=true"]  # fmt: skip
    return config.load(None, [*plain, *overrides])


@pytest.fixture
def settings(small_demo, tmp_path):
    """Call with overrides: a small config whose run folder is `run`."""
    return lambda *overrides: small(small_demo, tmp_path / "run", *overrides)


@pytest.fixture(scope="session")
def best(small_demo, tmp_path_factory):
    """best.pt of two steps of stage 1: its detections mean nothing, its prototypes are real ones."""
    return tasks.build(small(small_demo, tmp_path_factory.mktemp("runs") / "one")).fit().best
