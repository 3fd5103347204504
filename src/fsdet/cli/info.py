# SPDX-License-Identifier: AGPL-3.0-or-later
"""Examples: fsdet info configs/demo/stage_2.yaml optim.lr=1e-3
fsdet info checkpoints/stage2/best.pt --batch 16 --size 640
Parameters by part, operations of a pass, and the memory of a training step, estimated from small passes.
Of a configuration it prints every key resolved, and these as comments; the output is a YAML."""

import argparse
from pathlib import Path

from fsdet import config
from fsdet.cli._arguments import count, existing, parse_with_overrides
from fsdet.command import typed
from fsdet.schema import LARGEST_SIDE

STRIDE = 32  # px, of the coarsest level


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """CONFIG|CHECKPOINT [--budget M] [--batch N] [--size PX] [key=value ...]"""
    parser.add_argument("path", type=Path, metavar="CONFIG|CHECKPOINT")
    parser.add_argument("--budget", type=count, default=50, metavar="M", help="million parameters (50)")
    parser.add_argument("--batch", type=count, metavar="N", help="images of a training step (as configured)")
    parser.add_argument("--size", type=_side, metavar="PX", help="their side, a multiple of 32 (as configured)")
    return parse_with_overrides(parser, argv)


def _side(text: str) -> int:
    side = count(text)
    if side % STRIDE or side > LARGEST_SIDE:
        raise argparse.ArgumentTypeError(f"expected a multiple of {STRIDE} up to {LARGEST_SIDE}, got '{text}'")
    return side


def run(args: argparse.Namespace) -> int:
    """Print the resolved configuration, or what a checkpoint holds."""
    if args.path.suffix in (".yaml", ".yml"):
        return _config(config.load(args.path, args.overrides), args)
    existing(args.path, "a configuration or checkpoint", typed("fsdet info configs/demo/stage_2.yaml"))
    from fsdet.tasks import about

    print(about.about_checkpoint(args.path, about.Asked(args.budget, args.batch, args.size)))
    return 0


def _config(settings: config.Config, args: argparse.Namespace) -> int:
    from fsdet.tasks import about

    print(config.dump(settings), end="")
    for line in about.about_config(settings, about.Asked(args.budget, args.batch, args.size)).splitlines():
        print(f"# {line}")
    return 0
