# SPDX-License-Identifier: AGPL-3.0-or-later
"""What one look at a split shows of a trained model, before it is a page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fsdet.data.sources import DataSet
from fsdet.errors import DataError, counted, explain
from fsdet.evaluation.outcomes import Outcome
from fsdet.pictures import Picture
from fsdet.types import ImageRecord


@dataclass(frozen=True, eq=False)
class Places:
    """A map of embeddings: points [n, 2], the class of each, its kind (pictures.charts.KINDS); share of the variance
    that the two axes hold."""

    points: np.ndarray
    classes: Sequence[int]
    kinds: Sequence[str]
    share: float


@dataclass(frozen=True, eq=False)
class Exhibit:
    """told: what was looked at. names: by label. shown: the labels of the classes it is about. records: the images.

    outcomes: of those classes, best first. whole: an outcome is an image, not a box in one. supports: {label: what the
    class was registered or trained from}. thresholds: {label: the score from which it is found}.
    precision [C, 101] over recall, ap50 [C]: on these images. chosen: whole images with what was found.
    """

    told: str
    names: Sequence[str]
    shown: Sequence[int]
    records: Sequence[ImageRecord]
    outcomes: Sequence[Outcome]
    whole: bool = False
    supports: Mapping[int, Sequence[Picture]] = field(default_factory=dict)
    thresholds: Mapping[int, float] = field(default_factory=dict)
    precision: np.ndarray | None = None
    ap50: np.ndarray | None = None
    chosen: Sequence[Picture] = ()
    places: Places | None = None


def looked_at(data: DataSet, split: str, most: int) -> tuple[list[ImageRecord], str]:
    """At most `most` images of a split, evenly taken, and which they are in words; val where there is no such split.

    Raises:
        DataError: neither has an image.
    """
    name = split if data.has(split) or not data.has("val") else "val"
    records = data.split(name)
    if not records:
        raise DataError(explain("an image", "none", f"{data.name}, split {name}", "name another data set with --data"))
    rows = np.unique(np.linspace(0, len(records) - 1, min(most, len(records))).round().astype(int))
    all_of = f"{counted(len(records), 'image')} of split {name}" + ("" if name == split else f" (there is no {split})")
    return [records[i] for i in rows], all_of if len(rows) == len(records) else f"{len(rows)} of the {all_of}"
