# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whether a checkpoint is of the run that wants to go on from it: refused, told as not exact, or the same.

Three kinds of settings. What makes it another run is refused. What has no say in the numbers may change. Anything else
may change too, and is named: the run goes on, and is no longer the run that either settings alone would give.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fsdet import __version__
from fsdet.errors import CheckpointError, counted, explain

ANOTHER_RUN = ("task", "model", "stage.name", "stage.mode")
NO_SAY = (
    "run.dir", "run.threads", "data.workers", "data.cache", "save", "log", "stage.init_from", "model.weights",
    "model.vit.weights", "model.encoder.weights",  # where a file is; which one it is, its hash says
    "guard.rank_timeout", "eval.shots", "eval.seeds", "eval.setting", "eval.metric", "eval.split",
)  # fmt: skip
AS_CONFIGURED = ("data", "image_size", "support_size")  # of a spec: compared as keys of the configuration
SHOWN = 6  # differences named


def check_fits(
    path: Path,
    state: Mapping[str, Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    precision: str,
    spec: Mapping[str, Any] | None = None,
    resolved: Mapping[str, Any] | None = None,
) -> None:
    """Refuse to resume into another architecture, model, class list, task, stage, optimizer or precision.

    spec: what the task describes itself as; resolved: the whole configuration. None is not compared.
    Raises:
        CheckpointError: with the first differences by name.
    """
    _check_spec(path, state, spec or {}, resolved or {})
    own, theirs = model.state_dict(), state["model"]
    odd = [k for k in (*own, *theirs) if k not in own or k not in theirs or own[k].shape != theirs[k].shape]
    if odd:
        names = ", ".join(dict.fromkeys(odd[:4]))
        raise CheckpointError(
            explain(
                "the architecture of this config",
                f"{counted(len(odd), 'tensor')} that differ{'s' * (len(odd) == 1)} ({names})",
                str(path),
                "resume with the run's own config, or use stage.init_from",
            )
        )
    sizes = [
        [len(g["params"]) for g in groups] for groups in (optimizer.param_groups, state["optimizer"]["param_groups"])
    ]
    if sizes[0] != sizes[1] or state.get("precision", precision) != precision:
        got = f"groups of {sizes[1]} parameters in {state.get('precision')}"
        raise CheckpointError(
            explain(
                f"an optimizer with groups of {sizes[0]} parameters in {precision}",
                got,
                str(path),
                "resume with the run's own config",
            )
        )


def _check_spec(path: Path, state: Mapping[str, Any], spec: Mapping[str, Any], resolved: Mapping[str, Any]) -> None:
    old = {k: v for k, v in state.get("spec", {}).items() if k in spec and k not in AS_CONFIGURED}
    described = _differences(old, {k: spec[k] for k in old})
    wrong = [f"{k} {_shown(a)}" for k, a in described if not _within(k, NO_SAY)]
    config = _differences(state.get("config", {}), _known(resolved, state.get("config", {}))) if resolved else ()
    wrong += [f"{k} {_shown(a)}" for k, a in config if _within(k, ANOTHER_RUN) and not _within(k, NO_SAY)]
    if wrong:
        raise CheckpointError(
            explain(
                "a checkpoint of this config's run",
                f"one of another: {_named(wrong)}",
                str(path),
                "resume with the run's own config, or start another run with stage.init_from",
            )
        )


def not_exact(state: Mapping[str, Any], resolved: Mapping[str, Any], world: int = 1) -> str | None:
    """Why the resumed run is not, to the last bit, the one that was saved; None when nothing speaks against it.

    world: how many processes train now.
    """
    changed = [
        f"{k} {_shown(pair)}"
        for k, pair in _differences(state.get("config", {}), resolved)
        if not _within(k, (*NO_SAY, *ANOTHER_RUN))
    ]
    here = {"torch": str(torch.__version__), "fsdet": __version__}
    versions = {name: found for name, found in state.get("versions", {}).items() if name in here}
    changed += [f"{name} {_shown(pair)}" for name, pair in _differences(versions, here) if name in versions]
    threads = state["threads"], torch.get_num_threads()
    if threads[0] != threads[1]:
        changed.append(f"{counted(threads[1], 'thread')}, not {threads[0]}")
    if (before := state.get("world", 1)) != world:
        told = f"{counted(world, 'process', 'es')}, not {before}"
        changed.append(f"{told} (the same images in each step, the same learning rates; but sums run in another order, "
                       "and BatchNorm in training sees each process's images)")  # fmt: skip
    if not changed:
        return None
    return f"this resume is not exact, the run goes on with other settings than it was saved with: {_named(changed)}"


def _known(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any]:
    """`new` without the keys that the version which wrote `old` had not: those say nothing of another run."""
    both = {key: value for key, value in new.items() if key in old}
    return {k: _known(v, old[k]) if isinstance(v, Mapping) and isinstance(old[k], Mapping) else v
            for k, v in both.items()}  # fmt: skip


def _differences(old: Any, new: Any, at: str = "") -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(dotted key, (old, new)) of each value that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys((*old, *new)):
            yield from _differences(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
    elif _plain(old) != _plain(new):
        yield at, (old, new)


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _within(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)


def _shown(pair: tuple[Any, Any]) -> str:
    """`old -> new`, of lists only what one of them lacks."""
    old, new = pair
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        gone, come = [x for x in old if x not in new], [x for x in new if x not in old]
        if gone or come:
            return " ".join([*(f"without {x}" for x in gone[:SHOWN]), *(f"with {x}" for x in come[:SHOWN])])
    return f"{old} -> {new}"


def _named(differences: list[str]) -> str:
    rest = len(differences) - SHOWN
    return ", ".join(differences[:SHOWN]) + (f" and {rest} more" if rest > 0 else "")
