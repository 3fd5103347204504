# SPDX-License-Identifier: AGPL-3.0-or-later
"""A run folder: who may write into it, and what is written once."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch

from fsdet import yaml_strict
from fsdet.engine import checkpoint, quarantine, records
from fsdet.errors import ConfigError, explain
from fsdet.files import is_json_with, write_durably

# what training writes beside checkpoints, and then eval and report; a folder of somebody's own may have such names too
RECORDS = ("config.yaml", "environment.json", "metrics.jsonl", "timings.jsonl", "results.csv", "training_debug.log",
           "results.json", "results.png", "labels.png", "confusion.png", "pr_novel.png", "shots.png", "report.html",
           quarantine.LIST)  # fmt: skip
SEVERAL = ("episodes/step_*.jpg", "episodes/step_*.json", "episodes/eval_*.jpg", "incidents/step_*/*",
           "tensorboard/events.out.tfevents.*")  # fmt: skip
RUNNING = ".running"  # locked by the process that trains into the folder; one that was killed holds no lock


def claim(folder: Path, resume: bool, exist_ok: bool) -> None:
    """Make the run folder, or refuse one that holds a run.

    Raises:
        ConfigError: it has a checkpoint and neither `resume` nor `exist_ok` is given; it is no run's but has files of
        the names that a run writes; it is not there and `resume` is given; another process trains into it; or it cannot
        be written.
    """
    if (folder / RUNNING).exists():
        with held(folder):
            pass
    old = checkpoint.candidates(folder)
    theirs = [name for name in RECORDS if (folder / name).exists()]
    if theirs and not old and not is_json_with("python", "versions")(folder / "environment.json"):
        raise ConfigError(explain("a folder of a run, or one without these files", ", ".join(theirs), str(folder),
                                  "run.dir= names another; nothing was replaced"))  # fmt: skip
    if old and not resume and not exist_ok:
        cure = "--resume continues it, --exist-ok overwrites it, run.dir= starts another"
        raise ConfigError(explain("a folder without a checkpoint", f"a run ({old[0].name})", str(folder), cure))
    if resume and not folder.exists():
        cure = "check run.dir=, or leave --resume out to start it"
        raise ConfigError(explain("a run to continue", "nothing there", str(folder), cure))
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(probe, b"")
        probe.unlink()
        for rest in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            rest.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(explain("a folder to write to", str(error), str(folder), "choose another run.dir")) from error


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A run folder for this process alone while it trains, where the file system knows locks.

    Raises:
        ConfigError: another process has it.
    """
    running = folder / RUNNING
    with ExitStack() as stack:
        with suppress(OSError):  # a folder that cannot be written says so where something is to be saved
            file = stack.enter_context(open(running, "ab"))
            if not _locked(file):
                raise ConfigError(explain("a folder that no other process trains into", "a training under way",
                                          str(folder), "run.dir= names another, or wait for its end"))  # fmt: skip
            stack.callback(_remove, running)
        yield


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _locked(file: IO[bytes]) -> bool:
    """Lock a file for this process, which children do not inherit and the kernel undoes; False where another has it."""
    try:
        import fcntl  # not on Windows

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):
        pass  # no locks here: as good as alone
    return True


def clear(folder: Path) -> None:
    """Remove what a run wrote that is being overwritten, the manifest first: a table of it is none of the new one."""
    several = [path for pattern in SEVERAL for path in sorted(folder.glob(pattern)) if path.is_file()]
    for old in (folder / checkpoint.MANIFEST, *checkpoint.candidates(folder), *(folder / n for n in RECORDS), *several):
        old.unlink(missing_ok=True)
    for emptied in folder.glob("incidents/step_*/"):
        if not any(emptied.iterdir()):
            emptied.rmdir()


def describe(folder: Path, resolved: Mapping[str, Any], device: torch.device, precision: str) -> None:
    """Write config.yaml and environment.json."""
    content = json.dumps(records.environment(device, precision), indent=1)
    write_durably(folder / "environment.json", content.encode())
    write_durably(folder / "config.yaml", yaml_strict.dump(dict(resolved)).encode())
