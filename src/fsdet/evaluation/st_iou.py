# SPDX-License-Identifier: AGPL-3.0-or-later
"""Spatio-temporal IoU of one object followed through videos."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from fsdet.boxes import iou_pairs
from fsdet.errors import FsdetError, ShapeError, explain
from fsdet.types import Detections

Track = Mapping[int, Sequence[float]]  # frame -> xyxy px; frames without the object are absent
_WEIGHTS = "check the weights and the decoding of the model that made them"


def best_track(frames: Mapping[int, Detections], label: int) -> dict[int, list[float]]:
    """{frame: the best-scored box of class `label`}; frames without one are absent.

    Raises:
        FsdetError: a score of the class that is no number, which no box is better or worse than.
    """
    track = {}
    for frame, found in frames.items():
        rows = (found.labels == label).nonzero().flatten()
        if found.scores[rows].isnan().any():
            raise FsdetError(explain("scores that are numbers", "nan", f"best_track, frame {frame}", _WEIGHTS))
        if len(rows):
            track[frame] = found.boxes[rows[found.scores[rows].argmax()]].tolist()
    return track


def st_iou(found: Track, truth: Track) -> float:
    """Sum of IoU over frames in both / number of frames in either; nan when neither has a frame.

    Raises:
        FsdetError: a box that is not finite: the video would drop out of the mean.
    """
    either, both = found.keys() | truth.keys(), sorted(found.keys() & truth.keys())
    if not either:
        return float("nan")
    pairs = [torch.tensor([list(t[f]) for f in both], dtype=torch.float64).reshape(-1, 4) for t in (found, truth)]
    for track, side in ((found, "found"), (truth, "truth")):
        wrong = [frame for frame, box in track.items() if not np.isfinite(list(box)).all()]
        if wrong:
            raise FsdetError(explain("finite boxes", "nan or inf", f"st_iou, {side}, frame {wrong[0]}", _WEIGHTS))
    return float(iou_pairs(*pairs).sum()) / len(either)


def mean_st_iou(found: Sequence[Track], truth: Sequence[Track]) -> float:
    """Mean over videos; those without a frame in either track are left out, nan when none is left.

    Raises:
        ShapeError: unless there is one track found, possibly empty, per video.
    """
    if len(found) != len(truth):
        raise ShapeError(f"mean_st_iou expects tracks of {len(truth)} videos, got {len(found)}")
    values = np.array([st_iou(f, t) for f, t in zip(found, truth, strict=True)])
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")
