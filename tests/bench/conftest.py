# SPDX-License-Identifier: AGPL-3.0-or-later
"""The measuring scripts as modules, and a small drawn set."""

import importlib
from pathlib import Path

import pytest

from fsdet.data import sources
from fsdet.data.synthetic import draw_demo

BENCH = Path(__file__).resolve().parents[2] / "scripts/bench"


@pytest.fixture(scope="session")
def module():
    """module("grid") is scripts/bench/grid.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        yield importlib.import_module


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A drawn set with 2 shots of every novel class; its data YAML."""
    sizes = {"train": 6, "test": 6, "support": 16}
    return draw_demo(tmp_path_factory.mktemp("bench") / "demo", processes=1, sizes=sizes)


@pytest.fixture
def data(demo):
    return sources.load(demo)
