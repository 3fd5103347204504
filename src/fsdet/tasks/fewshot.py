# SPDX-License-Identifier: AGPL-3.0-or-later
"""The dual-head few-shot detector: stages 1 (base), 2 (episodic) and 3 (finetune) as one task."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fsdet.config import Config
from fsdet.data.collate import collate
from fsdet.data.episodes import BalancedPlanner, EpisodePlanner, EpisodeSettings, EpochPlanner
from fsdet.data.sources import DataSet
from fsdet.data.store import AUTO_BYTES, ImageStore
from fsdet.data.transforms import Disguise, Jitter, Sample, augment, paste, support_window
from fsdet.models.build import build_model, model_spec
from fsdet.objective import MultiLoss, expected_initial
from fsdet.pictures import plot_labels
from fsdet.tasks import validation
from fsdet.types import BACKGROUND, Episode, EpisodePlan, ImageRecord, LossReport

log = logging.getLogger("fsdet")
WHOLE = 0.3  # of stage 3's images without a pasted crop: whole images of the shots
SUPPORT_JITTER = 0.5  # supports move, zoom and change colour, with half the ranges of the queries


def jitter_of(config: Config) -> Jitter:
    """The training augmentation of a config."""
    a = config.data.augment
    return Jitter(a.mosaic, a.degrees, a.translate, a.scale, a.flip, a.hsv, a.blur)


def loss_of(config: Config) -> MultiLoss:
    """The objective of a config."""
    loss = config.loss
    return MultiLoss(loss.weights.model_dump(), bbox=loss.bbox, supcon_tau=loss.supcon_tau, cpe_tau=loss.cpe_tau,
                     cpe_iou=loss.cpe_iou, cpe_weighting=loss.cpe_weighting, triplet_margin=loss.triplet_margin,
                     triplet_mining=loss.triplet_mining, pair_rows=loss.pair_rows, mode=config.stage.mode)  # fmt: skip


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
        m = config.model
        torch.manual_seed(self.seed)
        self.spec = model_spec(m.backbone, m.levels, len(self.classes), m.embed_dim, m.reg_max, m.support, m.proxies,
                               len(data.base))  # fmt: skip
        self.model = build_model(self.spec)
        self.objective = loss_of(config)
        self.jitter = jitter_of(config)
        self.validator = validation.Validator(config, data)
        self.best_metric = self.validator.best_metric
        self._prepare(shots or {}, shot_split)

    def _prepare(self, shots: Mapping[int, Sequence[tuple[int, int]]], shot_split: str) -> None:
        config, episode = self.config, self.config.episode
        records = training_records(self.data, config)
        budget = {"none": 0, "auto": AUTO_BYTES, "ram": 1 << 40}[config.data.cache]
        self.store = ImageStore(records, config.data.image_size, budget)
        self.shots = [(c, i, j) for c, found in sorted(shots.items()) for i, j in found]
        self.shot_store = ImageStore(self.data.split(shot_split), config.data.image_size) if self.shots else None
        if config.stage.name == "episodic":
            least, most = (episode.shots, episode.shots) if isinstance(episode.shots, int) else episode.shots
            settings = EpisodeSettings(episode.ways, (least, most), episode.queries, episode.negatives)
            self.planner: EpochPlanner | BalancedPlanner | EpisodePlanner = EpisodePlanner(
                records, range(len(self.data.base)), settings, self.seed)  # fmt: skip
            self.batches_per_epoch = episode.per_epoch or max(1, len(records) // episode.queries)
        else:
            make = BalancedPlanner if self.finetune else EpochPlanner
            self.planner = make(records, episode.queries, self.seed)
            self.batches_per_epoch = episode.per_epoch or self.planner.per_epoch
        steps, epochs = config.optim.steps, config.optim.epochs
        batches = steps * config.optim.accumulate if steps else round((epochs or 1) * self.batches_per_epoch)
        self.mosaic_until = batches * (1 - config.data.augment.close_mosaic)

    def param_groups(self) -> Mapping[str, Sequence[tuple[str, nn.Parameter]]]:
        return self.model.groups()

    def warm(self, threads: int) -> None:
        """Decode what the cache may hold before loader workers fork, so that they share it."""
        self.store.fill(threads)
        if self.shot_store is not None:
            self.shot_store.cache_bytes = AUTO_BYTES
            self.shot_store.fill(threads)

    def batch(self, index: int) -> Episode:
        plan = self.planner.plan(index)
        size, support_size = self.config.data.image_size, self.config.data.support_size
        samples = [self._query(index, slot, plan) for slot in range(len(plan.queries))]
        windows, ways = [], []
        for slot, (way, record, box) in enumerate(plan.supports):
            rng = np.random.default_rng((self.seed, 4, index, slot))
            windows.append(support_window(*self.store.instance(record, box), support_size, rng, self._support_jitter()))
            ways.append(way)
        change = self._disguise(index) if plan.class_ids else None
        if change is not None:
            samples = [replace(s, image=change.image(s.image), boxes=change.boxes(s.boxes, size)) for s in samples]
            windows = [(change.image(w), change.boxes(box, support_size)) for w, box in windows]
        ids = [self.store.records[q].image_id for q in plan.queries]
        episode = collate(index, samples, ids, len(self.classes), size, windows, ways, plan.class_ids, support_size)
        return episode if change is None else unnamed(episode)

    def _disguise(self, index: int) -> Disguise | None:
        rng = np.random.default_rng((self.seed, 6, index))
        return Disguise.draw(rng) if rng.random() < self.config.episode.disguise else None

    def _support_jitter(self) -> Jitter:
        j = self.jitter
        return Jitter(scale=SUPPORT_JITTER * j.scale, flip=j.flip, hsv=tuple(SUPPORT_JITTER * g for g in j.hsv))

    def _query(self, index: int, slot: int, plan: EpisodePlan) -> Sample:
        rng = np.random.default_rng((self.seed, 3, index, slot))
        query = plan.queries[slot]
        members = [query]
        if index < self.mosaic_until and rng.random() < self.jitter.mosaic:
            members += [self._partner(rng, plan, query) for _ in range(3)]
        samples = [self.store.sample(i) for i in members]
        if self.shots:
            return self._with_shot(rng, samples)
        return augment(rng, samples, self.jitter, self.config.data.image_size)

    def _with_shot(self, rng: np.random.Generator, base: Sequence[Sample]) -> Sample:
        """Stage 3: a base image with a shot's crop on it, or a shot's whole image, or a base image as it is.

        Novel classes come equally often. Of a shot's image only the shot is known; the rest of it says nothing.
        """
        novel = sorted({c for c, _, _ in self.shots})
        wanted = int(rng.choice(novel))
        candidates = [(i, j) for c, i, j in self.shots if c == wanted]
        image, box = self.shot_store.instance(*candidates[int(rng.integers(len(candidates)))])
        shot = Sample(image.image, image.boxes[box : box + 1], image.labels[box : box + 1], frozenset())
        size, chance = self.config.data.image_size, rng.random()
        share = self.config.data.augment.paste
        if chance < share:
            return paste(rng, augment(rng, base, self.jitter, size), shot, self.jitter)
        return augment(rng, [shot] if chance < share + WHOLE * (1 - share) else base, self.jitter, size)

    def _partner(self, rng: np.random.Generator, plan: EpisodePlan, query: int) -> int:
        if isinstance(self.planner, EpisodePlanner):
            return self.planner.partner(rng, plan, query)
        return int(rng.integers(len(self.store.records)))

    def losses(self, batch: Episode) -> LossReport:
        output, dense = self.model(batch)
        return self.objective(output, batch.targets, batch.class_ids, contrast=self.model.contrast,
                              probe_at=dense.features, image_ids=batch.image_ids)  # fmt: skip

    def expected_initial(self) -> Mapping[str, float]:
        return expected_initial(len(self.classes), self.config.model.reg_max)

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        return self.validator.evaluate(model)

    def illustrate(self, model: nn.Module, folder: Path, step: int) -> Sequence[Path]:
        labels = folder.parent / "labels.png"
        if not labels.exists():
            plot_labels(self.store.records, self.classes, labels)
        return self.validator.illustrate(model, folder, step)

    def describe(self) -> Mapping[str, Any]:
        return {"task": self.name, "stage": self.config.stage.name, "mode": self.config.stage.mode, "model": self.spec,
                "shots": max((sum(c == d for d, _, _ in self.shots) for c, _, _ in self.shots), default=0),
                "classes": list(self.classes), "base": list(self.data.base), "novel": list(self.data.novel),
                "image_size": self.config.data.image_size, "support_size": self.config.data.support_size,
                "data": str(self.config.data.path)}  # fmt: skip


def unnamed(episode: Episode) -> Episode:
    """A disguised episode: its objects are of its N ways or of none; what it looks like says nothing of base classes.

    Standard logits and proxies learn nothing from it, objects outside the ways stay true negatives of the ways.
    """
    t = episode.targets
    hidden = replace(
        t, base_labels=torch.full_like(t.base_labels, BACKGROUND), base_known=torch.zeros_like(t.base_known)
    )
    return replace(episode, targets=hidden)


def training_records(data: DataSet, config: Config) -> list[ImageRecord]:
    """Split train for any stage: the base boxes of images that may show novel objects.

    With `base_images: no_novel` images that show a novel class are left out. Of the rest novel boxes are taken away,
    and the image says that it does not label novel classes, so that stage 3 does not teach them as background.
    """
    records, out = data.split("train"), []
    for r in records:
        novel = r.labels >= data.num_base
        if novel.any():
            if config.data.base_images == "no_novel":
                continue
            known = frozenset(range(data.num_base)) & (r.exhaustive or frozenset(range(data.num_base)))
            r = replace(r, boxes=r.boxes[~novel], labels=r.labels[~novel], crowd=r.crowd[~novel], exhaustive=known)
        out.append(r)
    return out
