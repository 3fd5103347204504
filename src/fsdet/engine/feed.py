# SPDX-License-Identifier: AGPL-3.0-or-later
"""Batches in order of their index, from loader workers, the same whatever their number.

`task.batch(i)` is a pure function of i, so the position in the data is one integer and a resume starts there.
"""

import itertools
import logging
import os
import signal
import threading
from collections.abc import Iterator, Set
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fsdet.engine.quarantine import Quarantine
from fsdet.errors import MISTAKES, RunFailed, are, counted, told
from fsdet.types import Replaced, Task

log = logging.getLogger("fsdet")
RESTARTS = 3  # of a dead worker pool at one position
HUNG_SECONDS, CHECK_SECONDS = 600, 5


class Failed:
    """What stands for a batch that could not be made; the step rejects it as bad_input."""

    def __init__(self, index: int, reason: str, replaced: tuple[Replaced, ...] = ()) -> None:
        self.index, self.reason, self.image_ids, self.replaced = index, reason, (f"batch {index}",), replaced

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
            return Failed(index, told(error), getattr(error, "replaced", ()))


class _Positions(Sampler):
    def __init__(self, start: int, stop: int | None, skipped: Set[int] = frozenset()) -> None:
        self.start, self.stop, self.skipped = start, stop, skipped

    def __iter__(self) -> Iterator[int]:
        indices = itertools.count(self.start) if self.stop is None else range(self.start, self.stop)
        return (index for index in indices if index not in self.skipped)


class Feed:
    """Iterate batches `start`, start + 1, ... up to `stop` (None: without end); `close` ends the workers.

    `skipped` ones are not even made. `seek` goes on elsewhere, in the iteration that is under way.

    workers: loader processes of one thread each, at most one a CPU; 0 makes batches in this process. A pool that dies,
    or gives nothing for `timeout` seconds, is started again at the same position, at most RESTARTS times in a row.
    quarantine: hears of every batch before it is handed out.
    """

    def __init__(
        self,
        task: Task,
        start: int,
        stop: int | None,
        workers: int,
        pin: bool = False,
        quarantine: Quarantine | None = None,
        timeout: float = HUNG_SECONDS,
    ) -> None:
        self.task, self.next, self.stop, self.workers, self.pin = task, start, stop, _at_most_cpus(workers), pin
        self.skipped: Set[int] = frozenset()
        self.quarantine, self.timeout = quarantine, timeout
        self._rows: Iterator[Any] | None = None

    def __iter__(self) -> Iterator[Any]:
        failures = 0
        while self._is_more():
            try:
                batch = self._take(alone=failures > 1)
            except (RuntimeError, OSError, EOFError) as error:  # what a killed or hung worker looks like from here
                failures += 1
                _kill(self._rows)
                self.close()
                if failures > RESTARTS:
                    raise RunFailed(
                        f"loader workers died {failures} times in a row at batch {self.next}; last: {error}. "
                        "Next: try data.workers=0 to see the reason"
                    ) from error
                log.warning("loader workers died at batch %d (%s); starting them again there", self.next, error)
                continue
            if failures > 1:
                self.close()  # the next batches come from all workers again
            failures = 0
            if self.quarantine is not None:
                self.quarantine.see(batch, self.next)
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

    def _take(self, alone: bool) -> Any:
        """The next batch. A dead worker is noticed within CHECK_SECONDS, one that hangs is killed after `timeout`.

        Killed from beside, by a timer: a worker that is stopped after it has announced a batch is waited for in a read
        that has no time limit of its own.
        """
        rows = self._open(alone)
        if not self.workers:
            return next(rows)
        struck = threading.Event()
        watch = threading.Timer(self.timeout, lambda: (struck.set(), _kill(rows)))
        watch.daemon = True
        watch.start()
        try:
            return _patiently(rows)
        except (RuntimeError, OSError, EOFError) as error:
            if struck.is_set():
                raise RuntimeError(f"no batch within {self.timeout:g} s") from error
            raise
        finally:
            watch.cancel()
            watch.join()

    def _open(self, alone: bool) -> Iterator[Any]:
        """The loader's iterator; `alone`: one worker that is handed one batch, so that its death names the batch."""
        if self._rows is None:
            check = min(CHECK_SECONDS, self.timeout)
            extra = {"prefetch_factor": 1 if alone else 2, "timeout": check} if self.workers else {}
            loader = DataLoader(
                _Batches(self.task),
                batch_size=None,
                sampler=_Positions(self.next, self.next + 1 if alone else self.stop, self.skipped),
                num_workers=min(1, self.workers) if alone else self.workers,
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


def _patiently(rows: Iterator[Any]) -> Any:
    """The next of a loader that gives up after each CHECK_SECONDS, if only to see whether its workers are alive."""
    while True:
        try:
            return next(rows)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise


def _kill(rows: Iterator[Any] | None) -> None:
    """End workers that may not answer: one that is stopped would outlive a polite request for ever."""
    for worker in getattr(rows, "_workers", ()):
        if worker.is_alive():
            worker.kill()


def _at_most_cpus(workers: int) -> int:
    """`workers`, or as many as this process may use CPUs: more of them wait for each other."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers > cpus:
        log.info("data.workers is %d, but there %s %s: %s", workers, are(cpus), counted(cpus, "CPU"),
                 counted(cpus, "loader worker"))  # fmt: skip
    return min(workers, cpus)


def _quiet_worker(worker: int) -> None:
    """One thread, and no share in the parent's signal handling: Ctrl-C reaches the whole process group."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
