# SPDX-License-Identifier: AGPL-3.0-or-later
"""An image classifier on a folder a class: focal loss or BCE, a rate for each part, stages that thaw by epoch."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fsdet.config import Config
from fsdet.data.batch import ImageBatch
from fsdet.data.check import check
from fsdet.data.collate import to_tensor
from fsdet.data.folders import load_folders, refuse_untaught
from fsdet.data.sources import DataSet
from fsdet.data.transforms import augment
from fsdet.errors import DataError, counted, explain
from fsdet.losses.bce import bce_loss
from fsdet.losses.focal import focal_loss
from fsdet.models.classifier import ImageClassifier
from fsdet.pictures import plot_confusion
from fsdet.tasks import initial
from fsdet.tasks.classified import Judge, positive_of
from fsdet.tasks.supply import ImageTask, evenly
from fsdet.types import LossReport

LISTED = 20  # errors of the data in a message
UNEVEN = 3  # times as many images of one class as of another


class ClassifierTask(ImageTask):
    """What a training step means for an image classifier; satisfies `types.Task`.

    Two classes share one logit, the one of `classifier.positive`; more have a column each.
    """

    name = "classifier"
    best_metric = "val/fitness"  # the area under the ROC curve

    def __init__(self, config: Config, data: DataSet) -> None:
        super().__init__(config, data)
        self.spec = spec_of(config, len(data.names))
        self.model = ImageClassifier(self.spec)
        self.positive = positive_of(config, data.names)
        self.pos_weight = self._pos_weight()

    def param_groups(self) -> Mapping[str, Sequence[tuple[str, nn.Parameter]]]:
        return self.model.groups()

    def batch(self, index: int) -> ImageBatch:
        store, jitter, size = self.supply.store, self.supply.jitter, self.supply.size
        made, ids, replaced = self.supply.made(
            index,
            lambda rng, i: (augment(rng, [store.sample(i)], jitter, size).image, int(store.records[i].labels[0])),
        )
        images, labels = zip(*made, strict=True)
        return ImageBatch(index, to_tensor(images, size), torch.tensor(labels), ids, replaced=replaced)

    def losses(self, batch: ImageBatch) -> LossReport:
        pooled = self.model.pooled(batch.images)
        logits = self.model.classifier(pooled)
        rows = self.rows(logits, batch.labels)
        count = torch.full((), float(len(rows)), device=rows.device)
        value = rows.sum() / count
        index = torch.arange(len(rows), device=rows.device)
        return LossReport(value, {"cls": value}, {"cls": value}, {"cls": len(rows)}, self._positives(batch.labels),
                          count, {"cls": rows.detach()}, {"cls": index}, (pooled if pooled.requires_grad else logits,),
                          batch.image_ids)  # fmt: skip

    def rows(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[B] loss of every image: logits [B, columns], labels [B] classes."""
        target, c = self._target(labels), self.config.classifier
        if c.loss == "bce":
            return bce_loss(logits, target, self.pos_weight)
        return focal_loss(logits, target, c.gamma, c.alpha)

    def _target(self, labels: Tensor) -> Tensor:
        if self.spec["columns"] == 1:
            return (labels == self.positive).float().unsqueeze(1)
        return nn.functional.one_hot(labels, self.spec["columns"]).float()

    def _positives(self, labels: Tensor) -> Tensor:
        return self._target(labels).sum()

    def _pos_weight(self) -> float:
        """What a positive counts under BCE; auto: as many times as there are more negatives, over all columns."""
        asked = self.config.classifier.pos_weight
        if asked != "auto":
            return float(asked)
        target = self._target(torch.tensor([int(r.labels[0]) for r in self.supply.store.records]))
        return float((target.numel() - target.sum()) / target.sum().clamp(min=1))

    def expected_initial(self, report: LossReport) -> Mapping[str, float]:
        """cls: the loss where every logit is 0, which is how the last layer starts."""
        count, ones = int(report.rows["cls"]), round(float(report.positives))
        other = 1 - self.positive if self.spec["columns"] == 1 else 0
        labels = torch.tensor([self.positive if i < ones else other for i in range(count)])
        return {"cls": float(self.rows(torch.zeros(count, self.spec["columns"]), labels).mean())}

    @cached_property
    def judge(self) -> "Judge":
        return Judge(self.config, self.data, evenly(self.data.split(self.split)))

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """{val/accuracy, val/f1, val/auc, val/fitness}; fitness is the accuracy where one class has no image."""
        found, _ = self.judge.figures(model)
        fitness = found["auc"] if np.isfinite(found["auc"]) else found["accuracy"]
        return {f"val/{name}": value for name, value in found.items()} | {"val/fitness": fitness}

    def illustrate(self, model: nn.Module, folder: Path, step: int) -> Sequence[Path]:
        return [self.judge.sheet(model, folder / f"step_{step:06d}.jpg", f"step {step}, validation images")]

    def describe(self) -> Mapping[str, Any]:
        return {"task": self.name, "model": self.spec, "classes": list(self.data.names),
                "positive": self.data.names[self.positive], "image_size": self.config.data.image_size,
                "data": str(self.config.data.path)}  # fmt: skip


