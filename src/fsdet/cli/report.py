# SPDX-License-Identifier: AGPL-3.0-or-later
"""Example: fsdet report checkpoints/stage2
Draws results.png from results.csv and prints where the run stands."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fsdet.command import typed

if TYPE_CHECKING:
    from fsdet.engine.history import History


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """RUN"""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Print the report of a run."""
    from fsdet.engine.history import read_history

    history = read_history(args.run)
    print("\n".join([_state(history), *_evaluation(history), *_table(args.run), *_pictures(args.run)]))
    return 0


def draw_curves(folder: Path) -> Path | None:
    """results.png of a run folder; None before its first epoch ended."""
    if not (folder / "results.csv").is_file():
        return None
    from fsdet.pictures import plot_results

    return plot_results(folder / "results.csv", folder / "results.png")


def _state(history: "History") -> str:
    from fsdet.engine.checkpoint import candidates

    told = f"{history.folder}: step {history.last_step}, "
    if history.finished:
        return f"{told}finished"
    told += f"unfinished{f' ({history.ending})' if history.ending else ''}; "
    if not candidates(history.folder):
        return f"{told}nothing is saved yet"
    return f"{told}next: {typed('fsdet train --resume {}', history.folder)}"


def _evaluation(history: "History") -> list[str]:
    rows = history.rows.get("val", [])
    if not rows:
        return ["not evaluated yet"]
    shown = (f"{key} {value:.4f}" for key, value in rows[-1].items() if key.startswith("val/") and value is not None)
    return [f"last evaluation, epoch {rows[-1]['epoch']:g}: {', '.join(shown)}"]


def _table(folder: Path) -> list[str]:
    path = folder / "results.json"
    if not path.is_file():
        best = folder / "best.pt"
        return [f"next: {typed('fsdet eval {} --json {}', best, path)}"] if best.is_file() else []
    from fsdet.evaluation.summary import read_results, table
    from fsdet.files import read_json
    from fsdet.tasks import judge

    if judge.is_of_a_split(found := read_json(path)):
        return ["", judge.table(found)]
    return ["", table([read_results(path)], [folder.name])]


def _pictures(folder: Path) -> list[str]:
    curves = draw_curves(folder)
    drawn = sorted({*folder.glob("*.jpg"), *folder.glob("*.png")} - {curves})
    found = [*([curves] if curves else []), *drawn, *sorted(folder.glob("episodes/*.jpg"))[-1:]]
    return ["", "pictures:", *(f"  {path}" for path in found)] if found else []
