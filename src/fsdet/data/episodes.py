# SPDX-License-Identifier: AGPL-3.0-or-later
"""What goes into batch i: plan(i) is a pure function of (seed, i), so a resumed run needs to remember only i."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fsdet.errors import DataError, counted, explain
from fsdet.types import EpisodePlan, ImageRecord

log = logging.getLogger("fsdet")
MIN_SUPPORT_SIDE = 8.0  # px of the original image: a smaller instance shows nothing of its class


@dataclass(frozen=True)
class EpisodeSettings:
    """ways N; shots (least, most) K; queries Q; negatives: share of queries without any of the N classes."""

    ways: int
    shots: tuple[int, int]
    queries: int
    negatives: float


def support_instances(records: Sequence[ImageRecord], classes: Sequence[int]) -> dict[int, list[tuple[int, int]]]:
    """{class: [(record index, box index), ...]} of the instances that can be a support: no crowd, not tiny."""
    found: dict[int, list[tuple[int, int]]] = {c: [] for c in classes}
    for i, record in enumerate(records):
        sides = record.boxes[:, 2:] - record.boxes[:, :2]
        for j, label in enumerate(record.labels.tolist()):
            if label in found and not record.crowd[j] and sides[j].min() >= MIN_SUPPORT_SIDE:
                found[label].append((i, j))
    return found


class EpochPlanner:
    """Stage 1: every image once an epoch, in an order drawn per epoch; N = 0."""

    def __init__(self, records: Sequence[ImageRecord], queries: int, seed: int) -> None:
        self.images, self.queries, self.seed = _some(records), queries, seed
        self.per_epoch = max(1, self.images // queries)
        self._order = lru_cache(maxsize=2)(self._draw_order)

    def _draw_order(self, epoch: int) -> np.ndarray:
        order = np.random.default_rng((self.seed, 1, epoch)).permutation(self.images)
        return np.resize(order, max(self.images, self.per_epoch * self.queries))  # fewer images than a batch: repeat

    def plan(self, index: int) -> EpisodePlan:
        epoch, batch = divmod(index, self.per_epoch)
        chosen = self._order(epoch)[batch * self.queries : (batch + 1) * self.queries]
        return EpisodePlan(index, (), (), tuple(int(i) for i in chosen))

    def substitute(self, rng: np.random.Generator, plan: EpisodePlan, query: int) -> int:
        """An image to stand for `query`, which cannot be used."""
        return int(rng.integers(self.images))

    def __getstate__(self) -> dict[str, object]:
        """Without the cache of orders, which no spawned worker could be handed."""
        return {name: value for name, value in vars(self).items() if name != "_order"}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._order = lru_cache(maxsize=2)(self._draw_order)


class BalancedPlanner:
    """Stage 3: every base class equally often, then one of its images; N = 0."""

    def __init__(self, records: Sequence[ImageRecord], queries: int, seed: int) -> None:
        self.queries, self.seed, self.per_epoch = queries, seed, max(1, _some(records) // queries)
        holding: dict[int, list[int]] = {}
        for i, record in enumerate(records):
            for label in set(record.labels.tolist()):
                holding.setdefault(label, []).append(i)
        self.holding = [images for _, images in sorted(holding.items())] or [list(range(len(records)))]

    def plan(self, index: int) -> EpisodePlan:
        rng = np.random.default_rng((self.seed, 5, index))
        chosen = [self.holding[c] for c in rng.integers(len(self.holding), size=self.queries)]
        return EpisodePlan(index, (), (), tuple(images[int(rng.integers(len(images)))] for images in chosen))

    def substitute(self, rng: np.random.Generator, plan: EpisodePlan, query: int) -> int:
        """An image to stand for `query`, which cannot be used: drawn as every other."""
        images = self.holding[int(rng.integers(len(self.holding)))]
        return images[int(rng.integers(len(images)))]


def _some(records: Sequence[ImageRecord]) -> int:
    if not records:
        raise DataError(explain("at least one training image", "none", "split train", "check the data YAML"))
    return len(records)


def fitting_ways(asked: int, classes: int) -> int:
    """N of an episode out of so many classes: as asked, else half of them (two at least, where there are two), so that
    an episode has classes that it does not look for."""
    return asked if asked <= classes else max(min(2, classes), classes // 2)


class EpisodePlanner:
    """Stage 2: N ways of `classes`, K shots each, Q queries, a share of which contains none of the N classes.

    With fewer classes than N that have an instance large enough to be a support, N is `fitting_ways`, which is told.

    Raises:
        DataError: when no class has one.
    """

    def __init__(self, records: Sequence[ImageRecord], classes: Sequence[int], settings: EpisodeSettings,
                 seed: int) -> None:  # fmt: skip
        self.settings, self.seed, self.count = settings, seed, len(records)
        self.instances = support_instances(records, classes)
        self.classes = sorted(c for c, found in self.instances.items() if found)
        self.images = {c: np.unique([i for i, _ in self.instances[c]]) for c in self.classes}
        self.present = np.zeros((len(records), max(classes, default=0) + 1), bool)
        for i, record in enumerate(records):
            self.present[i, record.labels[record.labels < self.present.shape[1]]] = True
        if not self.classes:
            need, have = f"base classes with instances of {MIN_SUPPORT_SIDE:.0f} px or more, for episodes", "none"
            raise DataError(explain(need, have, "split train", "check the data YAML, or add images"))
        self.ways = fitting_ways(settings.ways, len(self.classes))
        if self.ways < settings.ways:
            log.warning("episode.ways is %d, and there are instances of %s: episodes of %d", settings.ways,
                        counted(len(self.classes), "base class", "es"), self.ways)  # fmt: skip

    def plan(self, index: int, draw: int = 0) -> EpisodePlan:
        """Episode `index`. No query is also a support image of the episode, as far as the set has other images.

        draw: the first that can be made counts; others stand in for it.
        """
        s, rng = self.settings, np.random.default_rng((self.seed, 2, index, draw) if draw else (self.seed, 2, index))
        ways = rng.choice(self.classes, self.ways, replace=False)
        supports = []
        for way, c in enumerate(ways):
            found = self.instances[int(c)]
            k = min(int(rng.integers(s.shots[0], s.shots[1] + 1)), len(found))
            supports += [(way, *found[j]) for j in rng.choice(len(found), k, replace=False)]
        used = {i for _, i, _ in supports}
        queries = [self._query(rng, ways, used, negative=q < round(s.negatives * s.queries)) for q in range(s.queries)]
        return EpisodePlan(index, tuple(int(c) for c in ways), tuple(supports), tuple(queries))

    def _query(self, rng: np.random.Generator, ways: np.ndarray, used: set[int], negative: bool) -> int:
        for _ in range(50):  # a few tries find one in any but the smallest sets
            if negative:
                i = int(rng.integers(self.count))
                if not self.present[i, ways].any() and i not in used:
                    return i
            else:
                i = int(rng.choice(self.images[int(rng.choice(ways))]))
                if i not in used:
                    return i
        return int(rng.integers(self.count))

    def partner(self, rng: np.random.Generator, plan: EpisodePlan, query: int) -> int:
        """An image to stand beside `query` in a mosaic: one that keeps a negative query negative."""
        negative = not self.present[query, list(plan.class_ids)].any()
        return (
            self._query(rng, np.asarray(plan.class_ids), set(), negative) if negative else int(rng.integers(self.count))
        )

    def substitute(self, rng: np.random.Generator, plan: EpisodePlan, query: int) -> int:
        """An image to stand for `query`, which cannot be used; it shows a way of the episode where that one did."""
        ways = np.asarray(plan.class_ids)
        used = {record for _, record, _ in plan.supports} | {query}
        return self._query(rng, ways, used, negative=not self.present[query, ways].any())

    def substitute_support(self, rng: np.random.Generator, plan: EpisodePlan, slot: int) -> tuple[int, int]:
        """An instance (record, box) of the same class to stand for support `slot`, in no query's image if possible."""
        way, record, _ = plan.supports[slot]
        found = self.instances[plan.class_ids[way]]
        shown = {record, *plan.queries}
        choice = [pick for pick in found if pick[0] not in shown] or found
        return choice[int(rng.integers(len(choice)))]
