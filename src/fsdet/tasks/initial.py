# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where weights come from: stage.init_from, else a local weights file, else scratch. Never a resume."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fsdet.command import typed
from fsdet.config import Config
from fsdet.data import shots as shot_files
from fsdet.data.sources import DataSet
from fsdet.data.store import ImageStore
from fsdet.detect.support import embed_instances
from fsdet.engine import checkpoint as checkpoints
from fsdet.engine.checkpoint import first_non_finite
from fsdet.errors import CheckpointError, counted, explain
from fsdet.models.backbone import read_weights, trunk_names
from fsdet.models.build import SWITCHES
from fsdet.tasks.fewshot import FewshotTask
from fsdet.tasks.loading import Trained, load_trained
from fsdet.tasks.validation import shot_prototypes
from fsdet.types import Task

log = logging.getLogger("fsdet")
SCRATCH = "weights: from scratch"
FIXED = ("backbone", "levels", "embed_dim", "reg_max")  # what two stages of one detector must share


def initialise(task: FewshotTask, config: Config) -> str:
    """Fill the task's model in place; returns one line per thing that was or was not taken over."""
    if config.stage.init_from:
        path = checkpoints.in_run(config.stage.init_from)
        _warn_of_unfinished(path)
        return from_stage(task, load_trained(path))
    if config.stage.name == "finetune":
        raise CheckpointError(explain("a checkpoint of the stage before", "none", "stage.init_from",
                                      "set stage.init_from, e.g. checkpoints/stage2/best.pt"))  # fmt: skip
    if config.model.weights:
        return from_weights(task, Path(config.model.weights))
    if config.stage.name == "episodic":
        log.warning("stage.init_from is not set: episodes from scratch learn slowly; train stage 1 first")
    return SCRATCH


def _warn_of_unfinished(path: Path) -> None:
    """A run that is still under way, or was left before its end, has a checkpoint that is half trained."""
    manifest = checkpoints.read_manifest(path.parent)
    if path.name in manifest.get("files", {}) and not manifest.get("finished"):
        log.warning("%s is of a run that has not come to its end; to bring it there first: %s", path,
                    typed("fsdet train --resume {}", path.parent))  # fmt: skip


def from_weights(task: FewshotTask, path: Path) -> str:
    """A local weights file into trunk and head, by name and shape.

    Raises:
        CheckpointError: when not one tensor fits.
    """
    own = task.model.state_dict()
    given = read_weights(path)
    if not any(name in own for name in given):
        given = trunk_names(given, len(task.model.backbone), len(task.model.neck))
    return fit(task.model, given, path, task.config.model.backbone, "check model.backbone and model.levels")


def fit(model: nn.Module, given: Mapping[str, Tensor], path: Path, wanted: str, cure: str) -> str:
    """Put the tensors of `given` that fit by name and shape into `model`; says how many did, and which start fresh.

    Raises:
        CheckpointError: not one of them fits, or one that does holds NaN or inf.
    """
    own = model.state_dict()
    fits = {n: v for n, v in given.items() if n in own and own[n].shape == v.shape}
    if not fits:
        raise CheckpointError(explain(f"tensors of {wanted}", "not one that fits", str(path),
                                      f"{cure} against the file"))  # fmt: skip
    if where := first_non_finite(fits):
        raise CheckpointError(explain("finite weights", f"NaN or inf in {where}", str(path), "use another file"))
    model.load_state_dict(fits, strict=False)
    left = sorted(set(own) - set(fits))
    fresh = f"; {len(left)} start fresh ({_few(left)})" if left else ""
    return f"weights: {len(fits)} of {counted(len(own), 'tensor')} from {path}{fresh}"


def start(task: Task, init_from: str | None, weights: str | None, section: str,
          rename: Callable[[str], str] = str) -> str:  # fmt: skip
    """Fill a task's model from a run of the same task (stage.init_from), else a local weights file, else not at all.

    section: the configuration section with `weights`. rename: a name in that file as the model calls it.
    Raises:
        CheckpointError: a file that is missing, damaged, poisoned, of another task, or without a tensor that fits.
    """
    if init_from:
        path = checkpoints.in_run(init_from)
        _warn_of_unfinished(path)
        content = checkpoints.load(path)
        if content.get("task") != task.name:
            got = f"task {content.get('task')!r}"
            raise CheckpointError(explain(f"a checkpoint of task '{task.name}'", got, str(path),
                                          "correct stage.init_from"))  # fmt: skip
        return fit(task.model, content["ema"], path, f"task {task.name}", f"check section {section}")
    if weights:
        given = {rename(name): value for name, value in read_weights(Path(weights)).items()}
        return fit(task.model, given, Path(weights), f"section {section}", f"check section {section}")
    return SCRATCH


