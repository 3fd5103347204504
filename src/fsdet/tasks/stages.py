# SPDX-License-Identifier: AGPL-3.0-or-later
"""The few-shot detector's stages 1, 2 and 3 as a kind of training (see kind.py)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import softplus

from fsdet.config import Config
from fsdet.data import sources
from fsdet.data.report import Report
from fsdet.data.sources import DataSet
from fsdet.errors import DataError, UserError, counted, explain
from fsdet.models.build import build_model
from fsdet.tasks import initial, recipe
from fsdet.tasks.fewshot import FewshotTask, spec_of
from fsdet.types import Episode, Targets

USUAL_CLASSES = 80  # a model is counted for, when its data are not there to say
Shots = Mapping[int, Sequence[tuple[int, int]]]  # {novel class: [(record index, box index), ...]}


def read(config: Config) -> DataSet:
    """The data set of a training. Raises DataError when it has no base class to train on."""
    data = sources.load(config.data.path)
    if not data.base:
        cure = "list them under base:, or leave base: out, so that every class but the novel ones is one"
        raise DataError(explain("base classes", "none", f"{config.data.path}: base", cure))
    return data


def create(config: Config, data: DataSet, *, resume: bool) -> tuple[FewshotTask, str | None]:
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


def restored(values: Mapping[str, Any]) -> Episode:
    """A batch as it was, from the plain values of batch.pt."""
    content = dict(values, targets=Targets(**values["targets"]), image_ids=tuple(values["image_ids"]))
    return Episode(**content)


def network(spec: Mapping[str, Any], where: str) -> nn.Module:
    return build_model(spec, where)


def planned(config: Config) -> tuple[Mapping[str, Any], str]:
    base, novel, where = _classes(config)
    classes = base + novel if config.stage.name == "finetune" else base
    return spec_of(config, classes, base), f"{config.model.backbone}, {counted(classes, 'class', 'es')} ({where})"


def told(spec: Mapping[str, Any]) -> str:
    return (f"stage {spec['stage']}, {spec['mode']} mode, {len(spec['base'])} base and "
            f"{counted(len(spec['novel']), 'novel class', 'es')}")  # fmt: skip


def advice(data: DataSet) -> str:
    return ""


def inputs(config: Config) -> Sequence[tuple[int, int]]:
    """The queries, and in episodes the windows of their supports, where the detector itself looks at them."""
    episode, queries = config.episode, [(config.episode.queries, config.data.image_size)]
    if config.stage.name != "episodic" or config.model.support_encoder == "vit":
        return queries
    shots = episode.shots if isinstance(episode.shots, int) else max(episode.shots)
    return [*queries, (episode.ways * shots, config.data.support_size)]


def look(model: nn.Module, images: Tensor) -> Any:
    return model.dense(images)


def practice(model: nn.Module, images: Tensor) -> Tensor:
    dense = model.dense(images)
    compared = model.head.prototype_logits(dense, dense.embeddings[0, :0])
    ends = (dense.box_logits.float().log_softmax(-1), softplus(dense.standard), softplus(compared))
    return sum(end.sum() for end in ends)


def judge(model: nn.Module, config: Config, data: DataSet, split: str, folder: Path | None) -> Mapping[str, Any]:
    """Refused: its figures are by shots and draws, which tasks/protocol.py makes."""
    raise UserError(explain("a task that is judged by a split alone", "the few-shot detector", "judge",
                            "use fsdet eval, which draws supports"))  # fmt: skip


def _classes(config: Config) -> tuple[int, int, str]:
    """How many base and novel classes the data have, and who says so."""
    path = config.data.path
    if not path or not Path(path).expanduser().exists():
        return USUAL_CLASSES, 0, f"assumed: there is no '{path}'" if path else "assumed: data.path is not set"
    listed = sources.plan(path, Report())
    if listed.base is not None:
        return len(listed.base), len(listed.novel), path
    data = sources.load(path)
    return len(data.base), len(data.novel), path
