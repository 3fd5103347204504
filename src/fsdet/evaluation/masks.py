# SPDX-License-Identifier: AGPL-3.0-or-later
"""Average precision of masks, by COCO's rules."""

from collections.abc import Sequence

import numpy as np
from faster_coco_eval.core import mask as coco_mask

from fsdet.errors import FsdetError, ShapeError, explain
from fsdet.evaluation.scorer import Scorer, Scores, best_of, index
from fsdet.types import Detections, ImageRecord

PLACES = ("id", "image_id", "category_id", "score", "segmentation", "area", "bbox", "iscrowd")


class MaskScorer(Scorer):
    """Scores boxes as `Scorer` does, and masks against the records' shapes.

    Raises:
        FsdetError: an object without a shape, or an image that is not labelled exhaustively.
    """

    def __init__(self, records: Sequence[ImageRecord], num_classes: int) -> None:
        super().__init__(records, num_classes, "coco")
        shapes = [shape for r in records for shape in (r.shapes or [None] * len(r.labels))]
        annotations = self._coco.dataset["annotations"]
        if any(shape is None for shape in shapes) or len(shapes) != len(annotations):
            raise FsdetError(explain("a shape of every object, in images that label all", "some without", "MaskScorer",
                                     "leave out the objects without an outline"))  # fmt: skip
        rows = [{**row, "segmentation": shape} for row, shape in zip(annotations, shapes, strict=True)]
        self._outlined = index(rows, self._coco.dataset["images"], self._coco.dataset["categories"])

    def score_masks(self, detections: Sequence[Detections], masks: Sequence[np.ndarray]) -> Scores:
        """One Detections and one bool [n, H, W] a record, in order; the best 100 of an image count.

        Raises:
            ShapeError: the number of images, or of masks in one of them, differs.
        """
        counts = [len(d) == len(m) for d, m in zip(detections, masks, strict=False)]
        if not (len(detections) == len(masks) == self.num_images) or not all(counts):
            raise ShapeError(f"score_masks expects detections and masks of {self.num_images} images, as many each")
        rows = []
        for image, (found, bits) in enumerate(zip(detections, masks, strict=True)):
            scores, labels = found.scores.cpu().double().numpy(), found.labels.cpu().tolist()
            for i in best_of(scores).tolist():
                area, shape = float(bits[i].sum()), coco_mask.encode(np.asfortranarray(bits[i], np.uint8))
                row = (len(rows) + 1, image, labels[i], float(scores[i]), shape, area, [0.0, 0.0, 0.0, 0.0], 0)
                rows.append(dict(zip(PLACES, row, strict=True)))
        found = index(rows, self._outlined.dataset["images"], self._outlined.dataset["categories"])
        return self._run(self._outlined, found, "segm")
