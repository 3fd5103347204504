# SPDX-License-Identifier: AGPL-3.0-or-later
"""Examples: fsdet train configs/demo/stage_1.yaml optim.lr=5e-3
fsdet train configs/demo/stage_2.yaml --resume
fsdet train --resume checkpoints/stage2
torchrun --standalone --nproc_per_node 2 -m fsdet train configs/stage_2.yaml"""

import argparse
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from fsdet import config
from fsdet.cli._arguments import existing, parse_with_overrides, processes
from fsdet.cli._output import say
from fsdet.cli.report import draw_curves
from fsdet.command import typed
from fsdet.errors import UserError, counted, explain

if TYPE_CHECKING:
    from fsdet.peers import Peers

ROOT = Path("checkpoints")


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """CONFIG [--resume [RUN]] [--exist-ok] [key=value ...]; a YAML right after --resume is the CONFIG, no RUN."""
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG", help="YAML file")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="RUN",
        help="continue run.dir of CONFIG, or the run folder RUN, or the newest unfinished run",
    )
    parser.add_argument("--exist-ok", action="store_true", help="overwrite a run folder that has a checkpoint")
    args = parse_with_overrides(parser, argv)
    if args.resume and args.resume.endswith((".yaml", ".yml")) and args.config is None:
        args.config, args.resume = Path(args.resume), ""
    if args.config is None and args.resume is None:
        parser.error("expected CONFIG or --resume")
    return args


def run(args: argparse.Namespace) -> int:
    """Train to the end; prints where the run is."""
    settings = config.load(args.config, args.overrides) if args.resume is None else _resumed(args)
    from fsdet import tasks

    with _peers(settings) as peers:
        trainer = tasks.build(settings, resume=args.resume is not None, exist_ok=args.exist_ok, peers=peers)
        before = trainer.controller.step
        result = trainer.fit()
        if peers.leads:
            draw_curves(result.folder)
            if args.resume is not None and result.steps == before:
                say("the run was at its end, and nothing was trained; longer with optim.steps=N or optim.epochs=N")
            say(f"{counted(result.steps, 'step')}; run folder: {result.folder}")
    return 0


def _peers(settings: config.Config) -> "AbstractContextManager[Peers]":
    """The processes that torchrun has started, or this one alone."""
    if processes(os.environ) == 1:
        from fsdet.peers import ALONE

        return nullcontext(ALONE)
    from fsdet.engine import ranks

    return ranks.joined(settings.run.device, settings.guard.rank_timeout)


def _resumed(args: argparse.Namespace) -> config.Config:
    """The configuration to continue: CONFIG's or RUN's own, with run.dir set to the run."""
    if args.resume:
        folder = _run_folder(Path(args.resume))
        _tell_newest(Path(args.resume), folder)
        source = args.config or existing(folder / "config.yaml", "the run's config.yaml", "name a run folder")
        return config.load(source, [*args.overrides, f"run.dir={folder}"])
    if args.config:
        return config.load(args.config, args.overrides)
    given = [word.partition("=")[2] for word in args.overrides if word.startswith("run.dir=")]
    folder = _run_folder(Path(given[-1])) if given else newest_unfinished(ROOT)
    source = existing(folder / "config.yaml", "the run's config.yaml", "name a run folder")
    return config.load(source, [*args.overrides, f"run.dir={folder}"])


def _run_folder(path: Path) -> Path:
    existing(path, "a run folder", f"{typed('fsdet train CONFIG')} starts one")
    if path.is_file() and path.suffix != ".pt":
        cure = "name the folder that fsdet train wrote, or a .pt file in it"
        raise UserError(explain("a run folder or a checkpoint in one", "another file", str(path), cure))
    return path if path.is_dir() else path.parent  # a checkpoint stands for its run


def _tell_newest(named: Path, folder: Path) -> None:
    """A checkpoint stands for its run, which goes on from where it was left."""
    from fsdet.engine.checkpoint import candidates

    newest = next(iter(candidates(folder)), named)
    if named.is_file() and named.name != newest.name:
        say(f"{named} stands for its run, which goes on from its newest checkpoint, {newest.name}; from {named.name} "
            f"alone: {typed('fsdet train CONFIG stage.init_from={}', named)}")  # fmt: skip


def newest_unfinished(root: Path) -> Path:
    """The run under `root` that was saved last and is not finished.

    Raises:
        UserError: when there is none.
    """
    from fsdet.engine.checkpoint import is_finished

    saved = {path.parent: path for path in (*root.glob("*/step_*.pt"), *root.glob("*/last.pt"))}
    runs = [folder for folder in saved if not is_finished(folder)]
    if not runs:
        raise UserError(explain("an unfinished run to resume", "none", str(root), typed("fsdet train CONFIG")))
    return max(runs, key=lambda folder: saved[folder].stat().st_mtime)
