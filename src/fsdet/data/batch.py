# SPDX-License-Identifier: AGPL-3.0-or-later
"""Batches of whole images with a label each, or with instances: checked finite on the host, moved as one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor

from fsdet.errors import ShapeError
from fsdet.types import Replaced, as_looked_at

WHOLE = ("index", "replaced")  # what belongs to a batch and to none of its images


@dataclass(frozen=True, eq=False)
class ImageBatch:
    """images [B, 3, H, W] float32 RGB in [0, 1]; labels [B] int64 classes; image_ids of the images; replaced: what was
    drawn for it and could not be used.
    """

    index: int
    images: Tensor
    labels: Any
    image_ids: tuple[str, ...]
    replaced: tuple[Replaced, ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or not len(self.images) == len(self.labels) == len(self.image_ids):
            got = f"{list(self.images.shape)}, {len(self.labels)} labels, {len(self.image_ids)} ids"
            raise ShapeError(f"{type(self).__name__} expects images [B, 3, H, W], B labels and B ids, got {got}")

    def finite(self) -> bool:
        """Whether pixels and boxes are; asked on the host, before the batch moves, and looked at once."""
        return self._finite

    @cached_property
    def _finite(self) -> bool:
        return bool(self.images.sum(dtype=torch.float32).isfinite())

    def unsound(self) -> tuple[str, ...]:
        """The images with a value that is not finite."""
        bad = (~self.images.flatten(1).isfinite().all(1)).tolist()
        return tuple(name for name, wrong in zip(self.image_ids, bad, strict=True) if wrong)

    def halves(self) -> tuple[Self, Self]:
        """Two batches of half the images each: what to run where the whole does not fit into memory."""
        if len(self.image_ids) < 2:
            raise ShapeError(f"{type(self).__name__}.halves expects 2 images or more, got {len(self.image_ids)}")
        cut = (len(self.image_ids) + 1) // 2
        return self._rows(slice(None, cut)), self._rows(slice(cut, None))

    def _rows(self, rows: slice) -> Self:
        return replace(self, **{f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name not in WHOLE})

    def to(self, device: torch.device) -> Self:
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """In page-locked memory, from which a GPU copies while the host goes on; the loader calls it."""
        return as_looked_at(self, self._mapped(Tensor.pin_memory))

    def _mapped(self, act: Callable[[Tensor], Tensor]) -> Self:
        return replace(self, **{f.name: _each(getattr(self, f.name), act) for f in fields(self)})

    @classmethod
    def restored(cls, values: Mapping[str, Any]) -> Self:
        """A batch as it was, from the plain values of an incident's batch.pt."""
        return cls(**{f.name: _frozen(values[f.name]) for f in fields(cls) if f.name != "replaced"})


@dataclass(frozen=True, eq=False)
class InstanceBatch(ImageBatch):
    """As ImageBatch, with ragged instances of each image: labels ([m] int64, ...), boxes ([m, 4] float32 xyxy px, ...),
    masks ([m, H, W] uint8 of 0 and 1, ...).
    """

    boxes: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]

    @cached_property
    def _finite(self) -> bool:
        return all(bool(part.sum(dtype=torch.float32).isfinite()) for part in (self.images, *self.boxes))

    def unsound(self) -> tuple[str, ...]:
        bad = {name for name, boxes in zip(self.image_ids, self.boxes, strict=True) if not boxes.isfinite().all()}
        return tuple(name for name in self.image_ids if name in bad | set(super(InstanceBatch, self).unsound()))


def _each(value: Any, act: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, tuple):
        return tuple(_each(item, act) for item in value)
    return act(value) if isinstance(value, Tensor) else value


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
