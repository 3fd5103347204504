# SPDX-License-Identifier: AGPL-3.0-or-later
"""Batches in order of their index, from loader workers, the same whatever their number.

`task.batch(i)` is a pure function of i, so the position in the data is one integer and a resume starts there.
"""

import itertools
import logging
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Set
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fsdet.errors import FsdetError, RunFailed
from fsdet.types import Task

log = logging.getLogger("fsdet")
RESTARTS = 3  # of a dead worker pool at one position
HUNG_SECONDS, CHECK_SECONDS = 600, 20
MISTAKES = (
    FsdetError,
    OSError,
    ValueError,
    RuntimeError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
)


class Failed:
    """What stands for a batch that could not be made; the step rejects it as bad_input."""

    def __init__(self, index: int, reason: str) -> None:
        self.index, self.reason, self.image_ids = index, reason, (f"batch {index}",)

    def finite(self) -> bool:
        return False

    def to(self, device: torch.device) -> "Failed":
        return self


class _Batches(Dataset):
    def __init__(self, task: Task) -> None:
        self.task = task

    def __getitem__(self, index: int) -> Any:
        try:
            batch = self.task.batch(index)
            if hasattr(batch, "finite"):
                batch.finite()  # asked here, in the worker, so that the answer travels with the batch
            return batch
        except MISTAKES as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            return Failed(index, f"{type(error).__name__}: {error} ({frame.name}, line {frame.lineno})")


class _Positions(Sampler):
    def __init__(self, start: int, stop: int | None, skipped: Set[int] = frozenset()) -> None:
        self.start, self.stop, self.skipped = start, stop, skipped

    def __iter__(self) -> Iterator[int]:
        indices = itertools.count(self.start) if self.stop is None else range(self.start, self.stop)
        return (index for index in indices if index not in self.skipped)


class Feed:
    """Iterate batches `start`, start + 1, ... up to `stop` (None: without end); `close` ends the workers.

    `skipped` ones are not even made. `seek` goes on elsewhere, in the iteration that is under way.

    workers: loader processes of one thread each, at most one a CPU; 0 makes batches in this process. A pool that dies
    or hangs is started again at the same position, at most RESTARTS times in a row.
    """

    def __init__(self, task: Task, start: int, stop: int | None, workers: int, pin: bool = False) -> None:
        self.task, self.next, self.stop, self.workers, self.pin = task, start, stop, _at_most_cpus(workers), pin
        self.skipped: Set[int] = frozenset()
        self._rows: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        failures = 0
        while self._is_more():
            try:
                batch = self._take()
            except (RuntimeError, OSError, EOFError) as error:  # what a killed or hung worker looks like from here
                failures += 1
                self.close()
                if failures > RESTARTS:
                    raise RunFailed(
                        f"loader workers died {failures} times in a row at batch {self.next}; last: {error}. "
                        "Next: try data.workers=0 to see the reason"
                    ) from error
                log.warning("loader workers died at batch %d (%s); starting them again there", self.next, error)
                continue
            failures = 0
            self.next += 1
            yield batch

    def seek(self, index: int, skipped: Set[int] = frozenset()) -> None:
        """Go on with batch `index`, leaving `skipped` out."""
        self.close()
        self.next, self.skipped = index, skipped

    def _is_more(self) -> bool:
        """Whether there is a next batch; `next` is its index."""
        while self.next in self.skipped:
            self.next += 1
        return self.stop is None or self.next < self.stop

    def _take(self) -> Any:
        """The next batch; a slow worker is waited for, a dead one is noticed within CHECK_SECONDS."""
        for _ in range(HUNG_SECONDS // CHECK_SECONDS):
            try:
                return next(self._open())
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
        raise RuntimeError(f"no batch within {HUNG_SECONDS} s")

    def _open(self) -> Iterator[Any]:
        if self._rows is None:
            extra = {"prefetch_factor": 2, "timeout": CHECK_SECONDS} if self.workers else {}
            loader = DataLoader(
                _Batches(self.task),
                batch_size=None,
                sampler=_Positions(self.next, self.stop, self.skipped),
                num_workers=self.workers,
                pin_memory=self.pin,
                worker_init_fn=_quiet_worker,
                generator=torch.Generator(),
                **extra,
            )
            self._rows = iter(loader)
            if self.workers and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises in the middle of a step
        return self._rows

    def close(self) -> None:
        """Drop the loader; its workers end."""
        self._rows = None


def _at_most_cpus(workers: int) -> int:
    """`workers`, or as many as this process may use CPUs: more of them wait for each other."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers > cpus:
        log.info("data.workers is %d, but there are %d CPUs: %d loader workers", workers, cpus, cpus)
    return min(workers, cpus)


def _quiet_worker(worker: int) -> None:
    """One thread, and no share in the parent's signal handling: Ctrl-C reaches the whole process group."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
