# SPDX-License-Identifier: AGPL-3.0-or-later
"""Example: fsdet probe configs/demo/stage_2.yaml
Prints each loss of the first batch beside its expected initial value, its gradient norm and whether it is finite."""

import argparse
from pathlib import Path

from fsdet import config
from fsdet.cli._arguments import parse_with_overrides


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """CONFIG [key=value ...]"""
    parser.add_argument("config", type=Path, metavar="CONFIG")
    return parse_with_overrides(parser, argv)


def run(args: argparse.Namespace) -> int:
    """Print the probe's table."""
    settings = config.load(args.config, args.overrides)
    from fsdet.tasks import inspect

    print(inspect.probe(settings))
    return 0
