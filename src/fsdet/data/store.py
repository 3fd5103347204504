# SPDX-License-Identifier: AGPL-3.0-or-later
"""Decoded images at training size, kept in memory up to a number of bytes."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fsdet.data.images import read_rgb
from fsdet.data.transforms import Sample, resize_long
from fsdet.errors import DataError, SampleError
from fsdet.types import ImageRecord

AUTO_BYTES = 2 << 30  # what `cache: auto` may hold; forked loader workers share it


class ImageStore:
    """Records as samples whose longer side is `size` px.

    Args:
        records: what the annotations say. size: px. cache_bytes: decoded images are kept until they would exceed it.
    """

    def __init__(self, records: Sequence[ImageRecord], size: int, cache_bytes: int = 0) -> None:
        self.records, self.size, self.cache_bytes = list(records), size, cache_bytes
        self._kept: dict[int, np.ndarray] = {}

    def fill(self, threads: int = 2) -> int:
        """Decode ahead, in order, while the budget lasts; call before loader workers fork. Returns images held.

        An image that cannot be read is left out, and raises when it is asked for.
        """
        per_image = self.size * self.size * 3
        first = range(min(len(self.records), self.cache_bytes // per_image))
        with ThreadPoolExecutor(max(1, threads)) as pool:
            for index, image in zip(first, pool.map(self._read_or_none, first), strict=True):
                if image is not None:
                    self._kept[index] = image
        return len(self._kept)

    def _read(self, index: int) -> np.ndarray:
        record = self.records[index]
        try:
            return resize_long(read_rgb(record.path), self.size)[0]
        except DataError as error:
            raise SampleError(str(error), record.image_id) from error

    def _read_or_none(self, index: int) -> np.ndarray | None:
        try:
            return self._read(index)
        except SampleError:
            return None

    def drop_unreadable(self, among: Iterable[int] | None = None, threads: int = 2) -> list[SampleError]:
        """Leave out records (all, or those of `among`) whose file cannot be read now; indices close up.

        Returns why, one each.
        """

        def fault(index: int) -> SampleError | None:
            try:
                self._read(index)
            except SampleError as error:
                return error
            return None

        asked = list(range(len(self.records)) if among is None else among)
        with ThreadPoolExecutor(max(1, threads)) as pool:
            faults = {i: error for i, error in zip(asked, pool.map(fault, asked), strict=True) if error}
        left = [i for i in range(len(self.records)) if i not in faults]
        self._kept = {new: self._kept[old] for new, old in enumerate(left) if old in self._kept}
        self.records = [self.records[i] for i in left]
        return list(faults.values())

    def __getstate__(self) -> dict[str, object]:
        """Without the cache: a worker that is spawned reads for itself, one that is forked shares these pages."""
        return {**vars(self), "_kept": {}}

    def sample(self, index: int, wanted: int | None = None) -> Sample:
        """Record `index`: pixels at training size and its boxes on them, crowd boxes but `wanted` left out.

        Raises:
            SampleError: the image cannot be read.
        """
        record = self.records[index]
        image = self._kept[index] if index in self._kept else self._read(index)
        scale = np.array([image.shape[1] / record.size[1], image.shape[0] / record.size[0]] * 2, np.float32)
        keep = ~record.crowd
        if wanted is not None:
            keep[wanted] = True  # published shot lists hold boxes that VOC marks as difficult
        return Sample(image, record.boxes[keep] * scale, record.labels[keep], record.exhaustive)

    def instance(self, index: int, box: int) -> tuple[Sample, int]:
        """Record `index` with box `box` (its index in the record) as (sample, index among the sample's boxes)."""
        return self.sample(index, box), int((~self.records[index].crowd[:box]).sum())
