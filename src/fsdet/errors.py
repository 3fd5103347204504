# SPDX-License-Identifier: AGPL-3.0-or-later
"""What can go wrong, sorted by who can mend it: the user (exit 2), the run (exit 1), a signal (130 / 143)."""

import traceback
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

NAMED = 6  # things that a sentence names


class FsdetError(Exception):
    """Root of every error this package raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1


class UserError(FsdetError):
    """The user's input is at fault; the message says expected, got, where and what to do next."""

    exit_code = 2


class ConfigError(UserError):
    """A config file or override does not fit; lists every problem at once."""


class DataError(UserError):
    """A dataset, split, image or annotation cannot be used."""


class SampleError(DataError):
    """One sample cannot be used; `sample` names it, so that another can take its place."""

    def __init__(self, message: str, sample: str = "") -> None:
        super().__init__(message)
        self.sample = sample


class CheckpointError(UserError):
    """A checkpoint or bank is damaged, unsafe, or of another architecture."""


class ShapeError(FsdetError, ValueError):
    """A tensor does not have the shape that a function's docstring promises."""


class RunFailed(FsdetError):
    """Training stopped by its own decision; the message names the reason and the report."""


class Stopped(FsdetError):
    """A signal ended the run after a durable save."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


# what a sample or a batch may raise while it is made, so that another can take its place; not what ends a process
MISTAKES = (FsdetError, OSError, EOFError, ValueError, RuntimeError, ArithmeticError, LookupError, TypeError,
            AttributeError, AssertionError)  # fmt: skip


def explain(expected: str, got: str, where: str, next_step: str) -> str:
    """One sentence in the four parts that every message of this package has."""
    end = "" if got.endswith((".", "?", "!")) else "."
    return f"{where}: expected {expected}, got {got}{end} Next: {next_step}"


def counted(count: int, word: str, plural: str = "s") -> str:
    """`1 shot`, `2 shots`."""
    return f"{count} {word}{plural * (count != 1)}"


def are(count: int) -> str:
    """The verb of so many things: `1 shot is`, `2 shots are`."""
    return "is" if count == 1 else "are"


def some(names: Sequence[str]) -> str:
    """The first NAMED of them, and how many more there are."""
    more = [f"{len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join([*names[:NAMED], *more])


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """`" Did you mean 'x'?"` for the closest of `choices`, or an empty string."""
    close = get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ""


def told(error: Exception) -> str:
    """An error in one line; one that was not raised on purpose also says its kind and where."""
    text = " ".join(str(error).split())
    if isinstance(error, DataError):
        return text
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({frame.name}, line {frame.lineno})"
