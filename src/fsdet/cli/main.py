# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet VERB ...`: finds the verb's file, runs it, and turns errors into messages and exit codes.

0 done; 2 the user's input is at fault (one clear message, no traceback); 1 the run failed; 130 / 143 stopped by a
signal. Any other exception is a bug of this package and keeps its traceback.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from fsdet import __version__
from fsdet.cli._arguments import processes
from fsdet.cli._output import give_up, open_streams
from fsdet.command import typed
from fsdet.errors import FsdetError, did_you_mean, explain
from fsdet.progress import log_to_console

VERBS = {
    "train": "train a configuration, or resume a run",
    "eval": "AP on base, novel and all classes, shots x seeds with intervals",
    "register": "make a prototype bank from a support folder, without training",
    "bank": "list, merge or prune prototype banks",
    "predict": "detect in images, a video or a camera",
    "export": "a detector as ONNX, TorchScript or torch.export, compared with PyTorch",
    "probe": "per-loss gradients of the first batch, or of an incident",
    "check": "configuration, data, one dry step, memory",
    "data": "make, check and convert data sets, draw shots",
    "report": "where a run stands: curves, last evaluation, table",
    "doctor": "red flags and rejected steps of a run, and what to do",
    "info": "what a configuration or checkpoint is",
}
PIPE_CLOSED = 141  # what a shell reports for a program whose reader went away
INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, a suggestion for a misspelt flag, and no guessing of abbreviations."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> None:
        known = [flag for action in self._actions for flag in action.option_strings]
        unknown = [word for word in message.partition("unrecognized arguments: ")[2].split() if word.startswith("-")]
        hint = "".join(did_you_mean(word.partition("=")[0], known) for word in unknown[:1])
        usage = f"{self.prog} --help"
        usage = typed(usage) if usage.startswith("fsdet ") else usage
        self.exit(2, f"error: {self.prog}: {message}.{hint} Next: {usage}\n")


def _overview() -> str:
    verbs = "\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())
    return f"usage: fsdet VERB ...\n\n{verbs}\n\n`fsdet VERB --help` tells the rest. Version {__version__}."


def _run_verb(argv: list[str]) -> int:
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        hint = did_you_mean(verb, VERBS)
        print(f"error: fsdet: unknown command '{verb}'.{hint} Next: {typed('fsdet --help')}", file=sys.stderr)
        return 2
    if verb != "train" and (count := processes(os.environ)) > 1:
        told = explain("fsdet train, which alone shares its work", f"fsdet {verb}", f"torchrun with {count} processes",
                       f"start it once: {typed('fsdet {}', verb)} ...")  # fmt: skip
        print(f"error: {told}", file=sys.stderr)
        return 2
    module = importlib.import_module(f"fsdet.cli.{verb}")
    parser = Parser(prog=f"fsdet {verb}", description=VERBS[verb] + "\n\n" + (module.__doc__ or ""))
    return module.run(module.parse(parser, rest))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code."""
    open_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] in ("-V", "--version"):
        print(f"fsdet {__version__}")
        return 0
    log_to_console()
    try:
        code = _run_verb(argv)
        sys.stdout.flush()
        return code
    except FsdetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SystemExit as stop:  # argparse: --help or a wrong flag
        return stop.code if isinstance(stop.code, int) else 2
    except (IsADirectoryError, NotADirectoryError, PermissionError, FileExistsError, FileNotFoundError) as error:
        told = explain("a path that can be used", error.strerror or str(error), str(error.filename), "name another one")
        print(f"error: {told}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        give_up()
        return PIPE_CLOSED
