# SPDX-License-Identifier: AGPL-3.0-or-later
"""Few-shot dual-head object detection.

Importing the package is light (no torch). It sets the environment switches below where the user has not, because
they only work before torch and ultralytics are imported.
"""

import os

__version__ = "0.1.0"

_CACHE = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")

# why each: ultralytics looks hosts up on import, installs packages at run time, and writes settings under HOME;
# OpenMP's threads that spin for ever make a step on a busy small machine ten times slower, threads that never spin make
# one on an idle machine 1.6 times slower
SWITCHES = {
    "YOLO_OFFLINE": "true",
    "YOLO_AUTOINSTALL": "false",
    "YOLO_CONFIG_DIR": os.path.join(_CACHE, "fsdet"),
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "1000",
}
for _name, _value in SWITCHES.items():
    os.environ.setdefault(_name, _value)


def __getattr__(name: str) -> object:
    """`fsdet.Predictor`, whose import takes torch along."""
    if name != "Predictor":
        raise AttributeError(f"module 'fsdet' has no attribute '{name}'")
    from fsdet.tasks.api import Predictor

    return Predictor
