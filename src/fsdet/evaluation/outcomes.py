# SPDX-License-Identifier: AGPL-3.0-or-later
"""Every object and every detection by itself: hit, miss or false positive, and why."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fsdet.boxes import iou_matrix
from fsdet.errors import ShapeError
from fsdet.evaluation.confusion import claim, on_crowd
from fsdet.types import Detections, ImageRecord

HIT, MISS, FALSE = "hit", "miss", "false"
KINDS = (HIT, MISS, FALSE)
# why an object is missed: called another class, found with too low a score, or not at all
CALLED, WEAK, UNSEEN = "called", "weak", "unseen"
# why a detection is false: another class's object, a second box of a hit, a poor box of its object, or nothing there
OTHER, SECOND, LOOSE, NOTHING = "other", "second", "loose", "nothing"
TOUCHES = 0.1  # IoU from which a box has to do with an object


@dataclass(frozen=True, eq=False)
class Outcome:
    """image: index of the record. label: the class's. box [4] px: the detection's; of a miss the object's.

    score: of a weak miss that of its best detection, of another miss 0. other: the class it is or is called, else -1.
    """

    kind: str
    image: int
    label: int
    box: np.ndarray
    score: float = 0.0
    why: str = ""
    other: int = -1


def outcomes(records: Sequence[ImageRecord], detections: Sequence[Detections], limits: Mapping[int, float],
             iou: float = 0.5) -> list[Outcome]:  # fmt: skip
    """Of the classes in `limits`, from each one's score up; by falling score, hence misses that nothing was near last.

    Class by class the best detection claims the free object it overlaps most, if by more than `iou`. One on a crowd, or
    of a class not labelled exhaustively in its image, is nothing when it claims none.
    Raises:
        ShapeError: unless there is one Detections per record.
    """
    if len(records) != len(detections):
        raise ShapeError(f"outcomes expects detections of {len(records)} images, got {len(detections)}")
    found: list[Outcome] = []
    for i, (record, mine) in enumerate(zip(records, detections, strict=True)):
        seen = _Image(record, mine, limits, iou)
        for label in limits:
            found += seen.of_class(i, label)
    return sorted(found, key=lambda one: -one.score)


class _Image:
    """One image's objects and detections, best first, with their overlaps."""

    def __init__(self, record: ImageRecord, found: Detections, limits: Mapping[int, float], iou: float) -> None:
        order = found.scores.argsort(descending=True, stable=True)
        self.record, self.iou = record, iou
        self.boxes, self.scores = found.boxes[order].cpu().float(), found.scores[order].cpu().numpy()
        self.called = found.labels[order].cpu().numpy()
        least = np.array([limits.get(label, np.inf) for label in self.called.tolist()])
        self.sure = self.scores >= least
        self.truth, self.labels = record.boxes[~record.crowd], record.labels[~record.crowd]
        self.overlap = iou_matrix(torch.from_numpy(self.truth), self.boxes).numpy()  # [objects, detections]

    def of_class(self, image: int, label: int) -> Iterator[Outcome]:
        columns, rows = np.flatnonzero(self.sure & (self.called == label)), np.flatnonzero(self.labels == label)
        by = claim(self.overlap[np.ix_(rows, columns)], self.iou)
        hits = set(columns[by[by >= 0]].tolist())
        for row in rows[by < 0]:
            yield self._miss(image, label, row)
        unknown = self.record.exhaustive is not None and label not in self.record.exhaustive
        crowd = self.record.boxes[self.record.crowd & (self.record.labels == label)]
        ignored = on_crowd(self.boxes[columns], torch.from_numpy(crowd), self.iou) | unknown
        for column, nothing in zip(columns.tolist(), ignored, strict=True):
            if column in hits:
                yield Outcome(HIT, image, label, self.boxes[column].numpy(), float(self.scores[column]))
            elif not nothing:
                yield self._false(image, label, column, rows)

    def _miss(self, image: int, label: int, row: int) -> Outcome:
        box, near = self.truth[row], self.overlap[row] > self.iou
        weak = np.flatnonzero(near & (self.called == label) & ~self.sure)
        others = np.flatnonzero(near & (self.called != label) & self.sure)
        if len(others):
            return Outcome(MISS, image, label, box, 0.0, CALLED, int(self.called[others[0]]))
        if len(weak):
            return Outcome(MISS, image, label, box, float(self.scores[weak[0]]), WEAK)
        return Outcome(MISS, image, label, box, 0.0, UNSEEN)

    def _false(self, image: int, label: int, column: int, own: np.ndarray) -> Outcome:
        over = self.overlap[:, column]
        others = np.flatnonzero((over > self.iou) & (self.labels != label))
        best, why, other = over[own].max(initial=0.0), NOTHING, -1
        if best > self.iou:
            why = SECOND
        elif len(others):
            why, other = OTHER, int(self.labels[others[over[others].argmax()]])
        elif best > TOUCHES:
            why = LOOSE
        return Outcome(FALSE, image, label, self.boxes[column].numpy(), float(self.scores[column]), why, other)
