# SPDX-License-Identifier: AGPL-3.0-or-later
"""When a run is saved, and from which save it goes on: at a resume the newest, at a rewind the last good one."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsdet.config import Save
from fsdet.engine import agreement, checkpoint
from fsdet.engine.records import Cut
from fsdet.engine.state import RunState
from fsdet.errors import RunFailed

log = logging.getLogger("fsdet")
RETRY_SECONDS = 60.0  # after a save that failed


class Saver:
    """Saves `state` into `folder` as section `save` asks.

    Until the first good save is written, the run's beginning is kept in memory for a rewind.
    """

    def __init__(self, state: RunState, folder: Path, options: Save) -> None:
        self.state, self.folder, self.options = state, folder, options
        self.writer = checkpoint.Writer(folder, options.keep)
        self._at, self._step = time.monotonic(), 0
        self._beginning: dict[str, Any] | None = None
        self._first_good: int | None = None

    def begin(self) -> None:
        """A fresh run: keep where it starts."""
        self._beginning = checkpoint.snapshot(self.state.take())

    def resume(self) -> Cut:
        """Go on from the newest intact checkpoint of the folder; returns which rows of the log stay.

        Raises:
            CheckpointError: there is none, or it is of another run.
        """
        path, saved = checkpoint.newest(self.folder)
        controller, resolved = self.state.controller, self.state.resolved
        agreement.check_fits(
            path, saved, controller.task.model, controller.optimizer, controller.precision,
            controller.task.describe(), resolved,
        )  # fmt: skip
        self.state.put(saved)
        if told := agreement.not_exact(saved, resolved):
            log.warning("%s", told)
        self._step = saved["step"]
        log.info("resumed from %s at step %d, batch %d", path, saved["step"], saved["batch"])
        now, position = controller.task.batches_per_epoch, self.state.position
        before = saved.get("batches_per_epoch", now)
        if now == before:
            return Cut(saved["batch"], position.rewinds)
        position.carry_over(before, now)
        log.warning("an epoch has %d batches, not %d: the run goes on at batch %d, as far into the same epoch, and is "
                    "not exact", now, before, position.batch)  # fmt: skip
        return Cut(saved["batch"], position.rewinds, now / before)

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
        state = self.state.take()
        if self._first_good is None and _is_good(state):
            self._first_good = self._step
        self.writer.save(state, best=best, wait=wait)
        if self._first_good is not None and self.writer.written is not None:
            if self.writer.written >= self._first_good:
                self._beginning = None

    def save_or_say(self) -> str:
        """Save before giving up, or say why not: a state that is not finite must not hide the diagnosis."""
        try:
            self.save(wait=True)
        except RunFailed as error:
            return f"{error}\n"
        return ""

    def good(self) -> dict[str, Any] | None:
        """The last good checkpoint: intact, and saved when no step had been rejected since the last committed one.

        Where the run went back to that one already and has not come to another since, one before it is taken, if any.
        None: the run has none, and nothing is gained by its beginning.
        """
        self.writer.join()
        first: dict[str, Any] | None = None
        tried = [rewind["to_step"] for rewind in self.state.position.rewinds[-1:]]
        for saved in self._good_ones():
            if first is None and saved["step"] not in tried:
                return saved
            first = first or saved
            if saved["step"] < first["step"]:
                return saved
        return first

    def _good_ones(self) -> Iterator[dict[str, Any]]:
        yield from (saved for _, saved in checkpoint.intact(self.folder) if _is_good(saved))
        if self._beginning is not None and self.state.controller.step > self._beginning["step"]:
            yield self._beginning


def _is_good(state: dict[str, Any]) -> bool:
    return not state["guard"]["in_row"]
