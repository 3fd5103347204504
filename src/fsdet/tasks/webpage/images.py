# SPDX-License-Identifier: AGPL-3.0-or-later
"""One look of an image classifier or of Mask R-CNN at a test split."""

from typing import Any

import numpy as np
import torch

from fsdet.config import Config
from fsdet.data.sources import DataSet
from fsdet.evaluation.outcomes import CALLED, FALSE, HIT, MISS, OTHER, Outcome, outcomes
from fsdet.evaluation.scorer import Scorer
from fsdet.tasks import classified, maskrcnn
from fsdet.tasks.loading import Trained
from fsdet.tasks.supply import over_readable
from fsdet.tasks.webpage.exhibit import Exhibit, looked_at


def look_classifier(trained: Trained, config: Config, data: DataSet, most: int) -> Exhibit:
    """Each image is a hit of its class, or a miss of it and a false one of the class it is taken for."""
    told, judge = _judge(classified, config, data, most)
    scores = over_readable(judge.store, lambda: judge.scores(trained.model))
    seen = []
    for i, (row, true) in enumerate(zip(scores, judge.true.tolist(), strict=True)):
        said, box = int(row.argmax()), np.array([0, 0, *judge.store.records[i].size[::-1]], np.float32)
        if said == true:
            seen.append(Outcome(HIT, i, true, box, float(row[said])))
        else:
            seen.append(Outcome(MISS, i, true, box, 0.0, CALLED, said))
            seen.append(Outcome(FALSE, i, said, box, float(row[said]), OTHER, true))
    return Exhibit(f"{told}, looked at for this page by {trained.path.name}; an image is taken for the class with the "
                   "largest score.", data.names, range(len(data.names)), judge.store.records,
                   sorted(seen, key=lambda one: -one.score), whole=True)  # fmt: skip


@torch.inference_mode()
def look_maskrcnn(trained: Trained, config: Config, data: DataSet, most: int) -> Exhibit:
    """Boxes of Mask R-CNN; masks are drawn on the whole images."""
    told, judge = _judge(maskrcnn, config, data, most)
    found, _ = over_readable(judge.store, lambda: judge.detections(trained.model, range(len(judge.store.records))))
    records, classes = judge.store.records, range(len(data.names))
    scores = Scorer(records, len(data.names), config.eval.metric).score(found)
    seen = outcomes(records, found, dict.fromkeys(classes, maskrcnn.SHOWN_FROM))
    return Exhibit(f"{told}, looked at for this page by {trained.path.name}. Found: box score from "
                   f"{maskrcnn.SHOWN_FROM:g} and IoU of boxes above .5.", data.names, classes, records, seen,
                   precision=scores.class_precision, ap50=scores.class_ap50,
                   chosen=judge.pictures(trained.model)[:6])  # fmt: skip


def _judge(task: Any, config: Config, data: DataSet, most: int) -> tuple[str, Any]:
    """(which images in words, the task's Judge of them)."""
    records, told = looked_at(data, config.eval.split, most)
    return told, task.Judge(config, data, records)