def spec_of(config: Config, classes: int) -> dict[str, Any]:
    c = config.classifier
    return {"backbone": c.backbone, "width": c.width, "head": c.head, "dropout": c.dropout,
            "columns": 1 if classes == 2 else classes}  # fmt: skip


def read(config: Config) -> DataSet:
    return load_folders(config.data.path)


def create(config: Config, data: DataSet, *, resume: bool) -> tuple[ClassifierTask, str | None]:
    """The task; a fresh run looks at every image first.

    Raises:
        DataError: images are damaged or leak, or a class has none to learn from.
    """
    c = config.classifier
    if not resume:
        refuse_untaught(data)
        errors = check(data, deep=c.validate_data).errors
        if c.validate_data:
            errors = [*data.report.places(), *errors]  # what the reader has left out
        if errors:
            shown = [error.partition(". Next: ")[0] for error in errors[:LISTED]]
            got = "\n  ".join([counted(len(errors), "error"), *shown])
            cure = "mend or remove these files; classifier.validate_data=false trains without those that cannot be read"
            raise DataError(explain("sound data", got, config.data.path, cure))
    task = ClassifierTask(config, data)
    return task, None if resume else initial.start(task, config.stage.init_from, c.weights, "classifier",
                                                   lambda name: f"backbone.{name}")  # fmt: skip


def restored(values: Mapping[str, Any]) -> ImageBatch:
    return ImageBatch.restored(values)


def network(spec: Mapping[str, Any], where: str) -> ImageClassifier:
    return ImageClassifier(spec)


def planned(config: Config) -> tuple[Mapping[str, Any], str]:
    path, classes, where = config.data.path, 2, "assumed"
    if path and Path(path).expanduser().exists():
        classes, where = len(load_folders(path).names), path
    return spec_of(config, classes), f"{config.classifier.backbone}, {classes} classes ({where})"


def told(spec: Mapping[str, Any]) -> str:
    return f"classifier of {', '.join(spec['classes'][:6])}{', ...' if len(spec['classes']) > 6 else ''}"


def advice(data: DataSet) -> str:
    counts = np.bincount([int(r.labels[0]) for r in data.split("train")], minlength=len(data.names))
    if counts.min() * UNEVEN > counts.max():
        return ""
    return "classes are uneven: classifier.loss=bce with classifier.pos_weight=auto, or classifier.alpha, weighs them"


def inputs(config: Config) -> Sequence[tuple[int, int]]:
    return [(config.episode.queries, config.data.image_size)]


def look(model: nn.Module, images: Tensor) -> Any:
    return model(images)


def practice(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).float().square().sum()


def judge(model: nn.Module, config: Config, data: DataSet, split: str, folder: Path | None) -> Mapping[str, Any]:
    """Figures of a split, its confusion matrix (row predicted, column true), and both as pictures in `folder`."""
    judge = Judge(config, data, data.split(split))
    found, matrix = judge.figures(model)
    if folder is not None:
        plot_confusion(matrix, data.names, folder / "confusion.png", of=f"split {split}", background=False)
        judge.sheet(model, folder / "episodes" / f"eval_{split}.jpg", f"images of split {split}")
    return {"metrics": dict(found), "confusion": matrix.tolist(), "images": len(judge.true)}
