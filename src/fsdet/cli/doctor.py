# SPDX-License-Identifier: AGPL-3.0-or-later
"""Example: fsdet doctor checkpoints/stage2
What went wrong in a run and what to change, from its own files; the run may be under way, finished or killed."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fsdet.errors import counted

if TYPE_CHECKING:
    from fsdet.engine.history import History

SHOWN = 5  # incidents listed
QUIET = 120.0  # seconds without a new row after which a run that did not finish is taken for dead


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """RUN"""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis."""
    from fsdet.engine.history import read_history
    from fsdet.tasks.diagnosis import diagnose

    history = read_history(args.run)
    result = diagnose(history)
    lines = [_state(history, bool(result.findings))]
    lines += [f"\n{finding}" for finding in result.findings]
    if result.findings:
        lines += [*_incidents(history), *_flags(history)]
    print("\n".join([*lines, *result.remarks]))
    return 0


def _state(history: "History", ill: bool) -> str:
    """How far the run is, and whether anything is wrong."""
    rejected = len(history.rejected)
    taken = f"{history.folder}: {counted(history.last_step, 'step')}, {rejected or 'none'} rejected"
    told = taken if ill or history.flags() else f"{taken}, no red flag"
    if history.finished:
        return told
    if history.ending:
        return f"{told}\nended: {history.ending}"
    if history.age < QUIET:
        return f"{told}; under way, last line {history.age:.0f} s ago"
    return f"{told}; not finished, last line {_ago(history.age)} ago: stopped or killed"


def _ago(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"


def _incidents(history: "History") -> list[str]:
    from fsdet.tasks.diagnosis import culprit_of

    if not history.incidents:
        return []
    rest = len(history.incidents) - SHOWN
    lines = [f"  {path}: {culprit_of(path)}" for path in history.incidents[:SHOWN]]
    return ["\nincidents:", *lines, *([f"  and {rest} more"] if rest > 0 else [])]


def _flags(history: "History") -> list[str]:
    lines = []
    for name, rows in history.flags().items():
        first, last = rows[0]["step"], rows[-1]["step"]
        place = f"step {first}" if first == last else f"steps {first} to {last}, {len(rows)} times"
        lines.append(f"  {name} ({place}): {rows[-1]['message']}")
    return ["\nred flags raised while it ran:", *lines] if lines else []
