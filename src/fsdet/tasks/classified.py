# SPDX-License-Identifier: AGPL-3.0-or-later
"""A split of images with a class each, and how well a classifier does on it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from fsdet.config import Config
from fsdet.data.collate import to_tensor
from fsdet.data.sources import DataSet
from fsdet.data.store import AUTO_BYTES, ImageStore
from fsdet.data.transforms import letterbox
from fsdet.errors import ConfigError, did_you_mean, explain
from fsdet.evaluation.classification import figures
from fsdet.models.classifier import ImageClassifier
from fsdet.pictures import Picture, episode_sheet
from fsdet.tasks.supply import chunks, over_readable, spread
from fsdet.types import ImageRecord


class Judge:
    """Images, and how well a classifier does on them; no randomness, no augmentation."""

    def __init__(self, config: Config, data: DataSet, records: Sequence[ImageRecord]) -> None:
        self.names, self.size = data.names, config.data.image_size
        self.positive = positive_of(config, data.names)
        self.store = ImageStore(records, self.size, AUTO_BYTES)
        self.filled = False

    @property
    def true(self) -> np.ndarray:
        """[n] class of every image."""
        return np.array([int(r.labels[0]) for r in self.store.records])

    @torch.inference_mode()
    def scores(self, model: ImageClassifier, indices: Sequence[int] | None = None) -> np.ndarray:
        """[n, C] in [0, 1] of the split's images, or of some of them; of two classes they add up to 1."""
        self.filled = self.filled or self.store.fill() > 0
        wanted = list(range(len(self.true))) if indices is None else list(indices)
        rows = []
        for part in chunks(len(wanted)):
            images = [letterbox(self.store.sample(wanted[i]).image, self.size)[0] for i in part]
            rows.append(model(to_tensor(images, self.size).to(model.mean.device)).float().sigmoid().cpu().numpy())
        found = np.concatenate(rows).astype(np.float64)
        if len(self.names) > 2:
            return found
        both = np.concatenate([1 - found, found], 1)
        return both if self.positive == 1 else both[:, ::-1]

    def figures(self, model: ImageClassifier) -> tuple[Mapping[str, float], np.ndarray]:
        scores = over_readable(self.store, lambda: self.scores(model))
        return figures(scores, self.true, self.positive)

    def sheet(self, model: ImageClassifier, path: Path, title: str) -> Path:
        """Fixed images, each with the class that it is taken for, its score, and the true one beside it."""
        return episode_sheet([], over_readable(self.store, lambda: self._pictures(model)), path, title=title)

    def _pictures(self, model: ImageClassifier) -> list[Picture]:
        chosen, true, pictures = spread(len(self.true)), self.true, []
        for i, row in zip(chosen, self.scores(model, chosen), strict=True):
            said = int(row.argmax())
            text = f"{self.names[said]} {row[said]:.2f}, true: {self.names[true[i]]}"
            pictures.append(Picture(self.store.sample(i).image, title=text))
        return pictures


def positive_of(config: Config, names: Sequence[str]) -> int:
    """Index of the class that counts as found. Raises ConfigError for a name that no class has."""
    name = config.classifier.positive
    if name is None:
        return min(1, len(names) - 1)
    if name not in names:
        got = f"{name!r}.{did_you_mean(name, names)}"
        known = f"one of the classes {', '.join(names[:12])}"
        raise ConfigError(explain(known, got, "classifier.positive", "correct the name"))
    return list(names).index(name)
