# SPDX-License-Identifier: AGPL-3.0-or-later
"""Examples: fsdet register checkpoints/stage2/best.pt --support support/ --out my.bank
fsdet register checkpoints/stage2/best.pt --support more/ --into my.bank
fsdet register checkpoints/stage2/best.pt --support support/ --out adapted.bank --adapt
A support folder has one folder a class: support/<class>/*.jpg, the image being the object, or with a box file.
With --adapt the detector also trains on these images for some minutes, beside images of the base classes: better at
finding, and kept as a run folder beside the bank."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fsdet.cli._arguments import Once, add_device, count, existing
from fsdet.command import typed
from fsdet.errors import UserError, counted, explain
from fsdet.files import refuse_foreign

if TYPE_CHECKING:
    from fsdet.tasks.adapt import Prepared


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """CHECKPOINT --support DIR --out BANK|--into BANK [--replace] [--one-view] [--adapt [--data D] [--steps N]]"""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--support", action=Once, type=Path, required=True, metavar="DIR", help="support/<class>/*.jpg")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", type=Path, metavar="BANK", help="a new bank")
    target.add_argument("--into", type=Path, metavar="BANK", help="a bank to add classes and shots to")
    parser.add_argument("--replace", action="store_true", help="let --out replace a bank that is there")
    parser.add_argument(
        "--one-view",
        action="store_true",
        help="read each shot once, not at three scales and mirrored: six times faster",
    )
    parser.add_argument("--adapt", action="store_true", help="also fine-tune the detector on the folder: BANK.adapted/")
    parser.add_argument("--data", metavar="D", help="base images for --adapt (default: what it was trained on)")
    parser.add_argument(
        "--steps",
        type=count,
        metavar="N",
        help="steps of --adapt (400), half as many again for classes unlike the base's",
    )
    add_device(parser)
    args = parser.parse_args(argv)
    if (args.data or args.steps) and not args.adapt:
        parser.error("expected --adapt beside --data and --steps")
    if args.adapt and args.into:
        parser.error("expected --out beside --adapt: an adapted detector has a bank of its own")
    if args.replace and args.into:
        parser.error("expected --out beside --replace: --into adds to the bank that is there")
    return args


def run(args: argparse.Namespace) -> int:
    """Write the bank; prints its classes."""
    existing(args.checkpoint, "a checkpoint", "train one: ./train_stage_2.sh")
    existing(args.support, "a support folder", "put images into DIR/<class>/")
    from fsdet.bank import refuse_bank
    from fsdet.bankfile import is_bank
    from fsdet.tasks import use
    from fsdet.tasks.adapt import prepared

    out = args.into or args.out
    if args.into:
        existing(args.into, "a bank", "make one with --out")
        refuse_foreign(out, "a bank", is_bank)
    if args.adapt:
        _free(_beside(out))
    old = None if args.into else refuse_bank(out, args.replace, "" if args.adapt else f"add to it with --into {out}, ")
    # what --adapt refuses comes first, what registering says of shots before the training, the file after both
    start = prepared(args.checkpoint, args.support, args.data) if args.adapt else None
    bank = use.registered(args.checkpoint, args.support, args.device, args.into, views=not args.one_view)
    if start:
        _adapt(start, args)
    bank.save(out)
    replaced = f"; replaces {old}" if old else ""
    print(f"{out}: {counted(len(bank.names), 'class', 'es')}: {', '.join(bank.names)}{replaced}")
    for line in bank.describe():
        print(f"  {line}")
    told = typed("fsdet predict {} --bank {} --source IMAGE --out predictions", args.checkpoint, out)
    print(f"next: {told}")
    return 0


def _beside(bank: Path) -> Path:
    return bank.with_name(f"{bank.name}.adapted")


def _free(folder: Path) -> None:
    """Raises UserError when an adaptation, or anything else, is there already."""
    from fsdet.engine.checkpoint import is_finished

    if not folder.exists():
        return
    unfinished = (folder / "last.pt").exists() and not is_finished(folder)
    got = "an interrupted adaptation" if unfinished else "something there"
    cure = f"{typed('fsdet train --resume {}', folder)} continues it, or " if unfinished else ""
    raise UserError(explain("a folder to make", got, str(folder), f"{cure}name another --out"))


def _adapt(start: "Prepared", args: argparse.Namespace) -> None:
    from fsdet.tasks.adapt import STEPS, adapt

    done = adapt(start, _beside(args.out), steps=args.steps or STEPS, device=args.device)
    print(f"{done.checkpoint}: finds {counted(len(done.classes), 'new class', 'es')} by itself; base AP50 on split val "
          f"{done.before:.3f} -> {done.after:.3f}")  # fmt: skip
    print(f"next: {typed('fsdet predict {} --source IMAGE --out predictions', done.checkpoint)}")
