# SPDX-License-Identifier: AGPL-3.0-or-later
"""The detector: trunk, dual head, and the path from support crops to prototypes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fsdet.models.backbone import build_trunk, run_trunk
from fsdet.models.heads import Dense, DualHead, tower_width, unit
from fsdet.models.initialise import initialise_head
from fsdet.models.prototypes import class_prototypes, pool_instances
from fsdet.models.vit import FrozenVit
from fsdet.types import DualOutput, Episode, Pyramid

CONTRAST_DIM = 128  # Sun et al. 2021 use 128


class DualDetector(nn.Module):
    """A YOLO trunk under a dual head.

    Args:
        backbone: Ultralytics name such as yolov8n. levels: P3-P5 or P2-P5. classes: C base classes.
        embed_dim: D. reg_max: R bins a box side. support: how an instance is pooled (models/prototypes.py).
        proxies: learnable prototypes of the base classes beside the support's.
        tower_classes: the number of classes that sets the head's width; None is `classes`. Stage 3 adds classes to a
            head without widening it.
        encoder: the plain values of a FrozenVit, which reads support instances instead of the detector; a learnable
            projection takes its features to D.
        refine, objectness: of the prototype branch (models/heads.py).
    """

    def __init__(self, backbone: str = "yolov8n", levels: str = "P3-P5", classes: int = 1, embed_dim: int = 128,
                 reg_max: int = 16, support: str = "anchors", proxies: bool = True,
                 tower_classes: int | None = None, encoder: Mapping[str, Any] | None = None, refine: bool = False,
                 objectness: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.trunk_wiring = build_trunk(backbone, levels)
        self.backbone, self.neck = self.trunk_wiring.backbone, self.trunk_wiring.neck
        channels = self.trunk_wiring.channels
        width = tower_width(channels[0], classes if tower_classes is None else tower_classes)
        self.head = DualHead(channels, classes, embed_dim, reg_max, proxies, width, refine, objectness)
        # Contrast is learnt behind a small MLP, so that the embedding itself keeps what CPE would throw away.
        self.support = nn.Sequential(nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, CONTRAST_DIM))
        self.pooling = support
        initialise_head(self.head, self.trunk_wiring.strides)
        self.encoder = FrozenVit(**encoder) if encoder else None
        if self.encoder:
            self.projection = nn.Linear(self.encoder.features, embed_dim)

    @property
    def stride(self) -> int:
        """The coarsest stride in px: image sides must be its multiples."""
        return max(self.trunk_wiring.strides)

    def features(self, images: Tensor) -> Pyramid:
        """[B, 3, H, W] RGB in [0, 1] -> Pyramid."""
        trunk = self.trunk_wiring
        levels = run_trunk(trunk, images.contiguous(memory_format=torch.channels_last))
        # Aliases: the neck makes coarse levels from fine ones, and a gradient to the head's inputs stops before that.
        return Pyramid(tuple(level.view_as(level) for level in levels), trunk.strides)

    def dense(self, images: Tensor) -> Dense:
        """[B, 3, H, W] -> everything that can be said without prototypes."""
        return self.head(self.features(images))

    def instances(self, support: Tensor, boxes: Tensor) -> Tensor:
        """Support crops [S, 3, h, w] and their boxes [S, 4] px -> [S, D] unit embeddings, with gradient."""
        if not len(support):
            return self.head.proxies.new_zeros(0, self.head.proxies.shape[-1])
        if self.encoder:
            return unit(self.projection(self.encoder(support, boxes)))
        return pool_instances(self.dense(support), boxes, self.pooling)

    def forward(self, episode: Episode) -> tuple[DualOutput, Dense]:
        """One episode of any stage -> its queries' dual output (N + proxies prototype columns), and the dense one."""
        dense = self.dense(episode.query)
        instances = self.instances(episode.support, episode.support_boxes)
        prototypes = class_prototypes(instances, episode.support_way, episode.ways)
        return self.with_prototypes(dense, prototypes), dense

    def with_prototypes(self, dense: Dense, prototypes: Tensor) -> DualOutput:
        """Compare a dense answer with [N, D] prototypes (and the proxies, where the model has them)."""
        return DualOutput(dense.points, dense.strides, dense.box_logits, dense.boxes, dense.embeddings, dense.standard,
                          self.head.prototype_logits(dense, prototypes))  # fmt: skip

    def contrast(self, embeddings: Tensor) -> Tensor:
        """[..., D] -> [..., 128] unit projections for CPE."""
        with torch.autocast(embeddings.device.type, enabled=False):
            return unit(self.support(embeddings.float()))

    def groups(self) -> Mapping[str, Sequence[tuple[str, nn.Parameter]]]:
        """Every parameter that can train, once: backbone, neck, head, support (with a ViT's projection)."""
        groups = {name: list(_named(getattr(self, name), name)) for name in ("backbone", "neck", "head", "support")}
        if self.encoder:
            groups["support"] += _named(self.projection, "projection")
        return groups

    def parts(self) -> Mapping[str, Sequence[tuple[str, nn.Parameter]]]:
        """The same parameters by what they are for: backbone, neck, and the head as box branch, shared tower, standard
        and prototype branch; contrast is CPE's projection, which only training uses. With a ViT also itself, which
        never trains, and its projection."""
        head = {"box": ("box",), "tower": ("tower",), "standard": ("standard",),
                "prototype": ("embed", "proxies", "log_scale", "bias", "refine", "objectness")}  # fmt: skip
        groups = self.groups()
        of_head = {
            part: [(n, p) for n, p in groups["head"] if n.split(".")[1] in names] for part, names in head.items()
        }
        parts = {"backbone": groups["backbone"], "neck": groups["neck"], **of_head,
                 "contrast": list(_named(self.support, "support"))}  # fmt: skip
        if self.encoder:
            parts |= {"projection": list(_named(self.projection, "projection")),
                      "vit": [(f"vit.{name}", p) for name, p in self.encoder.named_parameters()]}  # fmt: skip
        return parts


def _named(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
    yield from ((f"{prefix}.{name}", parameter) for name, parameter in module.named_parameters())
