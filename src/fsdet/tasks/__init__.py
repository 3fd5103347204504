# SPDX-License-Identifier: AGPL-3.0-or-later
"""Config -> objects: what each kind of training is made of. The only readers of Config."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from fsdet.config import Config
from fsdet.data.sources import DataSet
from fsdet.engine.schedule import frozen_at
from fsdet.engine.trainer import Trainer
from fsdet.errors import CheckpointError, ConfigError, DataError, did_you_mean, explain
from fsdet.peers import ALONE, Peers
from fsdet.tasks import classifier, initial, maskrcnn, recipe, stages
from fsdet.tasks.kind import BuiltTask, Kind
from fsdet.tasks.stages import finetune_task

__all__ = ["KINDS", "build", "build_task", "finetune_task", "kind_of", "read_data", "trainer_of"]

log = logging.getLogger("fsdet")
KINDS: Mapping[str, Kind] = {"fewshot": stages, "maskrcnn": maskrcnn, "classifier": classifier}


def kind_of(name: str, where: str) -> Kind:
    """What `task: name` stands for. Raises CheckpointError for a name that this version does not know."""
    if name not in KINDS:
        raise CheckpointError(explain(f"one of the tasks {', '.join(KINDS)}", f"{name!r}.{did_you_mean(name, KINDS)}",
                                      where, "use the version that wrote it"))  # fmt: skip
    return KINDS[name]


def build(config: Config, *, resume: bool = False, exist_ok: bool = False, peers: Peers = ALONE) -> Trainer:
    """The Trainer of a configuration, with its data read, its weights initialised and its report logged.

    peers: the processes that train together.

    Raises:
        ConfigError, DataError, CheckpointError: the user's input is at fault.
    """
    data = read_data(config)
    task, report = build_task(config, data, resume=resume)
    log.info("%s", data.report)
    return trainer_of(task, report, resume=resume, exist_ok=exist_ok, peers=peers)


def trainer_of(task: BuiltTask, report: str | None, *, resume: bool = False, exist_ok: bool = False,
               peers: Peers = ALONE) -> Trainer:  # fmt: skip
    """The Trainer of an initialised task; report: what was initialised from where."""
    config, optim = task.config, recipe.applied(task.config).optim  # a recipe is chosen in stage 3 alone
    fresh = report == initial.SCRATCH
    if fresh:
        log.info(report)
    task.join(peers)
    task.warm(config.run.threads or torch.get_num_threads())
    made = Trainer(task, run=config.run, optim=optim, guard=config.guard, save=config.save, log=config.log,
                   workers=config.data.workers, eval_every=config.eval.every, resolved=config.model_dump(mode="json"),
                   folder=Path(config.run.dir), freeze=config.stage.freeze, freeze_norm=config.stage.freeze_norm,
                   resume=resume, exist_ok=exist_ok, init_report=None if fresh else report,
                   peers=peers)  # fmt: skip
    if fresh:
        _warn_of_noise(config)
    return made


def read_data(config: Config) -> DataSet:
    """The data set of a config. Raises ConfigError without data.path, DataError without a training split."""
    if not config.data.path:
        demo = "fsdet data demo datasets/demo" + ("" if config.task == "fewshot" else f" --task {config.task}")
        cure = f"set data.path, or draw the demo with {demo}"
        raise ConfigError(explain("a data YAML", "nothing", "data.path", cure))
    data = KINDS[config.task].read(config)
    if not data.has("train"):
        raise DataError(explain("a split train", "none", config.data.path, "add train: to the data YAML"))
    return data


def build_task(config: Config, data: DataSet, *, resume: bool) -> tuple[BuiltTask, str | None]:
    """The task of a config and what was initialised from where; on resume the weights come from the run itself."""
    return KINDS[config.task].create(config, data, resume=resume)


def _warn_of_noise(config: Config) -> None:
    """What a run from scratch can never learn."""
    if frozen := frozen_at(1, config.stage.freeze):
        named = ", ".join(frozen)
        log.warning("from scratch, and frozen: %s is noise that nothing trains; give weights or thaw it", named)
    if config.stage.freeze_norm:
        log.warning("from scratch, and BatchNorm frozen: its statistics are of no data; set stage.freeze_norm=false")
