# SPDX-License-Identifier: AGPL-3.0-or-later
"""Whether an exported file says what PyTorch says, on real images: raw outputs and detections."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fsdet.errors import counted
from fsdet.types import Detections

TOLERANCE = 1e-4  # of a score; of a box's longer side for its corners


@dataclass(frozen=True)
class Parity:
    """Largest differences over all boxes and columns of some images, and the images whose detections differ.

    boxes: the difference of a corner over the longer side of its box (at least 1 px); boxes_px: the same in px of the
    network's input. detections: how many PyTorch found; different: one line for each image that differs.
    """

    images: int
    boxes_px: float
    boxes: float
    scores: float
    detections: int
    different: tuple[str, ...]
    tolerance: float = TOLERANCE

    @property
    def ok(self) -> bool:
        """NaN is no parity."""
        return self.boxes <= self.tolerance and self.scores <= self.tolerance and not self.different

    def values(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"ok": self.ok, **asdict(self)}

    def describe(self) -> str:
        """In words, a line a finding."""
        verdict = "parity" if self.ok else "no parity"
        looked, found = counted(self.images, "image"), counted(self.detections, "detection")
        lines = [f"{verdict} with PyTorch on {looked}: boxes differ by {self.boxes:.2g} of their size "
                 f"({self.boxes_px:.2g} px), scores by {self.scores:.2g} (at most {self.tolerance:g} each); "
                 f"{found}, {counted(len(self.different), 'image')} with others"]  # fmt: skip
        return "\n".join([*lines, *(f"  {line}" for line in self.different[:10])])


class Comparison:
    """Collects what two networks say of the same images."""

    def __init__(self) -> None:
        self.images, self.detections, self.different = 0, 0, []
        self.boxes_px = self.boxes = self.scores = 0.0

    def raw(self, ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
        """boxes [B, A, 4] px and scores [B, A, T] of both; another shape is as far away as can be."""
        if any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
            self.boxes_px = self.boxes = self.scores = float("inf")
            return
        (boxes, scores), (other_boxes, other_scores) = ours, theirs
        apart = (boxes - other_boxes).abs().amax(-1)
        side = (boxes[..., 2:] - boxes[..., :2]).amax(-1).clamp(min=1)
        self.boxes_px = _larger(self.boxes_px, apart)
        self.boxes = _larger(self.boxes, apart / side)
        self.scores = _larger(self.scores, (scores - other_scores).abs())

    def found(self, name: str, ours: Detections, theirs: Detections) -> None:
        """Detections of one image, above the thresholds."""
        self.images += 1
        self.detections += len(ours)
        if told := _difference(ours, theirs):
            self.different.append(f"{name}: {told}")

    def result(self) -> Parity:
        return Parity(self.images, self.boxes_px, self.boxes, self.scores, self.detections, tuple(self.different))


def _larger(known: float, values: Tensor) -> float:
    """The larger one, and nan once there was one."""
    return float(torch.cat((torch.tensor([known]), values.flatten().float())).amax())


def _difference(ours: Detections, theirs: Detections) -> str:
    """Why two lists are not the same objects; empty when each has its counterpart in the other."""
    if len(ours) != len(theirs):
        return f"{counted(len(theirs), 'detection')} instead of {len(ours)}"
    left = list(range(len(theirs)))
    for i in range(len(ours)):
        near = next((j for j in left if _same(ours, i, theirs, j)), None)
        if near is None:
            return f"none like detection {i} (class {int(ours.labels[i])}, score {float(ours.scores[i]):.4f})"
        left.remove(near)
    return ""


def _same(ours: Detections, i: int, theirs: Detections, j: int) -> bool:
    """Class, branch, score and place; equal scores may stand in another order."""
    side = float((ours.boxes[i, 2:] - ours.boxes[i, :2]).amax().clamp(min=1))
    return (int(ours.labels[i]) == int(theirs.labels[j]) and int(ours.branch[i]) == int(theirs.branch[j])
            and abs(float(ours.scores[i] - theirs.scores[j])) <= TOLERANCE
            and float((ours.boxes[i] - theirs.boxes[j]).abs().amax()) <= TOLERANCE * side)  # fmt: skip
