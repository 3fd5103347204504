# SPDX-License-Identifier: AGPL-3.0-or-later
"""What an exported file holds: a detector as a network of plain tensors, and a card that says what its numbers mean."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fsdet.detect.postprocess import CANDIDATES, COMPANY, NMS_IOU, VOICE, VOTE_IOU
from fsdet.detect.scoring import Vocabulary, class_scores
from fsdet.errors import CheckpointError, explain
from fsdet.models.detector import DualDetector

KIND = "fsdet-portable-"
FORMAT = f"{KIND}2"  # 1 had thresholds of single boxes' scores
LICENCE = "AGPL-3.0-or-later"
PREPROCESSING = (
    "RGB, EXIF rotation applied; scaled so that the longer side is image_size px and padded with grey 114 on both "
    "sides to image_size x image_size; divided by 255; float32 [B, 3, H, W]. H and W may be other multiples of stride."
)
POSTPROCESSING = (
    f"outside the graph: the {CANDIDATES} best of all boxes x columns, class-aware NMS at IoU {NMS_IOU:g}. A box that "
    f"is left has a company: those of its label that overlap it by {VOTE_IOU:g} and score {VOICE:g} of it or more, "
    f"itself among them. It moves to their mean by score, and scores their sum, at most {COMPANY} times its own, over "
    f"{COMPANY}; the 100 best of an image; then each label's threshold."
)
INPUTS, OUTPUTS = ("images", "prototypes"), ("boxes", "scores")


@dataclass(frozen=True)
class Card:
    """What a file says of itself.

    names: by label. labels, branches: of each score column (0 standard, 1 prototype); with prototypes as an input one
    column a prototype follows. thresholds: the least score of each label. prototypes: `frozen` in the graph, or
    `input`. image_size, stride: px. dim: width of a prototype. model_sha256: of the weights.
    """

    names: tuple[str, ...]
    labels: tuple[int, ...]
    branches: tuple[int, ...]
    thresholds: tuple[float, ...]
    registered: tuple[str, ...]
    prototypes: str
    image_size: int
    stride: int
    dim: int
    model_sha256: str
    version: str

    def properties(self) -> dict[str, str]:
        """{key: text} as metadata of a file has it."""
        told = {key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                for key, value in asdict(self).items()}  # fmt: skip
        return {"format": FORMAT, **told, "preprocessing": PREPROCESSING, "postprocessing": POSTPROCESSING,
                "licence": LICENCE}  # fmt: skip

    @staticmethod
    def of(properties: Mapping[str, str], where: str) -> "Card":
        """Read back. Raises CheckpointError for a file that fsdet export has not written."""
        if properties.get("format") != FORMAT:
            raise CheckpointError(explain(f"a file of fsdet export ({FORMAT})", f"format {properties.get('format')!r}",
                                          where, "export the checkpoint with this version's fsdet export"))  # fmt: skip
        try:
            return Card(**{key: _read(kind, properties[key]) for key, kind in Card.__annotations__.items()})
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(explain("the metadata of fsdet export", f"{type(error).__name__}: {error}", where,
                                          "export the checkpoint again")) from error  # fmt: skip


def _read(kind: Any, text: str) -> Any:
    if kind is str:
        return text
    value = json.loads(text)
    return tuple(value) if isinstance(value, list) else kind(value)


class Portable(nn.Module):
    """Images, and prototypes where `words` has none frozen in, to boxes and scores; no other state.

    Args:
        model: in eval mode. words: what it looks for; its prototypes are constants of the graph. open_: the prototypes
            are the second input instead, and their columns come after those of `words`.
    """

    def __init__(self, model: DualDetector, words: Vocabulary, open_: bool = False) -> None:
        super().__init__()
        self.model, self.open = model, open_
        prototypes = None if open_ else words.prototypes
        self.register_buffer("prototypes", prototypes)
        self.words = replace(words, prototypes=None, prototype_labels=() if open_ else words.prototype_labels, shots=())

    def forward(self, images: Tensor, prototypes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] RGB in [0, 1] (and [N, D] unit rows) -> boxes [B, A, 4] px of the input, scores [B, A, T]."""
        dense = self.model.dense(images)
        known = prototypes if self.open else self.prototypes
        return dense.boxes, class_scores(self.model, dense, replace(self.words, prototypes=known))

    def example(self, size: int) -> tuple[Tensor, ...]:
        """Inputs to trace with: two images, which no rule takes for one, and three prototypes."""
        device = self.model.head.bias.device
        images = torch.zeros(2, 3, size, size, device=device)
        if not self.open:
            return (images,)
        return images, torch.eye(3, self.model.head.proxies.shape[-1], device=device)


def columns_of(words: Vocabulary) -> tuple[Sequence[int], Sequence[int]]:
    """(labels, branches) of the score columns, as a card has them."""
    branch, labels = words.columns(torch.device("cpu"))
    return labels.tolist(), branch.tolist()
