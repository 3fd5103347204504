# SPDX-License-Identifier: AGPL-3.0-or-later
"""One thread, no network, no window, nothing written under HOME: set before torch and ultralytics are imported."""

import os
import tempfile

os.environ.update(
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",
    YOLO_OFFLINE="true",
    YOLO_AUTOINSTALL="false",
    YOLO_CONFIG_DIR=os.path.join(tempfile.gettempdir(), f"fsdet-tests-{os.getuid()}"),
    MPLBACKEND="Agg",
    WANDB_SILENT="true",
)

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """A test that forgets to seed still sees the same numbers on every run."""
    torch.manual_seed(0)
