# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet probe --incident`: the batch of a rejected step once more, in float32, with weights of its run."""

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fsdet.config import Config
from fsdet.engine import checkpoint as checkpoints
from fsdet.engine import forensics
from fsdet.engine import probe as gradient_probe
from fsdet.engine.freezing import Freezer
from fsdet.engine.memory import Memory
from fsdet.errors import CheckpointError, DataError, explain
from fsdet.tasks import build_task, kind_of, read_data
from fsdet.types import Task

CPU = torch.device("cpu")


def replay(folder: Path, run: Path, config: Config) -> str:
    """What is not finite when an incident's batch is run again, as lines to print.

    Args:
        folder: holds report.json and batch.pt. run: the run folder it is of. config: the run's own.
    Raises:
        DataError: the incident or the data set cannot be read. CheckpointError: the run's weights do not fit.
    """
    facts, batches = _read(folder)
    lines = [f"{folder}: {facts['outcome']} at step {facts['step']}, epoch {facts['epoch']}; {facts['culprit']}"]
    lines.append(f"images: {', '.join(facts['image_ids']) or 'unknown'}")
    lost = [b for b in batches if "reason" in b]
    lines += [f"batch {b['index']} could not be made: {b['reason']}" for b in lost]
    if lost:
        return "\n".join(lines)
    task, origin = _task(run, config, facts["step"])
    Freezer(task, config.stage.freeze, config.stage.freeze_norm).apply(facts["epoch"])
    task.objective.train()
    window = [kind_of(config.task, str(run)).restored(b) for b in batches]
    return "\n".join([*lines, f"weights: {origin}", *_verdict(task, window)])


def _verdict(task: Task, window: Sequence[Any]) -> list[str]:
    """The losses of each micro-batch, and the first module, loss or parameter that is not finite."""
    lines, trains = [], True
    for batch in window:
        report = task.losses(batch)
        trains = trains and report.total.requires_grad
        raw = ", ".join(f"{name} {float(torch.as_tensor(value).detach()):.4g}" for name, value in report.raw.items())
        rows = gradient_probe.measure(report)
        lines.append(gradient_probe.tell(rows, {}) if rows else f"losses: {raw}")
    if not trains:
        return [
            *lines,
            "the losses depend on no parameter that trains: check stage.freeze and the weights of the losses",
        ]
    return [*lines, *_replayed(task, window)]


def _replayed(task: Task, window: Sequence[Any]) -> list[str]:
    """What the replay in float32 names, one thing a line."""
    named = [pair for members in task.param_groups().values() for pair in members]
    memory = Memory(task.model, task.objective)
    memory.take()
    with memory.again():
        found = forensics.replay(task, window, CPU, named)
        found = replace(found, buffer=memory.first_not_finite())
    if found.finite:
        return ["losses and gradients are finite in float32 with these weights: the reason was precision or the "
                "weights of that moment"]  # fmt: skip
    lines = [f"not finite in float32: {name}_loss{rows}" for name, rows in found.losses.items()]
    if found.module:
        images = f" for {', '.join(found.images)}" if found.images else ""
        lines.insert(0, f"first output that is not finite: {found.module}{images}")
    if found.parameter:
        lines.append(f"not finite in float32: {found.parameter.name} ({found.parameter.statistics})")
    if found.gradient_of:
        lines.append(f"the gradient comes from: {', '.join(f'{name}_loss' for name in found.gradient_of)}")
    if found.gradient_at:
        lines.append(f"first gradient that is not finite: at the output of {found.gradient_at}")
    if found.buffer and not found.losses:
        lines.append(f"not finite in float32: the running statistics {found.buffer}")
    return [*lines, f"so: {forensics.CAUSES[found.cause]}"]


def _read(folder: Path) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """(report.json, the micro-batches of batch.pt as plain values)."""
    try:
        facts = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        batches = torch.load(folder / "batch.pt", map_location=CPU, weights_only=True)
        for key in ("outcome", "step", "epoch", "culprit", "image_ids"):
            facts[key]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        got = f"{type(error).__name__} ({str(error).splitlines()[0][:160] if str(error) else ''})"
        raise DataError(explain("an incident's report.json and batch.pt", got, str(folder),
                                "name another folder of incidents/")) from error  # fmt: skip
    return facts, batches


def _task(run: Path, config: Config, step: int) -> tuple[Task, str]:
    """The run's task with the weights saved nearest to `step`, and which those are."""
    entries = checkpoints.read_manifest(run).get("files", {})
    saved = {path: int(entries.get(path.name, {}).get("step", 0)) for path in checkpoints.candidates(run)}
    task, _ = build_task(config, read_data(config), resume=bool(saved))
    if not saved:
        return task, "as the run started, for it has saved none"
    path = min(saved, key=lambda p: abs(saved[p] - step))
    state = checkpoints.load(path)
    try:
        task.model.load_state_dict(state["model"])
        task.objective.load_state_dict(state["objective"])
    except (RuntimeError, KeyError) as error:
        raise CheckpointError(explain("weights that fit the run's configuration and data", str(error)[:200], str(path),
                                      "replay without overrides, on the data of the run")) from error  # fmt: skip
    return task, f"{path.name} of step {state['step']}"
