# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet eval` of a checkpoint that a split alone can judge: no shots, no draws."""

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fsdet.command import typed
from fsdet.config import Config
from fsdet.engine import checkpoint as checkpoints
from fsdet.engine.guard import jsonable
from fsdet.engine.optimizer import choose_device
from fsdet.errors import CheckpointError, DataError, counted, explain
from fsdet.files import write_durably
from fsdet.tasks import KINDS, kind_of
from fsdet.tasks.loading import data_of, rebuilt, spec_of

BY_SHOTS = "fewshot"  # judged by shots and draws, see protocol.py


def other_task(path: Path) -> str | None:
    """The task of a checkpoint that a split alone judges; None for a detector, and for a file that cannot be read."""
    try:
        name = spec_of(path, checkpoints.load(path))["task"]
    except CheckpointError:  # who evaluates detectors reads it again and says what is wrong
        return None
    return None if name == BY_SHOTS else name


def judge_checkpoint(path: Path, *, data: str | None = None, split: str = "test", device: str = "auto",
                     json_out: Path | None = None) -> Mapping[str, Any]:  # fmt: skip
    """Figures of a checkpoint on a split of its data set, or of another with the same classes.

    Raises:
        CheckpointError: damaged, or of an unknown task. DataError: no such split, or other classes.
    """
    place, content = choose_device(device, "--device"), checkpoints.load(path)
    spec = spec_of(path, content)
    kind = kind_of(spec["task"], str(path))
    trained = rebuilt(path, content, kind.network(spec["model"], str(path)), place)
    config = Config.model_validate(content["config"])
    source = data or data_of(trained)
    found = kind.read(config.model_copy(update={"data": config.data.model_copy(update={"path": source})}))
    if list(found.names) != list(spec["classes"]):
        raise DataError(explain(f"the classes {', '.join(spec['classes'][:8])}", ", ".join(found.names[:8]), source,
                                "name a data set with the classes of the checkpoint"))  # fmt: skip
    started = time.perf_counter()
    judged = kind.judge(trained.model, config, found, split, json_out.parent if json_out else None)
    seconds = time.perf_counter() - started
    results = {"task": spec["task"], "checkpoint_sha256": trained.sha256, "split": split,
               "classes_sha256": hashlib.sha256("\n".join(found.names).encode()).hexdigest(), "data": source,
               "names": list(found.names), "ms_per_image": 1000 * seconds / judged["images"], **judged}  # fmt: skip
    if json_out:
        write_durably(json_out, json.dumps(jsonable(results), indent=1).encode())
    return results


def outdated(results: Mapping[str, Any], folder: Path) -> str:
    """That a run's results are of none of its checkpoints, since it has been trained on; empty where they are of one,
    be it damaged since.

    results: of results.json, by shots or of a split.
    """
    saved, told = checkpoints.candidates(folder), results["checkpoint_sha256"]
    files = checkpoints.read_manifest(folder).get("files", {})
    if told in (entry.get("sha256") for name, entry in files.items() if folder / name in saved):
        return ""
    if not saved or any(
        hashlib.sha256(path.read_bytes()).hexdigest() == told for path in reversed(saved)
    ):  # best first
        return ""
    intact = checkpoints.to_judge(folder)
    again = typed("fsdet eval {} --json {}", intact or folder / "best.pt", folder / "results.json")
    after = "" if intact else "put a copy in the place of best.pt, then "
    return f"results.json is of an earlier checkpoint, of which nothing is left here. Next: {after}{again}"


def is_of_a_split(results: Mapping[str, Any]) -> bool:
    """Whether a results.json was written here."""
    return results.get("task") in KINDS and results.get("task") != BY_SHOTS and "metrics" in results


def table(results: Mapping[str, Any]) -> str:
    """The figures as text, in per cent, and the confusion matrix of a classifier."""
    lines = [f"{results['task']}, split {results['split']}, {counted(results['images'], 'image')}, "
             f"{results['ms_per_image']:.1f} ms an image", ""]  # fmt: skip
    names = list(results["metrics"])
    lines += [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}",
              f"| {' | '.join(_percent(results['metrics'][n]) for n in names)} |"]  # fmt: skip
    if "confusion" in results:
        classes = results["names"]
        lines += ["", f"| taken for, of true: | {' | '.join(classes)} |", f"|{'---|' * (len(classes) + 1)}"]
        rows = zip(classes, results["confusion"], strict=True)
        lines += [f"| {name} | {' | '.join(map(str, row))} |" for name, row in rows]
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "-" if value is None or value != value else f"{100 * value:.1f}"
