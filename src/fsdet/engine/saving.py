# SPDX-License-Identifier: AGPL-3.0-or-later
"""When a run is saved, and from which save it goes on: at a resume the newest, at a rewind the last good one."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsdet.config import Save
from fsdet.engine import agreement, checkpoint
from fsdet.engine.state import RunState

log = logging.getLogger("fsdet")
RETRY_SECONDS = 60.0  # after a save that failed


class Saver:
    """Saves `state` into `folder` as section `save` asks.

    Until a save is written, the run's beginning is kept in memory for a rewind. Of several processes the leading one
    writes and reads, and the others are given what it read.
    """

    def __init__(self, state: RunState, folder: Path, options: Save) -> None:
        self.state, self.folder, self.options = state, folder, options
        self.peers = state.controller.peers
        self.writer = checkpoint.Writer(folder, options.keep)
        self._at, self._step = time.monotonic(), 0
        self._beginning: dict[str, Any] | None = None

    def begin(self) -> None:
        """A fresh run: keep where it starts."""
        if self.peers.leads:
            self._beginning = checkpoint.snapshot(self.state.take())

    def resume(self) -> None:
        """Go on from the newest intact checkpoint of the folder.

        Raises:
            CheckpointError: there is none, or it is of another run.
        """
        path, saved = checkpoint.newest(self.folder) if self.peers.leads else (self.folder, None)
        saved = self.peers.given(saved)
        controller, resolved = self.state.controller, self.state.resolved
        agreement.check_fits(
            path, saved, controller.task.model, controller.optimizer, controller.precision,
            controller.task.describe(), resolved,
        )  # fmt: skip
        self.state.put(saved)
        told = agreement.not_exact(saved, resolved, self.peers.world)
        if told and self.peers.leads:
            log.warning("%s", told)
        self._step = saved["step"]
        log.info("resumed from %s at step %d, batch %d", path, saved["step"], saved["batch"])
        now, position = controller.task.batches_per_epoch, self.state.position
        if now != (before := saved.get("batches_per_epoch", now)):
            position.carry_over(before, now)
            log.log(logging.WARNING if self.peers.leads else logging.INFO,
                        "an epoch has %d batches, not %d: the run goes on at batch %d, as far into the same epoch, and "
                        "is not exact", now, before, position.batch)  # fmt: skip

    def due(self) -> bool:
        """Whether save.every_steps or save.every_minutes asks for one now, or one that failed is to be tried again."""
        every, minutes, step = self.options.every_steps, self.options.every_minutes, self.state.controller.step
        waited = time.monotonic() - self._at
        by_step = every > 0 and step % every == 0 and step > self._step
        by_time = minutes > 0 and waited >= 60 * minutes
        return by_step or by_time or (self.writer.failures > 0 and waited >= RETRY_SECONDS)

    def unsaved(self) -> bool:
        """Whether steps were committed since the last save."""
        return self.state.controller.step > self._step

    def save(self, best: bool = False, wait: bool = False) -> None:
        """Save now; `best` also replaces best.pt; see `checkpoint.Writer.save`."""
        self._at, self._step = time.monotonic(), self.state.controller.step
        if not self.peers.leads:
            return
        self.writer.save(self.state.take(), best=best, wait=wait)
        if self.writer.written is not None:
            self._beginning = None

    def good(self) -> dict[str, Any] | None:
        """The last good checkpoint, the same in all processes. See `_good`."""
        return self.peers.given(self._good() if self.peers.leads else None)

    def _good(self) -> dict[str, Any] | None:
        """The last good checkpoint: intact, and saved while no step had been rejected since the last committed one.

        Where the run went back to that one already and has saved no other since, one before it is taken, if there is
        one. Without a good one the newest will do. None: there is none, and the run is still where it began.
        """
        self.writer.join()
        newest = fallback = None
        tried = [rewind["to_step"] for rewind in self.state.position.rewinds[-1:]]
        for saved in self._candidates():
            newest = newest or saved
            if saved["guard"]["in_row"]:
                continue
            if newest["step"] not in tried or saved["step"] < newest["step"]:
                return saved
            fallback = fallback or saved
        return fallback or newest

    def _candidates(self) -> Iterator[dict[str, Any]]:
        """Newest first; a save that was cut short may have left a file of a place that this run has not come to."""
        now = self.state.position
        for _, saved in checkpoint.intact(self.folder):
            rewinds = len(saved["position"].get("rewinds", ()))
            if saved["batch"] <= now.batch and rewinds <= len(now.rewinds):
                yield saved
        if self._beginning is not None and self.state.controller.step > self._beginning["step"]:
            yield self._beginning
