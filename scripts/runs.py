# SPDX-License-Identifier: AGPL-3.0-or-later
"""What the scripts that bring a run about share: the commands they call, and whether a run folder answers them."""

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from fsdet import yaml_strict
from fsdet.config import Config
from fsdet.errors import UserError, explain

FREE = ("run.dir", "run.device", "run.precision", "run.threads", "data.workers", "data.cache", "save", "log", "eval")
CHOSEN = ("near", "far", "far_long")  # what stage.recipe=auto becomes in a run's config.yaml
ELSEWHERE = "train beside it with run.dir=checkpoints/NAME, or over it with --exist-ok"


def timed(run: Callable[[list[str]], int], times: dict[str, float], part: str, argv: Sequence[object]) -> None:
    """`fsdet argv...` by `run`, its seconds added under `part`; a failure ends the script with the same exit code."""
    words = [str(word) for word in argv]
    print(f"== {part}: fsdet {shlex.join(words)}", flush=True)
    begun = time.monotonic()
    code = run(words)
    times[part] = times.get(part, 0.0) + time.monotonic() - begun
    if code:
        raise SystemExit(code)


def finished(folder: Path) -> bool:
    """Whether the run in `folder` reached its end."""
    if not (folder / "last.pt").exists():
        return False
    from fsdet.engine.checkpoint import is_finished

    return is_finished(folder)


def stopped(folder: Path) -> bool:
    """Whether the run in `folder` was left before its end; a checkpoint without the run's others is no run."""
    return (folder / "last.pt").exists() and not finished(folder)


def begun(folder: Path) -> bool:
    """Whether there is something to resume from."""
    from fsdet.engine.checkpoint import candidates

    return bool(candidates(folder))


def same_or_refuse(config: Config, folder: Path) -> None:
    """A finished run stands for this configuration only when nothing that shapes its result differs.

    Raises:
        UserError: something does, or the run does not say what it was.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(explain("config.yaml of the finished run there", "none", str(folder), ELSEWHERE))
    document = yaml_strict.read(folder / "config.yaml")
    old, new = _flat(document.value), _flat(config.model_dump(mode="json"))
    if new["stage.recipe"] == "auto" and old.get("stage.recipe") in CHOSEN:
        old["stage.recipe"] = "auto"  # the run put the name of its choice there
    differing = [key for key in new if old.get(key) != new[key] and not key.startswith(FREE)]
    if differing:
        shown = ", ".join(f"{key} {old.get(key)!r} -> {new[key]!r}" for key in differing[:6])
        more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
        raise UserError(explain("the settings of the finished run there", f"others ({shown}{more})", str(folder),
                                ELSEWHERE))  # fmt: skip


def _flat(value: object, at: str = "") -> dict[str, object]:
    if isinstance(value, dict) and value:
        inner = (_flat(item, f"{at}.{key}" if at else str(key)) for key, item in value.items())
        return {key: leaf for part in inner for key, leaf in part.items()}
    return {at: value}
