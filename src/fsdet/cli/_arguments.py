# SPDX-License-Identifier: AGPL-3.0-or-later
"""Argument parsing that several verbs share."""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path

from fsdet.errors import UserError, explain

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """(the rest, the `key=value` words): overrides may stand anywhere among a verb's arguments."""
    rest = [word for word in argv if not _OVERRIDE.match(word)]
    return rest, [word for word in argv if _OVERRIDE.match(word)]


def parse_with_overrides(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse `argv`; its overrides land in `.overrides`, in order."""
    parser.usage = parser.format_usage().removeprefix("usage: ").strip() + " [key=value ...]"
    rest, overrides = split_overrides(argv)
    args = parser.parse_args(rest)
    args.overrides = overrides
    return args


def numbers(text: str) -> list[int]:
    """`1,3,5` as positive integers, for argparse."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1,3,5, got '{text}'") from None
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers from 1 up, got '{text}'")
    return values


def count(text: str) -> int:
    """One positive integer, for argparse."""
    values = numbers(text)
    if len(values) != 1:
        raise argparse.ArgumentTypeError(f"expected one number, got '{text}'")
    return values[0]


class Once(argparse.Action):
    """Stores a value, and refuses a second one, of which argparse would drop the first unsaid."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object,
                 option_string: str | None = None) -> None:  # fmt: skip
        before = getattr(namespace, self.dest)
        if before != self.default:
            parser.error(f"expected one {option_string}, got {before} and {values}")
        setattr(namespace, self.dest, values)


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`; whether this machine has it is found out when it is used."""
    told = "auto (default: the GPU when there is one), cpu, mps, cuda or cuda:N"
    parser.add_argument("--device", type=_device, default="auto", metavar="D", help=told)


def _device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise argparse.ArgumentTypeError(f"expected auto, cpu, mps, cuda or cuda:N, got '{text}'")
    return text


def existing(path: Path, what: str, next_step: str) -> Path:
    """`path` if it exists. Raises UserError that names `what` was expected there."""
    if not path.exists():
        raise UserError(explain(what, "nothing there", str(path), next_step))
    return path


def processes(environment: Mapping[str, str]) -> int:
    """How many processes torchrun has started, by what it leaves in the environment; 1 without it."""
    words = [environment.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR")]
    return int(words[0]) if all(words) and words[0].isdecimal() else 1
