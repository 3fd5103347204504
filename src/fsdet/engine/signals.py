# SPDX-License-Identifier: AGPL-3.0-or-later
"""SIGTERM and SIGINT: the first asks the loop to stop after the step, the second leaves at once."""

import logging
import os
import signal
import threading
from types import FrameType

log = logging.getLogger("fsdet")
ASKED = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """`received` is the number of the first signal, or 0. Outside the main thread it listens to nothing."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in ASKED}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = {}

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            os._exit(128 + number)
        self.received = number
