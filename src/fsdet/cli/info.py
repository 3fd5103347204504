# SPDX-License-Identifier: AGPL-3.0-or-later
"""Examples: fsdet info configs/demo/stage_2.yaml optim.lr=1e-3
fsdet info checkpoints/stage2/best.pt
Of a configuration it prints every key resolved, and as comments the parameters of each part; the output is a YAML."""

import argparse
from pathlib import Path

from fsdet import config
from fsdet.cli._arguments import existing, parse_with_overrides
from fsdet.command import typed


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """CONFIG|CHECKPOINT [key=value ...]"""
    parser.add_argument("path", type=Path, metavar="CONFIG|CHECKPOINT")
    return parse_with_overrides(parser, argv)


def run(args: argparse.Namespace) -> int:
    """Print the resolved configuration, or what a checkpoint holds."""
    if args.path.suffix in (".yaml", ".yml"):
        return _config(config.load(args.path, args.overrides))
    existing(args.path, "a configuration or checkpoint", typed("fsdet info configs/demo/stage_2.yaml"))
    from fsdet.tasks import inspect

    print(inspect.about_checkpoint(args.path))
    return 0


def _config(settings: config.Config) -> int:
    from fsdet.tasks import inspect

    print(config.dump(settings), end="")
    for line in inspect.about_config(settings).splitlines():
        print(f"# {line}")
    return 0
