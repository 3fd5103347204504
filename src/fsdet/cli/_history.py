# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a run folder tells afterwards, read from its files without the model."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsdet.errors import UserError, explain

Row = dict[str, Any]


@dataclass(frozen=True)
class History:
    """Rows of metrics.jsonl, by kind in their order, and the incidents' report files."""

    folder: Path
    rows: dict[str, list[Row]]
    finished: bool
    incidents: tuple[Path, ...]

    @property
    def outcomes(self) -> Counter[str]:
        """How the logged steps ended; every rejected step is logged, committed ones are sampled."""
        return Counter(row["outcome"] for row in self.rows.get("step", []))

    @property
    def last_step(self) -> int:
        return max((row.get("step", 0) for rows in self.rows.values() for row in rows), default=0)

    def flags(self) -> dict[str, list[Row]]:
        """Red flags by name, each with every time it was raised."""
        found: dict[str, list[Row]] = {}
        for row in self.rows.get("flag", []):
            found.setdefault(row["flag"], []).append(row)
        return found


def read_history(folder: Path) -> History:
    """Read a run folder; a line that a crash cut short is passed over.

    Raises:
        UserError: no run folder.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise UserError(
            explain("a run folder with metrics.jsonl", "none", str(folder), "name a folder in checkpoints/")
        )
    rows: dict[str, list[Row]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.setdefault(str(row.get("kind")), []).append(row)
    from fsdet.engine.checkpoint import is_finished

    incidents = tuple(sorted((folder / "incidents").glob("*/report.json")))
    return History(folder, rows, is_finished(folder), incidents)
