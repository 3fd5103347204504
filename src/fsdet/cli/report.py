# SPDX-License-Identifier: AGPL-3.0-or-later
"""Examples: fsdet report checkpoints/stage2
fsdet report checkpoints/stage2 --html --images 400
Draws results.png from results.csv and prints where the run stands. --html writes a page with everything on it."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fsdet.cli._arguments import add_device, count
from fsdet.command import typed

if TYPE_CHECKING:
    from fsdet.engine.history import History


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """RUN"""
    parser.add_argument("run", type=Path, metavar="RUN", help="a run folder")
    parser.add_argument("--html", action="store_true", help="also one HTML file: supports, hits, misses, false "
                        "positives, curves, embeddings; it looks at images of the test split for it")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="FILE", help="the HTML file (RUN/report.html)")
    parser.add_argument("--images", type=count, metavar="N", help="most images of the test split to look at (200)")
    parser.add_argument("--data", metavar="D", help="data YAML; default: the one the run was trained on")
    add_device(parser)
    args = parser.parse_args(argv)
    if not args.html and (args.out or args.images or args.data):
        parser.error("expected --html beside --out, --images and --data")
    return args


def run(args: argparse.Namespace) -> int:
    """Print the report of a run."""
    from fsdet.engine.history import read_history

    history = read_history(args.run)
    told = [_state(history), *_evaluation(history), *_damage(args.run), *_table(args.run), *_pictures(args.run)]
    print("\n".join(told))
    if args.html:
        from fsdet.tasks.webpage import IMAGES, write_page

        path = write_page(args.run, args.out or args.run / "report.html", data=args.data, most=args.images or IMAGES,
                          device=args.device)  # fmt: skip
        print(f"\npage: {path} ({path.stat().st_size / 1e6:.1f} MB)")
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


def _damage(folder: Path) -> list[str]:
    from fsdet.engine.checkpoint import damage

    best = folder / "best.pt"
    told = damage(best) if best.is_file() else None
    return [told] if told else []


def _table(folder: Path) -> list[str]:
    from fsdet.engine.checkpoint import to_judge

    path = folder / "results.json"
    if not path.is_file():
        intact = to_judge(folder)
        return [f"next: {typed('fsdet eval {} --json {}', intact, path)}"] if intact else []
    from fsdet.evaluation.summary import read_results, table
    from fsdet.files import read_json
    from fsdet.tasks import judge

    of_a_split = judge.is_of_a_split(found := read_json(path))
    found = found if of_a_split else read_results(path)
    told = judge.outdated(found, folder)
    return [*([told] if told else []), "", judge.table(found) if of_a_split else table([found], [folder.name])]


def _pictures(folder: Path) -> list[str]:
    curves = draw_curves(folder)
    drawn = sorted({*folder.glob("*.jpg"), *folder.glob("*.png")} - {curves})
    found = [*([curves] if curves else []), *drawn, *sorted(folder.glob("episodes/*.jpg"))[-1:]]
    return ["", "pictures:", *(f"  {path}" for path in found)] if found else []
