# SPDX-License-Identifier: AGPL-3.0-or-later
"""Example: fsdet register checkpoints/stage2/best.pt --support support/ --out my.bank
A support folder has one folder a class: support/<class>/*.jpg, the image being the object, or with a box file."""

import argparse
from pathlib import Path

from fsdet.cli._arguments import add_device, existing
from fsdet.command import typed


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """CHECKPOINT --support DIR --out BANK"""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--support", type=Path, required=True, metavar="DIR", help="support/<class>/*.jpg")
    parser.add_argument("--out", type=Path, required=True, metavar="BANK")
    add_device(parser)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """Write the bank; prints its classes."""
    existing(args.checkpoint, "a checkpoint", "train one: ./train_stage_2.sh")
    existing(args.support, "a support folder", "put images into DIR/<class>/")
    from fsdet.tasks import use

    bank = use.register(args.checkpoint, args.support, args.out, args.device)
    names = ", ".join(bank.names)
    print(f"{args.out}: {len(bank.names)} classes: {names}")
    command = f"fsdet predict {args.checkpoint} --bank {args.out} --source IMAGE --out predictions"
    print(f"next: {typed(command)}")
    return 0
