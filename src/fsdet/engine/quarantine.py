# SPDX-License-Identifier: AGPL-3.0-or-later
"""Samples that a training cannot use: each told once, counted, and too many of them end the run.

Which sample stands in the place of one is the task's to decide, where batches are made; here is what it comes to.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsdet.command import checking, typed
from fsdet.errors import RunFailed, counted
from fsdet.types import Task

log = logging.getLogger("fsdet")
LIST = "quarantine.jsonl"


class Quarantine:
    """The ledger of a run. Its state is part of a checkpoint, so that a resumed run goes on counting.

    Args:
        folder: the run folder, which gets quarantine.jsonl when there is something to tell.
        samples: how many samples the training draws from; 0: an epoch's draws, as the batches show them.
        share: of them, how many may be unusable; one always may, unless it is 0.
        per_epoch: batches in an epoch.
        tells: whether this process logs and writes what it counts.
        check: the command that finds all unusable samples, where the data is known.
    """

    def __init__(self, folder: Path, samples: int, share: float, per_epoch: int = 1, tells: bool = True,
                 check: str = "") -> None:  # fmt: skip
        self.tells, self.check = tells, check or "read all samples with fsdet data check"
        self.path, self.samples, self.share, self.per_epoch = folder / LIST, samples, share, per_epoch
        self.found: dict[str, dict[str, Any]] = {}

    @classmethod
    def of(cls, task: Task, folder: Path, share: float, tells: bool, resolved: Mapping[str, Any]) -> "Quarantine":
        """That of a task, which may tell how many samples it draws from, and of a run's resolved configuration."""
        data = (resolved.get("data") or {}).get("path")
        check = checking(data, resolved.get("task")) if data else ""
        return cls(folder, getattr(task, "samples", 0), share, task.batches_per_epoch, tells, check)

    def see(self, batch: Any, index: int) -> None:
        """Count what could not be used for batch `index`, which is about to be trained on.

        Raises:
            RunFailed: more samples than `share` of all cannot be used; names the last and the list.
        """
        fresh = [item for item in getattr(batch, "replaced", ()) if item.sample not in self.found]
        for item in fresh:
            if item.sample not in self.found:
                self.found[item.sample] = {"batch": index, "reason": item.reason}
                if self.tells:
                    log.warning("quarantined at batch %d: %s", index, self._told(item.sample))
                    self._write("a", self._line(item.sample))
        samples = self.samples or self.per_epoch * len(getattr(batch, "image_ids", ()))
        if fresh and len(self.found) > self.allowed(samples):
            raise RunFailed(
                f"training stopped before batch {index}: {len(self.found)} of {counted(samples, 'sample')} cannot be "
                f"used, and guard.max_quarantined={self.share:g} allows {self.allowed(samples)}\n"
                f"last: {self._told(fresh[-1].sample)}\n"
                f"report: {self.path}\nnext: {self.check}, mend or remove them, "
                f"then start again, with {typed('fsdet train --resume {}', self.path.parent)} where it has saved"
            )

    def allowed(self, samples: int) -> int:
        """How many of `samples` may be unusable: one damaged file alone ends no run."""
        return max(1, int(self.share * samples)) if self.share else 0

    def _told(self, sample: str) -> str:
        reason = self.found[sample]["reason"]
        return reason if sample in reason else f"{sample}: {reason}"

    def _line(self, sample: str) -> str:
        return json.dumps({"sample": sample, **self.found[sample]}) + "\n"

    def _write(self, mode: str, text: str) -> None:
        try:
            with open(self.path, mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            log.warning("%s cannot be written (%s)", LIST, error)

    def state_dict(self) -> dict[str, Any]:
        return {"found": {sample: dict(entry) for sample, entry in self.found.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting; a run that was ended by its count starts to count anew, its files having been mended."""
        found = {sample: dict(entry) for sample, entry in state.get("found", {}).items()}
        if self.samples and len(found) > self.allowed(self.samples):
            if self.tells:
                told = f"{counted(len(found), 'sample')} {'was' if len(found) == 1 else 'were'} in quarantine"
                log.warning("%s when the run ended: tried again", told)
            found = {}
        self.found = found
        if self.tells and (found or self.path.exists()):
            self._write("w", "".join(map(self._line, found)))
