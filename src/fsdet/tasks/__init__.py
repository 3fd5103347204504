# SPDX-License-Identifier: AGPL-3.0-or-later
"""Config -> objects: what each kind of training is made of. The only readers of Config."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fsdet.config import Config
from fsdet.data import sources
from fsdet.data.sources import DataSet
from fsdet.engine.trainer import Trainer
from fsdet.errors import ConfigError, DataError, explain
from fsdet.tasks import initial, recipe
from fsdet.tasks.fewshot import FewshotTask

log = logging.getLogger("fsdet")
Shots = Mapping[int, Sequence[tuple[int, int]]]  # {novel class: [(record index, box index), ...]}


def build(config: Config, *, resume: bool = False, exist_ok: bool = False) -> Trainer:
    """The Trainer of a configuration, with its data read, its weights initialised and its report logged.

    Raises:
        ConfigError, DataError, CheckpointError: the user's input is at fault.
    """
    data = read_data(config)
    task, report = build_task(config, data, resume=resume)
    log.info("%s", data.report)
    return trainer_of(task, report, resume=resume, exist_ok=exist_ok)


def trainer_of(task: FewshotTask, report: str | None, *, resume: bool = False,
               exist_ok: bool = False) -> Trainer:  # fmt: skip
    """The Trainer of an initialised task; report: what was initialised from where."""
    config, optim = task.config, recipe.applied(task.config).optim
    fresh = report == initial.SCRATCH
    if fresh:
        log.info(report)
    task.batches.warm(config.run.threads or torch.get_num_threads())
    return Trainer(task, run=config.run, optim=optim, guard=config.guard, save=config.save, log=config.log,
                   workers=config.data.workers, eval_every=config.eval.every, resolved=config.model_dump(mode="json"),
                   folder=Path(config.run.dir), freeze=config.stage.freeze, freeze_norm=config.stage.freeze_norm,
                   resume=resume, exist_ok=exist_ok, init_report=None if fresh else report)  # fmt: skip


def read_data(config: Config) -> DataSet:
    """The data set of a config. Raises ConfigError without data.path, DataError without a training split."""
    if not config.data.path:
        raise ConfigError(explain("a data YAML", "nothing", "data.path",
                                  "set data.path, or draw the demo with fsdet data demo datasets/demo"))  # fmt: skip
    data = sources.load(config.data.path)
    if not data.has("train"):
        raise DataError(explain("a split train", "none", config.data.path, "add train: to the data YAML"))
    return data


def build_task(config: Config, data: DataSet, *, resume: bool) -> tuple[FewshotTask, str | None]:
    """The task of a stage and what was initialised from where; on resume the weights come from the run itself.

    `task.config` names the recipe that stage.recipe=auto has chosen; `recipe.applied` has its values.
    """
    if config.stage.name != "finetune":
        task, chosen = FewshotTask(recipe.settled(config, data, {}, "support", resume=resume)[0], data), ""
    else:
        task, chosen = finetune_task(config, data, *initial.shots_of(config, data), resume=resume)
    if resume:
        return task, None
    return task, "\n  ".join(filter(None, (initial.initialise(task, task.config), chosen)))


def finetune_task(config: Config, data: DataSet, shots: Shots, split: str, *,
                  resume: bool = False) -> tuple[FewshotTask, str]:  # fmt: skip
    """The task of stage 3 on given shots, and what its recipe chose."""
    config, chosen = recipe.settled(config, data, shots, split, resume=resume)
    return FewshotTask(config, data, shots, split), chosen
