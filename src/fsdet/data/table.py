# SPDX-License-Identifier: AGPL-3.0-or-later
"""What one reader found: images, and the flat list of their objects; cleaned in bulk, then cut into records."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fsdet.data.images import image_sizes
from fsdet.data.report import Report
from fsdet.data.root import Root
from fsdet.errors import DataError
from fsdet.types import ImageRecord

MIN_SIDE = 0.1  # px; a thinner box has no area to learn from
SLACK = 1.0  # px beyond the border that rounding and 1-based pixel indices explain


@dataclass
class Table:
    """Images [I] and objects [n] as a format's reader saw them.

    names: the source's own class names. sizes: (height, width) px or None, filled from headers by `measure`.
    boxes: xyxy px. image, label: index into paths and names. where: place of each object for the report,
    `origin` is written in front of it. shapes: {object: its outline}, for a reader that was asked for them; None: not.
    alone: an image is labelled for the classes that it has boxes of, not for all of the source's.
    """

    names: list[str]
    origin: str = ""
    paths: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int] | None] = field(default_factory=list)
    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    image: list[int] = field(default_factory=list)
    label: list[int] = field(default_factory=list)
    crowd: list[bool] = field(default_factory=list)
    where: list[str | int] = field(default_factory=list)
    shapes: dict[int, Any] | None = None
    alone: bool = False

    def add(
        self, box: tuple[float, float, float, float], image: int, label: int, crowd: bool, where: str | int
    ) -> None:
        self.boxes.append(box)
        self.image.append(image)
        self.label.append(label)
        self.crowd.append(crowd)
        self.where.append(where)

    def measure(self, root: Root, report: Report) -> None:
        """Read the missing sizes from the image headers; an unreadable image keeps None and yields no record."""
        missing = [index for index, size in enumerate(self.sizes) if size is None]
        for index, size in zip(missing, image_sizes([self.paths[i] for i in missing]), strict=True):
            if isinstance(size, DataError):
                report.add("unreadable image", root.show(self.paths[index]))
            else:
                self.sizes[index] = size

    def records(self, classes: Mapping[str, int], report: Report, exhaustive: bool = True) -> list[ImageRecord]:
        """One record per readable image, its boxes cleaned, labels being `classes[name]`.

        exhaustive: whether an image of this source shows no unlabelled object of any class of the data set; otherwise
        only of the source's own classes.
        """
        boxes, image, label, crowd, own = self._clean(classes, report)
        order = np.argsort(image, kind="stable")
        boxes, image, label, crowd, own = boxes[order], image[order], label[order], crowd[order], own[order]
        cut = np.searchsorted(image, np.arange(len(self.paths) + 1))
        known = None if exhaustive else frozenset(classes[name] for name in self.names if name in classes)

        def labelled(of: np.ndarray) -> frozenset[int] | None:
            return frozenset(of.tolist()) if self.alone and not exhaustive else known

        return [
            ImageRecord(
                Path(path), size, boxes[a:b], label[a:b], crowd[a:b], labelled(label[a:b]), self._shapes(own[a:b])
            )
            for path, size, a, b in zip(self.paths, self.sizes, cut[:-1].tolist(), cut[1:].tolist(), strict=True)
            if size is not None
        ]

    def _shapes(self, objects: np.ndarray) -> tuple[Any, ...]:
        return () if self.shapes is None else tuple(self.shapes.get(i) for i in objects.tolist())

    def _clean(self, classes: Mapping[str, int], report: Report) -> tuple[np.ndarray, ...]:
        boxes = np.array(self.boxes, np.float64).reshape(-1, 4)
        image, own = np.array(self.image, np.int64), np.array(self.label, np.int64)
        crowd = np.array(self.crowd, bool)
        label = np.array([classes.get(name, -1) for name in self.names], np.int64)[own] if len(own) else own
        sizes = np.array([size or (0, 0) for size in self.sizes], np.float64).reshape(-1, 2)
        keep = sizes[image].all(1) if len(image) else np.zeros(0, bool)

        def drop(bad: np.ndarray, kind: str) -> None:
            for index in np.flatnonzero(bad & keep).tolist():
                report.add(kind, self.place(index))
            keep[bad] = False

        drop(~np.isfinite(boxes).all(1), "not finite")
        boxes = np.where(keep[:, None], boxes, 0)
        drop(~(boxes[:, 2:] - boxes[:, :2] >= MIN_SIDE).all(1), "no width or height")
        clipped = _clip(boxes, sizes, image)
        drop(~(clipped[:, 2:] - clipped[:, :2] >= MIN_SIDE).all(1), "box outside the image")
        drop(_repeated(clipped, image, own, keep), "duplicate box")
        for index in np.flatnonzero(keep & (np.abs(clipped - boxes) > SLACK).any(1)).tolist():
            report.add("box partly outside the image", self.place(index))
        for index in np.flatnonzero(keep & (label < 0)).tolist():
            name = self.names[self.label[index]]
            report.add("object of a class in neither base nor novel", self.place(index), f"'{name}'")
        keep &= label >= 0
        return clipped[keep].astype(np.float32), image[keep], label[keep], crowd[keep], np.flatnonzero(keep)

    def place(self, index: int) -> str:
        return f"{self.origin}{self.where[index]}"

    def labelled(self) -> set[str]:
        """The names that have at least one object."""
        return {self.names[index] for index in set(self.label)}


def _clip(boxes: np.ndarray, sizes: np.ndarray, image: np.ndarray) -> np.ndarray:
    return np.clip(boxes, 0, sizes[image][:, [1, 0, 1, 0]]) if len(image) else boxes


def _repeated(boxes: np.ndarray, image: np.ndarray, label: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """[n] bool: the same box (to 0.01 px) of the same class in the same image has come before."""
    again = np.zeros(len(boxes), bool)
    index = np.flatnonzero(keep)
    if len(index):
        rows = np.column_stack([image[index], label[index], np.round(boxes[index] * 100)])
        _, first = np.unique(rows, axis=0, return_index=True)
        again[np.delete(index, first)] = True
    return again
