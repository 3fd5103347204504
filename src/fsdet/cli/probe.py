# SPDX-License-Identifier: AGPL-3.0-or-later
"""Examples: fsdet probe configs/demo/stage_2.yaml
fsdet probe --incident checkpoints/stage2/incidents/step_40
Prints each loss of the first batch beside its expected initial value, its gradient norm at the head and whether it is
finite, and says which losses rule, are drowned, are silent or pull apart; or runs the batch of a rejected step again in
float32, with the run's weights, and names what is not finite first."""

import argparse
from pathlib import Path

from fsdet import config
from fsdet.cli._arguments import existing, parse_with_overrides


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """CONFIG or --incident DIR [key=value ...]"""
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG")
    parser.add_argument("--incident", type=Path, metavar="DIR", help="a folder in incidents/ of a run")
    args = parse_with_overrides(parser, argv)
    if (args.config is None) == (args.incident is None):
        parser.error("expected CONFIG, or --incident DIR")
    return args


def run(args: argparse.Namespace) -> int:
    """Print the probe's table."""
    if args.incident is not None:
        return _incident(args)
    settings = config.load(args.config, args.overrides)
    from fsdet.tasks import inspect

    print(inspect.probe(settings))
    return 0


def _incident(args: argparse.Namespace) -> int:
    advice = "name a folder such as checkpoints/stage2/incidents/step_40"
    existing(args.incident / "batch.pt", "an incident's batch.pt", advice)
    run = args.incident.resolve().parents[1]
    settings = config.load(existing(run / "config.yaml", "the run's config.yaml", advice), args.overrides)
    from fsdet.tasks import incident

    print(incident.replay(args.incident, run, settings))
    return 0
