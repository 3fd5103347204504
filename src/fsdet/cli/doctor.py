# SPDX-License-Identifier: AGPL-3.0-or-later
"""Example: fsdet doctor checkpoints/stage2
Red flags, rejected steps and what to do about them, from the run's own files."""

import argparse
import json
from collections import Counter
from pathlib import Path

from fsdet.cli._history import History, Row, read_history

SHOWN = 5  # incidents listed


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """RUN"""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Print the diagnosis."""
    history = read_history(args.run)
    parts = [_start(history), _rejections(history), _flags(history)]
    lines = [line for part in parts for line in part] or [
        f"{args.run}: {history.last_step} steps, none rejected, no red flag"
    ]
    print("\n".join([*lines, *_calibration(history)]))
    return 0


def _start(history: History) -> list[str]:
    """Losses that were not finite on the first probed batch."""
    first = history.rows.get("probe", [])[:1]
    bad = [
        r["name"] for r in history.rows.get("probe", []) if first and r["step"] == first[0]["step"] and not r["finite"]
    ]
    return [f"not finite on the first batch: {', '.join(bad)}"] if bad else []


def _rejections(history: History) -> list[str]:
    """Outcomes of rejected steps, when they happened, what to do, and the incidents."""
    from fsdet.engine.guard import ADVICE, REJECTED

    bad = [row for row in history.rows.get("step", []) if row["outcome"] in REJECTED]
    if not bad:
        return []
    counts = Counter(row["outcome"] for row in bad)
    lines = [f"rejected steps: {', '.join(f'{name} {n}' for name, n in counts.items())}, {when(bad)}"]
    lines += [f"  {name}: {ADVICE[name]}" for name in counts]
    for path in history.incidents[:SHOWN]:
        lines.append(f"  {path}: {_culprit(path)}")
    rest = len(history.incidents) - SHOWN
    return [*lines, f"  and {rest} more incidents"] if rest > 0 else lines


def _calibration(history: History) -> list[str]:
    """fp16 looking for its loss scale is no rejection; a scale that falls too low has a red flag of its own."""
    count = history.outcomes["amp_backoff"]
    told = f"amp_backoff {count}: fp16 lowered its loss scale; some of these are how it finds it, and no error"
    return [told] if count else []


def when(bad: list[Row]) -> str:
    """The first question of the decision tree: from the start, later, or now and then."""
    first, last = bad[0], bad[-1]
    if last["epoch"] <= 1:
        return "all in epoch 1: learning rate or warm-up first, then the data"
    if first["epoch"] <= 1:
        return f"in epochs {first['epoch']:g} to {last['epoch']:g}, from the start: look at precision and at the data"
    return (
        f"first in epoch {first['epoch']:g}: it trained well before, so look at the named images, then lower the rate"
    )


def _culprit(path: Path) -> str:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "unreadable"
    images = ", ".join(map(str, content.get("image_ids", [])[:4]))
    return f"{content.get('culprit') or content.get('outcome')}; images {images or '-'}"


def _flags(history: History) -> list[str]:
    lines = []
    for name, rows in history.flags().items():
        first, last = rows[0]["step"], rows[-1]["step"]
        place = f"step {first}" if first == last else f"steps {first} to {last}, {len(rows)} times"
        lines.append(f"{name} ({place}): {rows[-1]['message']}")
    return lines
