# SPDX-License-Identifier: AGPL-3.0-or-later
"""Examples: fsdet info configs/demo/stage_2.yaml optim.lr=1e-3     (prints the resolved configuration)
fsdet info checkpoints/stage2/best.pt"""

import argparse
from pathlib import Path

from fsdet import config
from fsdet.cli._arguments import existing, parse_with_overrides


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """CONFIG|CHECKPOINT [key=value ...]"""
    parser.add_argument("path", type=Path, metavar="CONFIG|CHECKPOINT")
    return parse_with_overrides(parser, argv)


def run(args: argparse.Namespace) -> int:
    """Print the resolved configuration, or what a checkpoint holds."""
    if args.path.suffix in (".yaml", ".yml"):
        print(config.dump(config.load(args.path, args.overrides)), end="")
        return 0
    existing(args.path, "a configuration or checkpoint", "fsdet info configs/demo/stage_2.yaml")
    from fsdet.tasks import inspect

    print(inspect.info(args.path))
    return 0