def from_stage(task: FewshotTask, trained: Trained) -> str:
    """Weights of the stage before. In stage 3 the classifiers grow by the novel classes.

    Raises:
        CheckpointError: another architecture or other base classes, with every difference.
    """
    spec, given = task.describe(), trained.spec
    wrong = [f"model.{k} {given['model'][k]!r} there, {spec['model'][k]!r} here" for k in FIXED
             if given["model"][k] != spec["model"][k]]  # fmt: skip
    wrong += [f"model.{k} true there, false here" for k in SWITCHES
              if given["model"].get(k) and not spec["model"].get(k)]  # fmt: skip
    wrong += _other_encoder(given["model"].get("encoder"), spec["model"].get("encoder"), bool(task.finetune))
    if list(given["base"]) != list(spec["base"]):
        wrong.append(_class_difference(given["base"], spec["base"]))
    if wrong:
        raise CheckpointError(explain("a checkpoint of the same detector", "; ".join(wrong), str(trained.path),
                                      "train the stage before with this config, or change the config"))  # fmt: skip
    own, theirs = task.model.state_dict(), dict(trained.model.state_dict())
    grown = [n for n, v in theirs.items() if n in own and own[n].shape != v.shape and own[n].shape[1:] == v.shape[1:]]
    for name in grown:
        rows = own[name].clone()
        rows[: len(theirs[name])] = theirs[name]
        theirs[name] = rows
    fits = {n: v for n, v in theirs.items() if n in own and own[n].shape == v.shape}
    task.model.load_state_dict(fits, strict=False)
    fresh = sorted(set(own) - set(fits))
    lines = [f"init_from {trained.path}: {len(fits)} of {len(own)} tensors fitted"]
    if fresh:
        lines.append(f"  {len(fresh)} start fresh ({_few(fresh)})")
    if trained.model.encoder:
        trained.model.encoder = task.model.encoder  # equal, read already, and at the place that this config names
    if task.batches.shots and not trained.finetuned:
        lines.append("  " + _novel_rows(task, trained))
    elif grown:
        lines.append(f"  {len(grown)} grew by the novel classes ({_few(grown)})")
    return "\n".join(lines)


def _other_encoder(there: Mapping[str, Any] | None, here: Mapping[str, Any] | None, finetune: bool) -> list[str]:
    """What differs between two stages' support encoders. A ViT may come in with the episodes, whose training fits the
    detector to it; it may not be exchanged, dropped, or come in when shots are what is left to train on."""
    if not there and not (here and finetune):
        return []
    words = [f"{e['name']} at {e['image_size']} px ({e['sha256'][:12]})" if e else "the detector itself"
             for e in (there, here)]  # fmt: skip
    return [] if words[0] == words[1] else [f"model.support_encoder {words[0]} there, {words[1]} here"]


@torch.no_grad()
def _novel_rows(task: FewshotTask, trained: Trained) -> str:
    """Novel proxies start as the prototypes of their shots; novel standard logits at the prior, without preference."""
    base = len(trained.classes)
    picks = [(i, j) for _, i, j in task.batches.shots]
    rows: dict[int, list[int]] = {}
    for row, (c, _, _) in enumerate(task.batches.shots):
        rows.setdefault(c, []).append(row)
    store: ImageStore = task.batches.shot_store
    embeddings = embed_instances(trained.model, (store.instance(*p) for p in picks), task.config.data.support_size)
    order = sorted(rows)
    most = max(len(r) for r in rows.values())
    prototypes = shot_prototypes(embeddings, [rows[c] for c in order], most)
    for prototype, c in zip(prototypes, order, strict=True):
        task.model.head.proxies[c] = prototype
        for conv in task.model.head.standard:
            conv.weight[c] = 0
            conv.bias[c] = conv.bias[:base].mean()
    starts = f"{counted(len(order), 'novel class', 'es')} start{'s' * (len(order) == 1)}"
    return f"{starts} from the prototypes of {counted(len(picks), 'shot')}"


def shots_of(config: Config, data: DataSet) -> tuple[Mapping[int, list[tuple[int, int]]], str]:
    """Stage 3's instances per novel class and the split they are in: data.shots, else drawn from split support."""
    k = config.episode.shots if isinstance(config.episode.shots, int) else config.episode.shots[1]
    novel = range(data.num_base, len(data.names))
    if config.data.shots:
        file = shot_files.ShotFile.load(Path(config.data.shots))
        return {c: picks for c, picks in file.picks(data, k).items() if c in novel}, file.split
    return shot_files.draw_shots(data.split("support"), list(novel), [k], config.run.seed, data.names), "support"


def _class_difference(there: list[str], here: list[str]) -> str:
    missing, extra = [n for n in here if n not in there], [n for n in there if n not in here]
    if not missing and not extra:
        return "the same base classes in another order"
    return f"base classes differ: {len(missing)} only here ({_few(missing)}), {len(extra)} only there ({_few(extra)})"


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
