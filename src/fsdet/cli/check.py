# SPDX-License-Identifier: AGPL-3.0-or-later
"""Example: fsdet check configs/demo/stage_2.yaml
Reads the configuration and the data, makes one dry step and reports its memory; nothing is written."""

import argparse
from pathlib import Path

from fsdet import config
from fsdet.cli._arguments import parse_with_overrides


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """CONFIG [key=value ...]"""
    parser.add_argument("config", type=Path, metavar="CONFIG")
    return parse_with_overrides(parser, argv)


def run(args: argparse.Namespace) -> int:
    """Print what was checked."""
    settings = config.load(args.config, args.overrides)
    from fsdet.tasks import inspect

    print(inspect.check(settings))
    return 0
