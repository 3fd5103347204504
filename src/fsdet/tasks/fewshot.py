# SPDX-License-Identifier: AGPL-3.0-or-later
"""The dual-head few-shot detector: stages 1 (base), 2 (episodic) and 3 (finetune) as one task."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fsdet.config import Config
from fsdet.data.shots import ShotFile, picks_sha256
from fsdet.data.sources import DataSet
from fsdet.models.build import build_model, model_spec
from fsdet.models.initialise import expected_cls
from fsdet.models.vit import vit_spec
from fsdet.objective import MODES, MultiLoss
from fsdet.peers import Peers
from fsdet.pictures import plot_labels
from fsdet.tasks import recipe, validation
from fsdet.tasks.batches import Batches
from fsdet.types import Episode, LossReport

BBOX_AT_START = 0.72  # .53 to .93 on the drawn set and on chess, three backbones
MANY_CLASSES = 64  # of which `auto` takes refine and objectness to hold for others: 80 gain by them, 4 and 8 lose


def loss_of(config: Config) -> MultiLoss:
    """The objective of a config."""
    loss = config.loss
    return MultiLoss(loss.weights.model_dump(), bbox=loss.bbox, dfl=loss.dfl, supcon=loss.supcon, cpe=loss.cpe,
                     supcon_tau=loss.supcon_tau, cpe_tau=loss.cpe_tau,
                     cpe_iou=loss.cpe_iou, cpe_weighting=loss.cpe_weighting, triplet_margin=loss.triplet_margin,
                     triplet_mining=loss.triplet_mining, pair_rows=loss.pair_rows, mode=config.stage.mode)  # fmt: skip


def spec_of(config: Config, classes: int, base: int) -> dict[str, Any]:
    """The plain spec of a config's model with `classes` columns, of which `base` are base classes."""
    m = config.model
    many = base >= MANY_CLASSES
    refine, objectness = (many if given == "auto" else given for given in (m.refine, m.objectness))
    encoder = vit_spec(m.vit.name, m.vit.weights or "", m.vit.image_size) if m.support_encoder == "vit" else None
    return model_spec(m.backbone, m.levels, classes, m.embed_dim, m.reg_max, m.support, m.proxies, base, encoder,
                      refine=refine, objectness=objectness)  # fmt: skip


def stamp_of(config: Config, data: DataSet, shots: Mapping[int, Sequence[tuple[int, int]]], split: str) -> dict:
    """{"seed", "unit", "sha256"} of the shots of stage 3: of the file they are from, else of the run's own draw."""
    file = ShotFile.load(config.data.shots) if config.data.shots else None
    seed, unit = (file.seed, file.unit) if file else (config.run.seed, "instance")
    return {"seed": seed, "unit": unit, "sha256": picks_sha256(data, split, shots)}


class FewshotTask:
    """What a training step means for the dual-head detector; satisfies `types.Task`.

    Args:
        config: the whole configuration. data: the data set it names.
        shots: {novel class: [(record index, box index), ...]}, for stage 3; shot_split: the split they index.
    """

    name = "fewshot"

    def __init__(self, config: Config, data: DataSet, shots: Mapping[int, Sequence[tuple[int, int]]] | None = None,
                 shot_split: str = "support") -> None:  # fmt: skip
        self.config, self.data, self.seed = config, data, config.run.seed
        self.finetune = config.stage.name == "finetune"
        self.classes = data.names if self.finetune else data.base
        torch.manual_seed(self.seed)
        self.spec = spec_of(config, len(self.classes), len(data.base))
        self.model = build_model(self.spec)
        if self.model.encoder:
            self.model.encoder.network()  # a file that has changed is found now, not at the first episode
        self.objective = loss_of(config)
        self.batches = Batches(recipe.applied(config), data, len(self.classes), shots or {}, shot_split)
        self.draw = stamp_of(config, data, shots, shot_split) if shots else None
        self.shot_split = shot_split if shots else None
        self.batches_per_epoch, self.samples = self.batches.per_epoch, len(self.batches.store.records)
        self.validator = validation.Validator(config, data)
        self.best_metric = self.validator.best_metric

    def warm(self, threads: int) -> None:
        self.batches.warm(threads)

    def join(self, peers: Peers) -> None:
        self.batches.part = peers.part(self.config.episode.queries, "episode.queries")
        self.objective.peers = peers

    def param_groups(self) -> Mapping[str, Sequence[tuple[str, nn.Parameter]]]:
        return self.model.groups()

    def batch(self, index: int) -> Episode:
        return self.batches.make(index)

    def losses(self, batch: Episode) -> LossReport:
        output, dense = self.model(batch)
        inputs = tuple(t for t in dense.features if t.requires_grad)  # none under a frozen trunk: then its outputs
        return self.objective(output, batch.targets, batch.class_ids, contrast=self.model.contrast,
                              probe_at=inputs or (dense.box_logits, dense.embeddings, dense.standard),
                              image_ids=batch.image_ids)  # fmt: skip

    def expected_initial(self, report: LossReport) -> Mapping[str, float]:
        """dfl: ln R, uniform bins. cls: the prior. bbox: as measured; neither of the three of a batch with next to no
        targets. supcon: log of its rows, cpe: of those and the background's, if any row counts. triplet: a positive a
        right angle away beside a negative that is near.
        """
        if self.config.stage.name != "base":
            return {}
        model, loss, images = self.model, self.config.loss, self.config.episode.queries
        branches, normaliser = MODES[self.config.stage.mode], float(report.normaliser.detach())
        cls = expected_cls(model.head, model.trunk_wiring.strides, self.config.data.image_size, images, normaliser,
                           branches)  # fmt: skip
        dense = {"cls": cls, "bbox": BBOX_AT_START, "dfl": math.log(self.config.model.reg_max)}
        return {
            **(dense if normaliser > 1 else {}),
            "supcon": math.log(0.75 * loss.pair_rows),  # the others are background
            "cpe": math.log(loss.pair_rows) * loss.cpe_iou if report.rows.get("cpe") else 0.0,
            "triplet": loss.triplet_margin + 1.0,
        }

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        return self.validator.evaluate(model)

    def illustrate(self, model: nn.Module, folder: Path, step: int) -> Sequence[Path]:
        labels = folder.parent / "labels.png"
        if not labels.exists():
            plot_labels(self.batches.store.records, self.classes, labels)
        return self.validator.illustrate(model, folder, step)

    def describe(self) -> Mapping[str, Any]:
        return {"task": self.name, "stage": self.config.stage.name, "mode": self.config.stage.mode, "model": self.spec,
                "shots": self.batches.shots_a_class, "shot_split": self.shot_split, "draw": self.draw,
                "classes": list(self.classes), "base": list(self.data.base), "novel": list(self.data.novel),
                "image_size": self.config.data.image_size, "support_size": self.config.data.support_size,
                "preprocessing": self.validator.prepare.stored(), "data": str(self.config.data.path)}  # fmt: skip
