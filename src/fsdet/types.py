# SPDX-License-Identifier: AGPL-3.0-or-later
"""The values that flow between floors. Frozen, checked once at birth.

B queries, N ways, K shots, A anchor points, P positives, M boxes an image, D embedding, C base classes, R bins.
Boxes are xyxy in pixels of the image they belong to, everywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from fsdet.errors import ShapeError

T = TypeVar("T")
BACKGROUND = -1  # a label: a negative for that branch
IGNORED = -2  # a label: says nothing to that branch
MOVED = ("query", "targets", "support", "support_boxes", "support_way", "class_ids")  # of an Episode, to the device


def _shape(owner: str, name: str, value: Any, *dims: int | None) -> None:
    shape = tuple(value.shape)
    if len(shape) != len(dims) or any(d is not None and d != s for s, d in zip(shape, dims, strict=True)):
        want = ", ".join("*" if d is None else str(d) for d in dims)
        raise ShapeError(f"{owner}.{name} expects shape [{want}], got {list(shape)}")


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """What an annotation says of one image.

    path: image file. size: (height, width) px after EXIF rotation. boxes: [m, 4] float32 xyxy px.
    labels: [m] int64, index into the data set's classes (base first, then novel).
    crowd: [m] bool, boxes that neither train nor count as misses (COCO iscrowd, VOC difficult).
    exhaustive: classes of which every instance in this image is labelled; None means all of them.
    shapes: [m] outlines as COCO writes them (data/shapes.py), None for an object without one; empty when not read.
    """

    path: Path
    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray = field(default=None)  # type: ignore[assignment]
    exhaustive: frozenset[int] | None = None
    shapes: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        boxes = np.asarray(self.boxes, np.float32).reshape(-1, 4)
        crowd = np.zeros(len(boxes), bool) if self.crowd is None else np.asarray(self.crowd, bool)
        object.__setattr__(self, "boxes", boxes)
        object.__setattr__(self, "labels", np.asarray(self.labels, np.int64).reshape(-1))
        object.__setattr__(self, "crowd", crowd)
        if not len(boxes) == len(self.labels) == len(crowd):
            raise ShapeError(
                f"ImageRecord {self.path}: {len(boxes)} boxes, {len(self.labels)} labels, {len(crowd)} crowd"
            )
        if self.shapes and len(self.shapes) != len(boxes):
            raise ShapeError(f"ImageRecord {self.path}: {len(boxes)} boxes, {len(self.shapes)} shapes")

    @property
    def image_id(self) -> str:
        return str(self.path)

    def kept(self, keep: np.ndarray) -> "ImageRecord":
        """The record with only the boxes where `keep` [m] is true."""
        if keep.all():
            return self
        shapes = tuple(s for s, kept in zip(self.shapes, keep, strict=False) if kept)
        return replace(self, boxes=self.boxes[keep], labels=self.labels[keep], crowd=self.crowd[keep], shapes=shapes)


@dataclass(frozen=True)
class Replaced:
    """A sample that was drawn for a batch and could not be used, so that another stands in its place; and why."""

    sample: str
    reason: str


@dataclass(frozen=True)
class EpisodePlan:
    """Which instances and images make episode `index`: indices only, so it can be printed and repeated.

    class_ids: [N]. supports: (way, record index, box index) per shot, ragged K. queries: record indices.
    """

    index: int
    class_ids: tuple[int, ...]
    supports: tuple[tuple[int, int, int], ...]
    queries: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Targets:
    """boxes [B, M, 4] xyxy px; base_labels, way_labels [B, M] int64 with -1 background, -2 ignored; valid [B, M] bool.

    M >= 1: every image is padded to at least one masked row.
    base_known [B, C], way_known [B, N] bool: False where a class is not exhaustively labelled in that image,
    so that only its labelled boxes, and no other place, say anything about it.
    """

    boxes: Tensor
    base_labels: Tensor
    way_labels: Tensor
    valid: Tensor
    base_known: Tensor
    way_known: Tensor

    def __post_init__(self) -> None:
        b, m = self.boxes.shape[:2]
        _shape("Targets", "boxes", self.boxes, b, m, 4)
        for name in ("base_labels", "way_labels", "valid"):
            _shape("Targets", name, getattr(self, name), b, m)
        for name in ("base_known", "way_known"):
            _shape("Targets", name, getattr(self, name), b, None)

    def to(self, device: torch.device, non_blocking: bool = True) -> "Targets":
        return Targets(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    def pin_memory(self) -> "Targets":
        """In page-locked memory, from which a GPU copies while the host goes on."""
        return Targets(*(getattr(self, f.name).pin_memory() for f in fields(self)))


def as_looked_at(batch: T, copy: T) -> T:
    """`copy`, whose `finite` answers what `batch` has found already."""
    vars(copy).update({name: value for name, value in vars(batch).items() if name == "_finite"})
    return copy


def _bad_rows(values: Tensor) -> Tensor:
    """[n] bool: a row of [n, ...] holds NaN or inf."""
    return ~values.flatten(1).isfinite().all(1)


@dataclass(frozen=True, eq=False)
class Episode:
    """One batch of any stage; stage 1 is an episode with N = 0.

    query [B, 3, H, W] float32 RGB in [0, 1]; targets; support [S, 3, h, w]; support_boxes [S, 4] xyxy px of the
    support crop; support_way [S] int64 in 0..N-1; class_ids [N] data-set classes; image_ids of the queries; replaced:
    what was drawn for it and could not be used.
    """

    index: int
    query: Tensor
    targets: Targets
    support: Tensor
    support_boxes: Tensor
    support_way: Tensor
    class_ids: Tensor
    image_ids: tuple[str, ...]
    replaced: tuple[Replaced, ...] = ()

    def __post_init__(self) -> None:
        b, s = self.query.shape[0], self.support.shape[0]
        _shape("Episode", "query", self.query, b, 3, None, None)
        _shape("Episode", "support", self.support, s, 3, None, None)
        _shape("Episode", "support_boxes", self.support_boxes, s, 4)
        _shape("Episode", "support_way", self.support_way, s)
        _shape("Episode", "class_ids", self.class_ids, None)
        if len(self.image_ids) != b or self.targets.boxes.shape[0] != b:
            raise ShapeError(
                f"Episode expects {b} image ids and targets, got {len(self.image_ids)} "
                f"and {self.targets.boxes.shape[0]}"
            )

    @property
    def ways(self) -> int:
        return self.class_ids.shape[0]

    def finite(self) -> bool:
        """Whether pixels and boxes are; asked on the host, before the batch moves, and looked at once."""
        return self._finite

    @cached_property
    def _finite(self) -> bool:
        parts = (self.query, self.support, self.targets.boxes, self.support_boxes)
        return all(bool(part.sum(dtype=torch.float32).isfinite()) for part in parts)

    def unsound(self) -> tuple[str, ...]:
        """What is not finite: ids of queries, and `support i` for support instances."""
        boxes = self.targets.boxes.masked_fill(~self.targets.valid.unsqueeze(-1), 0.0)
        query = _bad_rows(self.query) | _bad_rows(boxes)
        support = _bad_rows(self.support) | _bad_rows(self.support_boxes)
        named = [name for name, bad in zip(self.image_ids, query.tolist(), strict=True) if bad]
        return (*named, *(f"support {i}" for i in support.nonzero().flatten().tolist()))

    def halves(self) -> "tuple[Episode, Episode]":
        """Two episodes of half the queries each, with all supports: what to run where the whole does not fit."""
        if len(self.image_ids) < 2:
            raise ShapeError(f"Episode.halves expects 2 queries or more, got {len(self.image_ids)}")
        cut = (len(self.image_ids) + 1) // 2
        return self._rows(slice(None, cut)), self._rows(slice(cut, None))

    def _rows(self, rows: slice) -> "Episode":
        targets = Targets(*(getattr(self.targets, f.name)[rows] for f in fields(self.targets)))
        return replace(self, query=self.query[rows], targets=targets, image_ids=self.image_ids[rows])

    def to(self, device: torch.device) -> "Episode":
        return replace(self, **{n: getattr(self, n).to(device, non_blocking=True) for n in MOVED})

    def pin_memory(self) -> "Episode":
        """In page-locked memory, from which a GPU copies while the host goes on; the loader calls it."""
        return as_looked_at(self, replace(self, **{n: getattr(self, n).pin_memory() for n in MOVED}))


@dataclass(frozen=True, eq=False)
class Pyramid:
    """Feature maps ([B, C_i, H_i, W_i], ...) and their strides in px, finest first."""

    levels: tuple[Tensor, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class DualOutput:
    """points [A, 2] px; strides [A] px; box_logits [B, A, 4, R]; boxes [B, A, 4] px, float32;
    embeddings [B, A, D] unit; standard [B, A, C] logits;
    prototype [B, A, N + proxies] logits (N support prototypes, then base proxies if on).
    """

    points: Tensor
    strides: Tensor
    box_logits: Tensor
    boxes: Tensor
    embeddings: Tensor
    standard: Tensor
    prototype: Tensor


@dataclass(frozen=True, eq=False)
class LossReport:
    """What a batch cost. All tensors stay on the device; reading any of them is the caller's sync.

    total: scalar with graph, sum of `weighted`. raw, weighted: {name: scalar}; `weighted` keeps its graph.
    rows: {name: number of rows the loss averaged over}. positives: scalar.
    normaliser: scalar > 0, what dense losses were divided by; accumulation weighs micro-batches with it.
    row_values, row_images: {name: [rows]} detached per-row values and the index into image_ids each row belongs to.
    probe_at: tensors (the head's inputs) to which the per-loss probe differentiates.
    saturated: {name: scalar}, the share of rows that a clamped loss does not learn from; no other loss is named.
    shared: the values are this process's part of those of all processes' images, which they add up to, and the
    normaliser is that of all; else they are of this process's images alone.
    """

    total: Tensor
    raw: Mapping[str, Tensor]
    weighted: Mapping[str, Tensor]
    rows: Mapping[str, Tensor | int]
    positives: Tensor | int
    normaliser: Tensor
    row_values: Mapping[str, Tensor] = field(default_factory=dict)
    row_images: Mapping[str, Tensor] = field(default_factory=dict)
    probe_at: tuple[Tensor, ...] = ()
    image_ids: tuple[str, ...] = ()
    saturated: Mapping[str, Tensor] = field(default_factory=dict)
    shared: bool = False


OUTCOMES = ("committed", "amp_backoff", "bad_input", "bad_loss", "bad_grad", "no_grad")


@dataclass(frozen=True)
class StepReport:
    """One optimizer step, in host numbers. grad_l2_preclip is unscaled; clip_ratio = preclip / postclip >= 1.

    culprit: of a rejected step, in one line. evidence: the same in plain values (engine/forensics.py).
    saturated: {name: share of the rows that a clamped loss did not learn from}.
    rank: of the process whose images, or whose gradient, are to blame.
    """

    outcome: str
    step: int
    grad_l2_preclip: float
    grad_l2_postclip: float
    clip_ratio: float
    loss_scale: float
    lr: Mapping[str, float]
    total: float
    raw: Mapping[str, float]
    weighted: Mapping[str, float]
    culprit: str | None = None
    image_ids: tuple[str, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)
    saturated: Mapping[str, float] = field(default_factory=dict)
    rank: int = 0

    @property
    def committed(self) -> bool:
        return self.outcome == "committed"


@dataclass(frozen=True, eq=False)
class Detections:
    """boxes [n, 4] xyxy px of the original image; scores, labels [n]; branch [n] uint8: 0 standard, 1 prototype."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    branch: Tensor

    def __post_init__(self) -> None:
        n = self.boxes.shape[0]
        _shape("Detections", "boxes", self.boxes, n, 4)
        for name in ("scores", "labels", "branch"):
            _shape("Detections", name, getattr(self, name), n)

    def __len__(self) -> int:
        return self.boxes.shape[0]

    def above(self, limit: Tensor) -> "Detections":
        """Those that reach `limit` [C] of their class."""
        keep = self.scores >= limit.to(self.scores.device)[self.labels]
        return Detections(self.boxes[keep], self.scores[keep], self.labels[keep], self.branch[keep])


@runtime_checkable
class Task(Protocol):
    """What the engine needs to know of a training, and all it knows."""

    name: str
    model: nn.Module
    objective: nn.Module  # its buffers (running means) are saved, and restored when a step is rejected
    batches_per_epoch: int
    best_metric: str  # key of evaluate()'s dict; larger is better

    def param_groups(self) -> Mapping[str, Sequence[tuple[str, nn.Parameter]]]:
        """{group: [(parameter name, parameter), ...]}, disjoint; their union is every parameter that may ever train."""
        ...

    def batch(self, index: int) -> Any:
        """Batch `index` on the host, a pure function of (seed, index), with .to() and .image_ids; runs in workers.

        A batch may have .finite(), asked before it is used; .halves(), two batches of half its images, for where it
        does not fit into memory; .replaced, the samples that could not be used and that others stand for. `samples`,
        where a task has it, is the number of samples that it draws from.
        """
        ...

    def losses(self, batch: Any) -> LossReport:
        """Forward and losses of a batch that is already on the device, in the precision the caller has set."""
        ...

    def expected_initial(self, report: LossReport) -> Mapping[str, float]:
        """{loss: its expected raw value at initialisation}, for the first-batch table; not every loss has one.

        report: of the first batch; what it was divided by decides some of the values.
        """
        ...

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        """Deterministic validation of `model` (usually the EMA): flat {W&B key: value}."""
        ...

    def illustrate(self, model: nn.Module, folder: Path, step: int) -> Sequence[Path]:
        """Write pictures of fixed samples into `folder`; returns their paths."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """Plain values from which the model can be rebuilt; stored in every checkpoint as `spec`."""
        ...
