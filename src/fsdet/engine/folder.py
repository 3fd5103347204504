# SPDX-License-Identifier: AGPL-3.0-or-later
"""A run folder: who may write into it, and what is written once."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fsdet import yaml_strict
from fsdet.engine import checkpoint, quarantine, records
from fsdet.errors import ConfigError, explain
from fsdet.files import write_durably


def claim(folder: Path, resume: bool, exist_ok: bool) -> None:
    """Make the run folder, or refuse one that holds a run.

    Raises:
        ConfigError: it has a checkpoint and neither `resume` nor `exist_ok` is given; or it cannot be written.
    """
    old = checkpoint.candidates(folder)
    if old and not resume and not exist_ok:
        cure = "--resume continues it, --exist-ok overwrites it, run.dir= starts another"
        raise ConfigError(explain("a folder without a checkpoint", f"a run ({old[0].name})", str(folder), cure))
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(probe, b"")
        probe.unlink()
        for rest in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            rest.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(explain("a folder to write to", str(error), str(folder), "choose another run.dir")) from error


def clear(folder: Path) -> None:
    """Remove the checkpoints and the quarantine of a run that is being overwritten, the manifest first."""
    for old in (folder / checkpoint.MANIFEST, *checkpoint.candidates(folder), folder / quarantine.LIST):
        old.unlink(missing_ok=True)


def describe(folder: Path, resolved: Mapping[str, Any], device: torch.device, precision: str) -> None:
    """Write config.yaml and environment.json."""
    content = json.dumps(records.environment(device, precision), indent=1)
    write_durably(folder / "environment.json", content.encode())
    write_durably(folder / "config.yaml", yaml_strict.dump(dict(resolved)).encode())
