# SPDX-License-Identifier: AGPL-3.0-or-later
"""Detections of a video joined into tracks, which steadies their boxes and scores.

After Zhang et al. 2022 (ByteTrack), https://arxiv.org/abs/2110.06864, algorithm 1: sure detections are matched with
tracks first, unsure ones only with what is left of those that were in sight a frame ago. Two things are plainer here:
pairs are taken by falling IoU instead of by the Hungarian method, and the Kalman filter is the fixed-gain one that it
settles into for constant velocity (Benedict & Bordner 1962).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fsdet.boxes import clip_boxes, iou_matrix
from fsdet.types import Detections

UNSURE = 0.4  # share of its class's threshold that a detection needs to go on with a track
SURE_IOU, UNSURE_IOU = 0.2, 0.5  # least overlap with where the track should be (ByteTrack's)
PATIENCE = 1.0  # s that an object may be out of sight
GAIN = 0.7  # how much of the difference to what was foreseen a box takes on
SPEED_GAIN = GAIN**2 / (2 - GAIN)  # and a velocity: least transient error for that gain (Benedict & Bordner)
SEEN = 2  # frames in which an object must be seen before it is shown; in the first frame one is enough


@dataclass(frozen=True, eq=False)
class Tracked(Detections):
    """Detections of a frame, best first; track [n] int64, the number of the object that each is of, from 1."""

    track: Tensor


@dataclass(eq=False)
class _Track:
    number: int
    label: int
    box: Tensor  # [4] xyxy px, as foreseen for the frame under way or corrected by it
    speed: Tensor  # [4] px a frame
    frame: int  # when it was seen last
    scores: list[float]
    shown: bool
    branch: int = 0


class Tracker:
    """Follows the objects of one video.

    Args:
        limits: [labels] least score with which an object of a class is found. rate: frames/s.
    """

    def __init__(self, limits: Tensor, rate: float) -> None:
        self.limits, self.patience = limits.cpu(), max(round(PATIENCE * rate), 1)
        self._live: list[_Track] = []
        self._now, self._count = -1, 0

    @property
    def least(self) -> float:
        """The least score that is of use to it."""
        return UNSURE * float(self.limits.min()) if len(self.limits) else 0.0

    def update(self, frame: int, found: Detections, size: tuple[int, int]) -> Tracked:
        """The objects in sight in `frame`.

        Args:
            frame: its number, larger than those before; numbers may be left out. found: detections from `least` up.
            size: (height, width) px, at whose edges boxes are cut.
        """
        boxes, scores, labels = found.boxes.cpu().float(), found.scores.cpu().float(), found.labels.cpu()
        first, step, before = self._now < 0, frame - self._now, self._now
        self._now = frame
        self._live = [t for t in self._live if frame - t.frame <= self.patience]
        for t in self._live:
            t.box = t.box + t.speed * step
        limit = self.limits[labels]
        sure = (scores >= limit).nonzero().flatten().tolist()
        unsure = ((scores < limit) & (scores >= UNSURE * limit)).nonzero().flatten().tolist()
        left, sure = self._match(self._live, sure, boxes, labels, scores, found.branch, SURE_IOU)
        self._match([t for t in left if t.frame == before], unsure, boxes, labels, scores, found.branch, UNSURE_IOU)
        for row in sure:
            self._count += 1
            self._live.append(_Track(self._count, int(labels[row]), boxes[row], torch.zeros(4), frame,
                                     [float(scores[row])], first, int(found.branch[row])))  # fmt: skip
        return self._in_sight(size)

    def _match(self, tracks: list[_Track], rows: list[int], boxes: Tensor, labels: Tensor, scores: Tensor,
               branch: Tensor, least: float) -> tuple[list[_Track], list[int]]:  # fmt: skip
        """Give rows to tracks of their class by falling IoU; returns the tracks and rows that are left."""
        if not tracks or not rows:
            return tracks, rows
        overlap = iou_matrix(torch.stack([t.box for t in tracks]), boxes[rows])
        same = torch.tensor([t.label for t in tracks])[:, None] == labels[rows][None]
        overlap = overlap.masked_fill(~same, 0.0)
        free_tracks, free_rows = set(range(len(tracks))), set(range(len(rows)))
        for pair in overlap.flatten().argsort(descending=True, stable=True).tolist():
            i, j = divmod(pair, len(rows))
            if overlap[i, j] < least or not free_tracks or not free_rows:
                break
            if i in free_tracks and j in free_rows:
                free_tracks.remove(i)
                free_rows.remove(j)
                self._correct(tracks[i], boxes[rows[j]], float(scores[rows[j]]), int(branch[rows[j]]))
        return [tracks[i] for i in sorted(free_tracks)], [rows[j] for j in sorted(free_rows)]

    def _correct(self, track: _Track, box: Tensor, score: float, branch: int) -> None:
        """A track is seen again."""
        off, gap = box - track.box, self._now - track.frame
        second = len(track.scores) == 1  # two sightings are a velocity; the filter takes over from the third
        track.box = box if second else track.box + GAIN * off
        track.speed = off / gap if second else track.speed + SPEED_GAIN * off / gap
        track.frame, track.branch = self._now, branch
        track.scores.append(score)
        track.shown |= len(track.scores) >= SEEN

    def _in_sight(self, size: tuple[int, int]) -> Tracked:
        seen = [t for t in self._live if t.frame == self._now and t.shown]
        seen.sort(key=lambda t: -sum(t.scores) / len(t.scores))
        boxes = torch.stack([t.box for t in seen]) if seen else torch.zeros(0, 4)
        means = torch.tensor([sum(t.scores) / len(t.scores) for t in seen])
        labels, branch, numbers = ([getattr(t, name) for t in seen] for name in ("label", "branch", "number"))
        return Tracked(clip_boxes(boxes, size), means, torch.tensor(labels, dtype=torch.int64),
                       torch.tensor(branch, dtype=torch.uint8), torch.tensor(numbers, dtype=torch.int64))  # fmt: skip
