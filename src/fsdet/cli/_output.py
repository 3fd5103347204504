# SPDX-License-Identifier: AGPL-3.0-or-later
"""Standard streams that may be closed, full, or read by nobody: what a command did does not depend on them."""

import io
import os
import sys


def open_streams() -> None:
    """Put /dev/null where stdin, stdout or stderr was closed, or the first files that are opened take their places.

    What a stream cannot write, such as a file name that is no UTF-8, is written as an escape.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def give_up() -> None:
    """Send what is still to be printed nowhere, or the interpreter complains of it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def say(text: str) -> None:
    """Print what came of a long job, whose success is not that of its words."""
    try:
        print(text, flush=True)
    except OSError:
        give_up()
