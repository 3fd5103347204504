# SPDX-License-Identifier: AGPL-3.0-or-later
"""Example: fsdet predict checkpoints/stage2/best.pt --support support/ --source photos/ --out predictions"""

import argparse
from pathlib import Path

from fsdet.cli._arguments import add_device, existing


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """CHECKPOINT (--support DIR | --bank BANK) --source S --out DIR"""
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    known = parser.add_mutually_exclusive_group()
    known.add_argument("--support", type=Path, metavar="DIR", help="support/<class>/*.jpg: the classes to find")
    known.add_argument("--bank", type=Path, metavar="BANK", help="classes registered before; without, the base ones")
    parser.add_argument("--source", type=Path, required=True, metavar="IMAGE|DIR", help="no videos")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="another folder than the source's")
    parser.add_argument("--conf", type=_share, metavar="P", help="least score of every class (default: what each "
                        "registered class proposed, .25 for the others)")  # fmt: skip
    add_device(parser)
    return parser.parse_args(argv)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number from 0 to 1, got '{text}'")
    return value


def run(args: argparse.Namespace) -> int:
    """Draw detections into --out; prints the summary."""
    existing(args.checkpoint, "a checkpoint", "train one: ./train_stage_2.sh")
    existing(args.source, "an image or a folder of images", "check --source")
    for path in (args.support, args.bank):
        if path is not None:
            existing(path, "the classes to find", "check --support or --bank")
    from fsdet.tasks import use

    summary = use.predict(
        args.checkpoint,
        support=args.support,
        bank=args.bank,
        source=args.source,
        out=args.out,
        conf=args.conf,
        device=args.device,
    )
    print(summary)
    return 0
