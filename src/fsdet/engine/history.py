# SPDX-License-Identifier: AGPL-3.0-or-later
"""A run folder read back from its text files, without the model; a run may be finished, under way, or killed."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdet.engine.checkpoint import is_finished
from fsdet.engine.guard import REJECTED
from fsdet.errors import UserError, explain

Row = dict[str, Any]


@dataclass(frozen=True)
class History:
    """Rows of metrics.jsonl, by kind in their order; the incidents' report files; seconds since the last row."""

    folder: Path
    rows: dict[str, list[Row]]
    finished: bool
    incidents: tuple[Path, ...]
    age: float = 0.0

    @property
    def steps(self) -> list[Row]:
        return self.rows.get("step", [])

    @property
    def committed(self) -> list[Row]:
        """The committed steps that were logged: the first, and every log.every-th."""
        return [row for row in self.steps if row["outcome"] == "committed"]

    @property
    def rejected(self) -> list[Row]:
        """Every rejected step; fp16 finding its loss scale is none."""
        return [row for row in self.steps if row["outcome"] in REJECTED]

    @property
    def outcomes(self) -> Counter[str]:
        """How the logged steps ended; every rejected step is logged, committed ones are sampled."""
        return Counter(row["outcome"] for row in self.steps)

    @property
    def rewinds(self) -> list[Row]:
        """Each return to a checkpoint; the rejected steps that led to it are not among the rows any more."""
        return self.rows.get("rewind", [])

    @property
    def ending(self) -> str | None:
        """Why the run gave up or stopped; None where it is finished, under way, or was killed."""
        rows = self.rows.get("end", [])
        return str(rows[-1]["reason"]) if rows and not self.finished else None

    @property
    def last_step(self) -> int:
        return max((row.get("step", 0) for rows in self.rows.values() for row in rows), default=0)

    def flags(self) -> dict[str, list[Row]]:
        """Red flags by name, each with every time it was raised."""
        found: dict[str, list[Row]] = {}
        for row in self.rows.get("flag", []):
            found.setdefault(row["flag"], []).append(row)
        return found

    def first_probe(self) -> list[Row]:
        """The per-loss rows of the first probed batch."""
        rows = self.rows.get("probe", [])
        return [row for row in rows if row["batch"] == rows[0]["batch"]]


def read_history(folder: Path) -> History:
    """Read a run folder; a line that a crash cut short, or that is being written, is passed over.

    Raises:
        UserError: no run folder.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(
            explain("a run folder with metrics.jsonl", "none", str(folder), "name a folder in checkpoints/")
        )
    rows: dict[str, list[Row]] = {}
    for row in parsed(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        rows.setdefault(str(row.get("kind")), []).append(row)
    incidents = tuple(sorted((folder / "incidents").glob("*/report.json"), key=_number))
    return History(folder, rows, is_finished(folder), incidents, max(0.0, time.time() - path.stat().st_mtime))


def parsed(lines: Sequence[str]) -> list[Row]:
    """The lines that are whole JSON objects."""
    out = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            out.append(row)
    return out


def _number(path: Path) -> tuple[int, str]:
    """Incidents in the order of their steps: step_9 before step_10."""
    digits = path.parent.name.removeprefix("step_").partition("_")[0]
    return int(digits) if digits.isdigit() else 0, path.parent.name
