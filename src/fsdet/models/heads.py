# SPDX-License-Identifier: AGPL-3.0-or-later
"""The dual head: one class-agnostic box branch, one shared tower, a standard and a prototype classifier on it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fsdet.boxes import anchor_points, decode
from fsdet.models.backbone import ConvBlock
from fsdet.types import Pyramid

MAX_LOG_SCALE = math.log(100.0)


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, in float32. The gradient is at most 1e3 at the zero vector (numerics: rsqrt with 1e-6)."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


@dataclass(frozen=True, eq=False)
class Dense:
    """What the head says of an image before any prototype is known.

    points [A, 2] px; strides [A]; box_logits [B, A, 4, R]; boxes [B, A, 4] px, without gradient;
    embeddings [B, A, D] unit; standard [B, A, C] logits; objectness [B, A, 1], which every prototype logit of a place
    is raised by, None where the head has none. All but box_logits are float32.
    features: the head's inputs, for the gradient probe.
    """

    points: Tensor
    strides: Tensor
    box_logits: Tensor
    boxes: Tensor
    embeddings: Tensor
    standard: Tensor
    objectness: Tensor | None = None
    features: tuple[Tensor, ...] = ()

    def cut(self, images: slice, places: Tensor | slice = slice(None)) -> "Dense":
        """Some images and places of it, without the features, which scoring does not read."""

        def of(x: Tensor) -> Tensor:
            return x[images][:, places]

        raised = None if self.objectness is None else of(self.objectness)
        return Dense(self.points[places], self.strides[places], of(self.box_logits), of(self.boxes),
                     of(self.embeddings), of(self.standard), raised)  # fmt: skip


class DualHead(nn.Module):
    """Box branch (4 x R bins a point), standard classifier (C logits) and embedding (D) on pyramid features.

    The two classifiers share the classification tower: two more 3x3 convolutions would cost a fifth of a step.

    Args:
        channels: feature channels per level. classes: C >= 0 base classes. embed_dim: D. reg_max: R bins a side.
        proxies: whether the prototype branch also has one learnable prototype per base class.
        tower: width of the shared tower; None takes Ultralytics' rule for C classes. A model that grows by novel
            classes keeps the width it had.
        refine: whether an MLP corrects prototypes before they are compared. objectness: whether each place has a
            logit of its own beside the cosines. Both start as nothing (docs/notebook.md has what they are worth).
    """

    def __init__(self, channels: tuple[int, ...], classes: int, embed_dim: int, reg_max: int, proxies: bool,
                 tower: int | None = None, refine: bool = False, objectness: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.classes, self.reg_max = classes, reg_max
        box_width = max(16, channels[0] // 4, 4 * reg_max)
        width = tower or tower_width(channels[0], classes)
        self.box = nn.ModuleList(
            nn.Sequential(ConvBlock(c, box_width, 3), ConvBlock(box_width, box_width, 3),
                          nn.Conv2d(box_width, 4 * reg_max, 1)) for c in channels)  # fmt: skip
        self.tower = nn.ModuleList(nn.Sequential(ConvBlock(c, width, 3), ConvBlock(width, width, 3)) for c in channels)
        self.standard = nn.ModuleList(nn.Conv2d(width, classes, 1) for _ in channels)
        self.embed = nn.ModuleList(nn.Conv2d(width, embed_dim, 1) for _ in channels)
        self.proxies = nn.Parameter(torch.zeros(classes if proxies else 0, embed_dim))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(()))
        layers = (nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, embed_dim)) if refine else ()
        self.refine = nn.Sequential(*layers) if refine else None
        self.objectness = nn.ModuleList(nn.Conv2d(width, 1, 1) for _ in channels) if objectness else None

    def forward(self, pyramid: Pyramid) -> Dense:
        """Pyramid -> Dense; boxes are decoded once, in float32 px."""
        box, standard, embed, objectness = [], [], [], []
        for i, x in enumerate(pyramid.levels):
            tower = self.tower[i](x)
            box.append(_flat(self.box[i](x)))
            standard.append(_flat(self.standard[i](tower)))
            embed.append(_flat(self.embed[i](tower)))
            if self.objectness is not None:
                objectness.append(_flat(self.objectness[i](tower)))
        points, strides = anchor_points([x.shape[-2:] for x in pyramid.levels], pyramid.strides, box[0].device)
        logits = torch.cat(box, 1).unflatten(-1, (4, self.reg_max))
        with torch.no_grad():  # assignment, pooling and NMS look at boxes; the loss decodes its few positives itself
            boxes = decode(logits, points, strides)
        with torch.autocast(logits.device.type, enabled=False):
            return Dense(points, strides, logits, boxes, unit(torch.cat(embed, 1)), torch.cat(standard, 1).float(),
                         torch.cat(objectness, 1).float() if objectness else None, pyramid.levels)  # fmt: skip

    def scale(self) -> Tensor:
        """The cosine's temperature as a factor, at most 100."""
        return self.log_scale.clamp(max=MAX_LOG_SCALE).exp()

    def refined(self, prototypes: Tensor) -> Tensor:
        """[N, D] unit rows as they are compared: corrected by the MLP, which learns in episodes what a mean of few
        instances gets wrong, and scaled to length 1 again; as they are where the head has none."""
        if self.refine is None:
            return prototypes.float()
        with torch.autocast(prototypes.device.type, enabled=False):
            return unit(prototypes.float() + self.refine(prototypes.float()))

    def similarity_logits(self, dense: Dense, prototypes: Tensor, trust: float = 1.0) -> Tensor:
        """Places and [N, D] unit rows -> [B, A, N] float32 logits: scale * cosine + bias, + the place's objectness
        times `trust`."""
        with torch.autocast(dense.embeddings.device.type, enabled=False):
            logits = self.scale() * (dense.embeddings.float() @ self.refined(prototypes).T) + self.bias
            return logits if dense.objectness is None else logits + trust * dense.objectness

    def prototype_logits(self, dense: Dense, prototypes: Tensor) -> Tensor:
        """Places and support prototypes [N, D] -> [B, A, N + proxies], the learnable base proxies last."""
        return self.similarity_logits(dense, torch.cat((prototypes.float(), unit(self.proxies))))


def tower_width(finest: int, classes: int) -> int:
    """Ultralytics' width of the classification tower: the finest level's channels, more for many classes."""
    return max(finest, min(classes, 100))


def _flat(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H * W, C]; a view when x is channels-last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
