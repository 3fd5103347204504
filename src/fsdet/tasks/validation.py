# SPDX-License-Identifier: AGPL-3.0-or-later
"""Judging a detector during training: fixed images, fixed supports, no randomness, no test data in any decision."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from fsdet.config import Config
from fsdet.data.episodes import support_instances
from fsdet.data.images import read_rgb
from fsdet.data.preprocessing import Preprocessing
from fsdet.data.shots import draw_shots
from fsdet.data.sources import DataSet
from fsdet.data.store import AUTO_BYTES, ImageStore
from fsdet.data.transforms import support_window
from fsdet.detect.scoring import Vocabulary, own_classes
from fsdet.detect.support import embed_instances
from fsdet.errors import DataError
from fsdet.evaluation.scorer import Scorer
from fsdet.files import write_durably
from fsdet.models.detector import DualDetector
from fsdet.models.prototypes import class_prototypes
from fsdet.pictures import Picture, episode_sheet
from fsdet.tasks.looking import dense_batches, detect_batch
from fsdet.tasks.supply import evenly, judged_split, over_readable
from fsdet.types import Detections, ImageRecord

T = TypeVar("T")
log = logging.getLogger("fsdet")
VALIDATION_SHOTS = 5
SHOWN, SHOWN_WAYS = 9, 6  # images and classes on a sheet


def shot_prototypes(embeddings: Tensor, shots: Sequence[Sequence[int]], k: int) -> Tensor:
    """Mean of the first k rows of each class: embeddings [n, D], shots[way] = row indices -> [N, D]."""
    rows = [r for found in shots for r in found[:k]]
    way = [w for w, found in enumerate(shots) for _ in found[:k]]
    return class_prototypes(embeddings[rows], torch.tensor(way, device=embeddings.device), len(shots))


def without_classes(records: Sequence[ImageRecord], keep_below: int) -> list[ImageRecord]:
    """Records with only the boxes of classes below `keep_below`."""
    return [r.kept(r.labels < keep_below) for r in records]


def one_class(record: ImageRecord) -> ImageRecord:
    """A record whose objects are just objects."""
    known = record.exhaustive if record.exhaustive is None else frozenset()
    return replace(record, labels=np.zeros_like(record.labels), exhaustive=known)


class Validator:
    """Base AP on split val through the standard branch; from stage 2 also through prototypes of base instances.

    Those prototypes come from fixed training instances, so they say how well comparison works without a look at any
    novel class; `fitness` is what picks best.pt.
    """

    def __init__(self, config: Config, data: DataSet) -> None:
        self.config, self.data = config, data
        self.size, self.support_size = config.data.image_size, config.data.support_size
        self.prepare = Preprocessing(self.size, self.support_size)
        self.finetune = config.stage.name == "finetune"
        self.best_metric = "val/fitness"
        records = evenly(data.split(judged_split(data)))
        self.store = ImageStore(without_classes(records, data.num_base), self.size, AUTO_BYTES)
        self._count_on()
        self.base, self.filled = list(range(len(data.base))), False
        self.compare = config.stage.name == "episodic" and config.stage.mode != "standard"
        if self.compare:
            self.supports = ImageStore(data.split("train"), self.size)
            self._draw_supports()
            self.compare = bool(self.ways)
            if not self.ways:
                log.warning("no base class has %d training instances: validation goes by the standard branch alone",
                            VALIDATION_SHOTS)  # fmt: skip

    def _draw_supports(self) -> None:
        records = self.supports.records
        found = support_instances(records, self.base)
        self.ways = [c for c in self.base if len(found[c]) >= VALIDATION_SHOTS]
        self.picks = draw_shots(records, self.ways, [VALIDATION_SHOTS], 0, self.data.names)

    def _count_on(self) -> None:
        """What detections are held against: the images of the store as it is."""
        records, metric = self.store.records, self.config.eval.metric
        self.scorer = Scorer(records, len(self.data.names), metric)
        self.box_scorer = Scorer([one_class(r) for r in records], 1, metric)

    @torch.inference_mode()
    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """{val/base/AP50, val/base/AP, val/base/AP50_boxes (whatever the class), val/fitness, ...}; deterministic."""
        was_training = model.training
        model.eval()
        if not self.filled:
            self.filled = self.store.fill() > 0
        words = {"base": self._own()}
        if self.compare:
            words["base_by_prototype"] = self._over_supports(lambda: self._prototype_words(model, self.ways))
        found = over_readable(self.store, lambda: self._found(model, words))
        if len(found["base"]) != self.scorer.num_images:  # an image has been left out
            self._count_on()
        out = {}
        for name, detections in found.items():
            scores = self.scorer.score([d for d in detections])
            out[f"val/{name}/AP50"], out[f"val/{name}/AP"] = scores.ap50(self.base), scores.ap(self.base)
        nameless = [replace(d, labels=torch.zeros_like(d.labels)) for d in found["base"]]
        out["val/base/AP50_boxes"] = self.box_scorer.score(nameless).ap50()
        out["val/fitness"] = float(np.mean([out[f"val/{n}/AP50"] + out[f"val/{n}/AP"] for n in words]) / 2)
        model.train(was_training)
        return out

    def _found(self, model: DualDetector, words: Mapping[str, Vocabulary]) -> dict[str, list[Detections]]:
        found: dict[str, list[Detections]] = {name: [] for name in words}
        for seen in dense_batches(model, self.store, self.prepare):
            for name, vocabulary in words.items():
                found[name] += detect_batch(model, seen, vocabulary)
        return found

    def _own(self) -> Vocabulary:
        return own_classes(self.base, len(self.base), self.config.stage.mode)

    def _over_supports(self, make: Callable[[], T]) -> T:
        """What `make` makes of the supports; others are drawn where one's image cannot be read, which the log says.

        Raises:
            DataError: no class has enough that can be read, or the fault lies elsewhere.
        """
        while True:
            try:
                return make()
            except DataError:
                gone = self.supports.drop_unreadable(sorted({i for picked in self.picks.values() for i, _ in picked}))
                if gone:
                    self._draw_supports()
                if not gone or not self.ways:
                    raise
                for error in gone:
                    log.warning("other supports for validation, as one cannot be read: %s", error)

    def _prototype_words(self, model: DualDetector, classes: Sequence[int]) -> Vocabulary:
        flat = [pick for c in classes for pick in self.picks[c]]
        embeddings = embed_instances(model, (self.supports.instance(i, j) for i, j in flat), self.support_size)
        per_way = np.arange(len(flat)).reshape(len(classes), -1).tolist()
        return Vocabulary(prototypes=shot_prototypes(embeddings, per_way, VALIDATION_SHOTS),
                          prototype_labels=tuple(classes))  # fmt: skip

    @torch.inference_mode()
    def illustrate(self, model: nn.Module, folder: Path, step: int) -> Sequence[Path]:
        """One sheet of fixed validation images, true boxes dashed, predicted ones with class and score.

        A json beside it holds the boxes as numbers.

        In stage 2 it is an episode: a few base classes by their support crops, sought in images that hold them; boxes
        of the other classes are not drawn, as nobody looks for them.
        """
        return over_readable(self.store, lambda: self._illustrated(model, folder, step))

    def _illustrated(self, model: nn.Module, folder: Path, step: int) -> Sequence[Path]:
        model.eval()
        classes, words, supports = self.base, self._own(), []
        if self.compare:
            classes, words, supports = self._over_supports(lambda: self._shown_ways(model))
        holding = [r for r in self.store.records if set(classes) & set(r.labels.tolist())] or self.store.records
        shown = ImageStore(holding[:SHOWN], self.size)
        queries, listed = [], []
        for seen in dense_batches(model, shown, self.prepare):
            for record, found in zip(seen.records, detect_batch(model, seen, words, 0.3), strict=True):
                sought = record.kept(np.isin(record.labels, classes))
                queries.append(query_picture(sought, found, self.data.names))
                listed.append(box_rows(sought, found))
        title = f"step {step}, validation images; dashed: truth{' of the classes on the left' if supports else ''}"
        sheet = episode_sheet(supports, queries, folder / f"step_{step:06d}.jpg", title=title)
        content = {"step": step, "names": list(self.data.names), "images": listed}
        write_durably(sheet.with_suffix(".json"), json.dumps(content).encode())
        return [sheet]

    def _shown_ways(self, model: DualDetector) -> tuple[list[int], Vocabulary, list[Picture]]:
        """Classes of a sheet, what finds them, and their supports."""
        classes = self.ways[:: max(1, len(self.ways) // SHOWN_WAYS)][:SHOWN_WAYS]
        return classes, self._prototype_words(model, classes), self._support_pictures(classes)

    def _support_pictures(self, classes: Sequence[int]) -> list[Picture]:
        pictures = []
        for c in classes:
            for pick in self.picks[c]:
                window, box = support_window(*self.supports.instance(*pick), self.support_size)
                pictures.append(Picture(window, box[None], colours=[c], title=self.data.names[c]))
        return pictures


def query_picture(record: ImageRecord, found: Detections, names: Sequence[str]) -> Picture:
    """An image with its true boxes and what was found in it."""
    labels = found.labels.tolist()
    texts = [f"{names[i]} {score:.2f}" for i, score in zip(labels, found.scores.tolist(), strict=True)]
    return Picture(read_rgb(record.path), found.boxes.cpu().numpy(), texts, labels, record.boxes)


def box_rows(record: ImageRecord, found: Detections) -> dict[str, Any]:
    """An image with its true boxes (x1, y1, x2, y2 px, label) and those found in it (and score), as plain values."""
    true = [[*box, label] for box, label in zip(record.boxes.tolist(), record.labels.tolist(), strict=True)]
    rows = zip(found.boxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True)
    return {"path": str(record.path), "true": true, "found": [[*box, label, score] for box, label, score in rows]}
