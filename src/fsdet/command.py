# SPDX-License-Identifier: AGPL-3.0-or-later
"""How a next command is told: as it can be pasted where the user stands, with or without an activated environment."""

import shlex
import sys
from pathlib import Path


def typed(line: str, *values: object) -> str:
    """`fsdet ...` (or of another module) as `PYTHON -m fsdet ...`: this interpreter, relative below the folder.

    values: what each `{}` of `line` stands for, paths above all; quoted where a shell would take them apart.
    """
    here, python = Path.cwd(), Path(sys.executable)
    shown = python.relative_to(here) if python.is_relative_to(here) else python
    module, _, rest = line.format(*(shlex.quote(str(value)) for value in values)).partition(" ")
    return f"{shlex.quote(str(shown))} -m {module} {rest}".rstrip()


def checking(data: object, task: str | None = None) -> str:
    """The command that reads every file and label of a training's data."""
    return typed("fsdet data check {} --deep", data) + ("" if task in (None, "fewshot") else f" --task {task}")
