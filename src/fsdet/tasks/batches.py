# SPDX-License-Identifier: AGPL-3.0-or-later
"""From (seed, index) to the batch of a stage: which images and instances, how they are changed, as which targets."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from fsdet.config import Config
from fsdet.data.collate import collate
from fsdet.data.episodes import BalancedPlanner, EpisodePlanner, EpisodeSettings, EpochPlanner
from fsdet.data.paste import Cutout, alone, paste, rectangle, silhouette
from fsdet.data.sources import DataSet
from fsdet.data.store import AUTO_BYTES, ImageStore
from fsdet.data.transforms import Disguise, Jitter, Sample, augment, support_window
from fsdet.data.unusable import TRIES, Unmade, usable
from fsdet.types import BACKGROUND, Episode, EpisodePlan, ImageRecord, Replaced

SUPPORT_JITTER = 0.5  # supports move, zoom and change colour, with half the ranges of the queries
CACHE = {"none": 0, "auto": AUTO_BYTES, "ram": 1 << 40}  # bytes of decoded images


class Batches:
    """The batches of one stage; `make(i)` is a pure function of (run.seed, i).

    Args:
        config: the whole configuration. data: the data set it names. classes: columns of the standard classifier.
        shots: {novel class: [(record index, box index), ...]} in split `shot_split`, for stage 3.
    """

    def __init__(self, config: Config, data: DataSet, classes: int, shots: Mapping[int, Sequence[tuple[int, int]]],
                 shot_split: str) -> None:  # fmt: skip
        self.config, self.classes, self.seed = config, classes, config.run.seed
        self.jitter = jitter_of(config)
        records = training_records(data, config)
        self.store = ImageStore(records, config.data.image_size, CACHE[config.data.cache])
        self.shots = [(c, i, j) for c, found in sorted(shots.items()) for i, j in found]
        self.shot_store = ImageStore(data.split(shot_split), config.data.image_size) if self.shots else None
        self._shots_of: dict[int, list[tuple[int, int]]] = {}
        for c, i, j in self.shots:
            self._shots_of.setdefault(c, []).append((i, j))
        self._cutouts: dict[tuple[int, int, bool], Cutout] = {}
        self.planner = _planner(config, records, len(data.base))
        self.part = range(config.episode.queries)  # the places of a batch that this process makes
        self.per_epoch = config.episode.per_epoch or max(1, len(records) // config.episode.queries)
        steps, epochs = config.optim.steps, config.optim.epochs
        count = steps * config.optim.accumulate if steps else round((epochs or 1) * self.per_epoch)
        self.mosaic_until = count * (1 - config.data.augment.close_mosaic)

    @property
    def shots_a_class(self) -> int:
        """K of stage 3, the most of any class; 0 elsewhere."""
        return max(map(len, self._shots_of.values()), default=0)

    def warm(self, threads: int) -> None:
        """Decode what the cache may hold before loader workers fork, so that they share it."""
        self.store.fill(threads)
        if self.shot_store is not None:
            self.shot_store.cache_bytes = self.store.cache_bytes
            self.shot_store.fill(threads)

    def make(self, index: int) -> Episode:
        """Batch `index`, on the host; `replaced` of it are the samples that could not be used.

        Raises:
            Unmade: one sample after another cannot be used.
        """
        replaced: list[Replaced] = []
        plan, windows = self._supports(index, replaced)
        size, support_size = self.config.data.image_size, self.config.data.support_size
        drawn = [self._query(index, slot, plan, replaced) for slot in self.part]
        samples = [sample for _, sample in drawn]
        ways = [way for way, _, _ in plan.supports]
        change = self._disguise(index) if plan.class_ids else None
        if change is not None:
            samples = [replace(s, image=change.image(s.image), boxes=change.boxes(s.boxes, size)) for s in samples]
            windows = [(change.image(w), change.boxes(box, support_size)) for w, box in windows]
        ids = [self._name(q) for q, _ in drawn]
        episode = collate(index, samples, ids, self.classes, size, windows, ways, plan.class_ids, support_size)
        episode = replace(episode, replaced=tuple(replaced))
        return episode if change is None else unnamed(episode)

    def _name(self, record: int) -> str:
        return self.store.records[record].image_id

    def _disguise(self, index: int) -> Disguise | None:
        rng = np.random.default_rng((self.seed, 6, index))
        return Disguise.draw(rng) if rng.random() < self.config.episode.disguise else None

    def _support_jitter(self) -> Jitter:
        j = self.jitter
        return Jitter(scale=SUPPORT_JITTER * j.scale, flip=j.flip, hsv=tuple(SUPPORT_JITTER * g for g in j.hsv))

    def _supports(self, index: int, replaced: list[Replaced]) -> tuple[EpisodePlan, list[tuple]]:
        """The plan of a batch and its support windows; where a class has no usable instance, with other classes."""
        plan, draws = self.planner.plan(index), 0
        while True:
            try:
                return plan, [self._support(index, slot, plan, replaced) for slot in range(len(plan.supports))]
            except Unmade:
                draws += 1
                if draws == TRIES:
                    raise
                plan = self.planner.plan(index, draws)

    def _support(self, index: int, slot: int, plan: EpisodePlan, replaced: list[Replaced]) -> tuple:
        """The window of a support instance and the box in it."""
        size, jitter = self.config.data.support_size, self._support_jitter()
        _, window = usable((self.seed, 4, index, slot), plan.supports[slot][1:],
                           lambda pick, rng: support_window(*self.store.instance(*pick), size, rng, jitter),
                           lambda pick: self._name(pick[0]),
                           lambda _, rng: self.planner.substitute_support(rng, plan, slot), replaced)  # fmt: skip
        return window

    def _query(self, index: int, slot: int, plan: EpisodePlan, replaced: list[Replaced]) -> tuple[int, Sample]:
        """The record that a slot shows, and what is made of it."""
        return usable((self.seed, 3, index, slot), plan.queries[slot],
                      lambda query, rng: self._sample(index, query, plan, rng), self._name,
                      lambda query, rng: self.planner.substitute(rng, plan, query), replaced)  # fmt: skip

    def _sample(self, index: int, query: int, plan: EpisodePlan, rng: np.random.Generator) -> Sample:
        members = [query]
        if index < self.mosaic_until and rng.random() < self.jitter.mosaic:
            members += [self._partner(rng, plan, query) for _ in range(3)]
        samples = [self.store.sample(i) for i in members]
        if self.shots:
            return self._with_shot(rng, samples)
        return augment(rng, samples, self.jitter, self.config.data.image_size)

    def _with_shot(self, rng: np.random.Generator, base: Sequence[Sample]) -> Sample:
        """Stage 3: a base image with shots pasted on it, or a shot's whole image, or a base image as it is.

        Novel classes come equally often.
        """
        a, size, chance = self.config.data.augment, self.config.data.image_size, rng.random()
        turned = replace(self.jitter, degrees=a.turn)
        if chance < a.paste:
            out = augment(rng, base, self.jitter, size)
            for _ in range(int(rng.integers(1, a.pastes + 1))):
                cutout = self._cutout(self._drawn_shot(rng), rng.random() < a.outline)
                out = paste(rng, out, cutout, turned, match_size=rng.random() < a.match_size)
            return out
        if chance >= a.paste + a.whole:
            return augment(rng, base, self.jitter, size)
        return augment(rng, [self._whole(self._drawn_shot(rng)) for _ in base], turned, size)

    def _whole(self, pick: tuple[int, int]) -> Sample:
        """A shot in its own image. What else is annotated there is grey, what is left is background."""
        sample, index = self.shot_store.instance(*pick)
        return alone(sample, index)

    def _drawn_shot(self, rng: np.random.Generator) -> tuple[int, int]:
        candidates = self._shots_of[int(rng.choice(list(self._shots_of)))]
        return candidates[int(rng.integers(len(candidates)))]

    def _cutout(self, pick: tuple[int, int], outlined: bool) -> Cutout:
        """A shot to paste, along its silhouette where that is wanted and found; each is cut out once."""
        key = (*pick, outlined)
        if key not in self._cutouts:
            sample, index = self.shot_store.instance(*pick)
            self._cutouts[key] = (silhouette(sample, index) if outlined else None) or rectangle(sample, index)
        return self._cutouts[key]

    def _partner(self, rng: np.random.Generator, plan: EpisodePlan, query: int) -> int:
        if isinstance(self.planner, EpisodePlanner):
            return self.planner.partner(rng, plan, query)
        return int(rng.integers(len(self.store.records)))


def _planner(
    config: Config, records: Sequence[ImageRecord], base: int
) -> EpochPlanner | BalancedPlanner | EpisodePlanner:
    """Which images and instances a batch is made of: by epoch, by episode, or by class, as the stage has it."""
    episode, seed = config.episode, config.run.seed
    if config.stage.name == "base":
        return EpochPlanner(records, episode.queries, seed)
    if config.stage.name == "finetune":
        return BalancedPlanner(records, episode.queries, seed)
    least, most = (episode.shots, episode.shots) if isinstance(episode.shots, int) else episode.shots
    settings = EpisodeSettings(episode.ways, (least, most), episode.queries, episode.negatives)
    return EpisodePlanner(records, range(base), settings, seed)


def jitter_of(config: Config) -> Jitter:
    """The training augmentation of a config."""
    a = config.data.augment
    return Jitter(a.mosaic, a.degrees, a.translate, a.scale, a.flip, a.hsv, a.blur)


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
            base = frozenset(range(data.num_base))
            known = base if r.exhaustive is None else base & r.exhaustive
            r = replace(r.kept(~novel), exhaustive=known)
        out.append(r)
    return out
