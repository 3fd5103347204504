# SPDX-License-Identifier: AGPL-3.0-or-later
"""What tasks on whole images share: which training images make batch i, and validation images in order."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from fsdet.config import Config
from fsdet.data.episodes import EpochPlanner
from fsdet.data.sources import DataSet
from fsdet.data.store import ImageStore
from fsdet.data.unusable import usable
from fsdet.errors import DataError, are, counted
from fsdet.peers import Peers
from fsdet.tasks.batches import CACHE, jitter_of
from fsdet.types import ImageRecord, Replaced

T = TypeVar("T")
log = logging.getLogger("fsdet")
MOST = 5000  # images of an evaluation within a training
CHUNK = 16  # of them at a time
SHOWN = 9  # images on a sheet


class Supply:
    """Training images by batch index: a pure function of (run.seed, index).

    config: the whole configuration; episode.queries images a step, every one once an epoch.
    """

    def __init__(self, config: Config, data: DataSet) -> None:
        self.seed, self.jitter, self.size = config.run.seed, jitter_of(config), config.data.image_size
        records = data.split("train")
        self.store = ImageStore(records, self.size, CACHE[config.data.cache])
        self.planner = EpochPlanner(records, config.episode.queries, self.seed)
        self.part = range(config.episode.queries)  # the places of a batch that this process makes
        self.per_epoch = config.episode.per_epoch or max(1, len(records) // config.episode.queries)

    def made(self, index: int, make: Callable[[np.random.Generator, int], T]) -> tuple[
        list[T], tuple[str, ...], tuple[Replaced, ...]
    ]:  # fmt: skip
        """(what `make` makes of a generator and a record index, image ids, what could not be used) of batch `index`.

        Raises:
            Unmade: one sample after another cannot be used.
        """
        plan, replaced = self.planner.plan(index), []
        drawn = [
            usable((self.seed, 3, index, slot), plan.queries[slot], lambda i, rng: make(rng, i), self._name,
                   lambda i, rng: self.planner.substitute(rng, plan, i), replaced)
            for slot in self.part
        ]  # fmt: skip
        return [made for _, made in drawn], tuple(self._name(i) for i, _ in drawn), tuple(replaced)

    def _name(self, record: int) -> str:
        return self.store.records[record].image_id


class ImageTask:
    """What a task on whole images has from its data, however its model looks; part of `types.Task`.

    supply: training images by batch index. split: where validation looks.
    """

    def __init__(self, config: Config, data: DataSet) -> None:
        torch.manual_seed(config.run.seed)  # the model is made after this
        self.config, self.data = config, data
        self.objective = nn.Module()
        self.supply = Supply(config, data)
        self.batches_per_epoch, self.samples = self.supply.per_epoch, len(self.supply.store.records)
        self.split = judged_split(data)

    def warm(self, threads: int) -> None:
        self.supply.store.fill(threads)

    def join(self, peers: Peers) -> None:
        self.supply.part = peers.part(self.config.episode.queries, "episode.queries")


def judged_split(data: DataSet) -> str:
    """The split that validation looks at: val, else train, which says so."""
    if not data.has("val"):
        log.warning("no split val: validation looks at training images, so best.pt is picked by what it has seen")
    return "val" if data.has("val") else "train"


def evenly(records: Sequence[ImageRecord]) -> Sequence[ImageRecord]:
    """At most MOST of a split for the evaluations within a training, from all over it, so that no class is left out."""
    return records[:: max(1, -(-len(records) // MOST))]


def over_readable(store: ImageStore, judge: Callable[[], T]) -> T:
    """What `judge` makes of a store's images. One that cannot be read is left out for good, named in the log.

    It is no image without objects: who asks counts without it, its objects neither found nor missed.
    Raises:
        DataError: no image can be read, or the fault lies elsewhere.
    """
    try:
        return judge()
    except DataError:
        gone = store.drop_unreadable()
        for error in gone:
            left = len(store.records)
            log.warning("left out of validation, %s %s left: %s", counted(left, "image"), are(left), error)
        if not store.records:
            raise
    return judge()


def chunks(count: int) -> Iterator[range]:
    return (range(i, min(i + CHUNK, count)) for i in range(0, count, CHUNK))


def spread(count: int) -> list[int]:
    """At most SHOWN indices, evenly taken."""
    return np.unique(np.linspace(0, count - 1, min(SHOWN, count)).round().astype(int)).tolist()
