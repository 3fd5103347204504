# SPDX-License-Identifier: AGPL-3.0-or-later
"""Labelled instances to embeddings, the way training reads them: a window at native scale, pooled by the detector."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import nms

from fsdet.boxes import iou_matrix
from fsdet.data.collate import to_tensor
from fsdet.data.transforms import Sample, letterbox, support_window
from fsdet.models.detector import DualDetector
from fsdet.models.heads import Dense

VIEWS = tuple((zoom, mirrored) for zoom in (1.0, 0.6, 1.6) for mirrored in (False, True))  # .05 nAP50 at 1 shot
BACKGROUND_BELOW, HARD_BELOW = 0.2, 0.5  # IoU with the object
FIRST = 200  # places that are looked at for them first
NEGATIVES = 4  # rows of background, and as many hard ones, kept of a shot


@torch.inference_mode()
def embed_instances(model: DualDetector, instances: Iterable[tuple[Sample, int]], size: int,
                    views: Sequence[tuple[float, bool]] = VIEWS, batch: int = 64) -> Tensor:  # fmt: skip
    """One unit embedding per instance.

    Args:
        model: in eval mode. instances: (sample at network scale, index of its box). size: window side, px.
        views: (zoom factor, mirrored) seen of each instance; their unit embeddings are averaged.
    Returns:
        [n, D] float32 on the model's device.
    """
    device = model.head.bias.device
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    out: list[Tensor] = []

    def flush() -> None:
        if pending:
            boxes = torch.from_numpy(np.stack([b for _, b in pending]).astype(np.float32)).to(device)
            out.append(model.instances(to_tensor([w for w, _ in pending], size).to(device), boxes))
            pending.clear()

    for sample, index in instances:
        pending += [support_window(sample, index, size, factor=factor, mirror=mirror) for factor, mirror in views]
        if len(pending) >= batch:
            flush()
    flush()
    if not out:
        return torch.zeros(0, model.head.proxies.shape[-1], device=device)
    seen = torch.cat(out).unflatten(0, (-1, len(views))).mean(1)
    return torch.nn.functional.normalize(seen, dim=-1)


def whole_images(model: DualDetector, samples: Iterable[Sample], size: int,
                 batch: int = 16) -> Iterator[tuple[Dense, np.ndarray]]:  # fmt: skip
    """The head's answer to each support image as a query is looked at: (Dense of one image, boxes [m, 4] px of it).

    Args:
        samples: at network scale. size: side of the network's input, px, into which they are letterboxed.
    """
    device = model.head.bias.device
    pending: list[Sample] = []

    def answers() -> Iterator[tuple[Dense, np.ndarray]]:
        placed = [letterbox(s.image, size) for s in pending]
        dense = model.dense(to_tensor([image for image, _, _ in placed], size).to(device))
        for i, (sample, (_, factor, padding)) in enumerate(zip(pending, placed, strict=True)):
            yield dense.cut(slice(i, i + 1)), sample.boxes * np.float32(factor) + np.float32([*padding, *padding])
        pending.clear()

    for sample in samples:
        pending.append(sample)
        if len(pending) == batch:
            yield from answers()
    if pending:
        yield from answers()


def negative_rows(dense: Dense, own: Tensor, others: Tensor, like: Tensor) -> Tensor:
    """What a shot's image shows that is not the object and looks most like it: [m <= 2 NEGATIVES, D] unit rows.

    NEGATIVES of the background (boxes with IoU < .2) and as many hard ones (loose boxes of the object, IoU .2 to .5),
    each from another place.

    Args:
        dense: of the one image. own: [4] px, the shot. others: [n, 4] px, the class's other objects in the image, near
            which nothing is taken. like: [D], the shot's embedding.
    """
    places, rows = dense.boxes[0], dense.embeddings[0].float()
    fit = iou_matrix(own[None], places)[0]
    beside = iou_matrix(others, places).amax(0) if len(others) else torch.zeros_like(fit)
    kinds = (fit < BACKGROUND_BELOW, (fit >= BACKGROUND_BELOW) & (fit < HARD_BELOW))
    chosen = []
    for kind in kinds:
        index = (kind & (beside < BACKGROUND_BELOW)).nonzero()[:, 0]
        likeness = rows[index] @ like
        chosen.append(index[_apart(places[index], likeness)])
    return rows[torch.cat(chosen)]


def _apart(boxes: Tensor, likeness: Tensor) -> Tensor:
    """The first NEGATIVES that NMS keeps; it needs no more than the likest to know them, as a rule."""
    best = likeness.topk(min(FIRST, len(likeness)), sorted=True).indices
    kept = best[nms(boxes[best], likeness[best], HARD_BELOW)[:NEGATIVES]]
    return kept if len(kept) == NEGATIVES else nms(boxes, likeness, HARD_BELOW)[:NEGATIVES]
