# SPDX-License-Identifier: AGPL-3.0-or-later
"""torchvision's Mask R-CNN with its parts in reach: losses beside the features they come from, masks at any size."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor

from fsdet.models.classifier import Trunk

ARCHS = {"resnet50_fpn": maskrcnn_resnet50_fpn, "resnet50_fpn_v2": maskrcnn_resnet50_fpn_v2}
PARTS = {
    "backbone": ("backbone.",),
    "rpn": ("rpn.",),
    "box_head": ("roi_heads.box_head.", "roi_heads.box_predictor."),
    "mask_head": ("roi_heads.mask_head.", "roi_heads.mask_predictor."),
}
SMALL_LAYERS, SMALL_PROPOSALS, SMALL_SAMPLES = 2, 200, 64  # of resnet18_fpn: mask layers, proposals, boxes an image
MASK_STD = (
    0.001  # standard deviation of the masks' last layer, as detectron2: a mask starts as a coin, not at a loss of 3
)
THRESHOLD = 0.5  # of a mask's probabilities


class InstanceDetector(nn.Module):
    """Parameters are named as in torchvision's networks, so that their weight files fit.

    spec: arch, classes, image_size, channels, box_features, width; plain values, stored in checkpoints.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        super().__init__()
        net = _network(spec)
        self.transform, self.backbone, self.rpn, self.roi_heads = net.transform, net.backbone, net.rpn, net.roi_heads
        last = self.roi_heads.mask_predictor.mask_fcn_logits
        nn.init.normal_(last.weight, std=MASK_STD)
        nn.init.zeros_(last.bias)
        for head in (self.rpn.head, self.roi_heads.box_predictor, self.roi_heads.mask_predictor):
            head.register_forward_hook(_widened)  # boxes are decoded and losses taken in float32

    def losses(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]) -> tuple[
        dict[str, Tensor], tuple[Tensor, ...]
    ]:  # fmt: skip
        """({loss without its `loss_`: scalar}, the pyramid's levels). Labels count from 1; 0 is the background."""
        batch, targets = self.transform(list(images), list(targets))
        features = {name: _reached(level) for name, level in self.backbone(batch.tensors).items()}
        proposals, of_rpn = self.rpn(batch, features, targets)
        _, of_heads = self.roi_heads(features, proposals, batch.image_sizes, targets)
        named = {name.removeprefix("loss_"): value.float() for name, value in {**of_rpn, **of_heads}.items()}
        return named, tuple(features.values())

    def detect(self, images: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """boxes [n, 4] px, labels [n] from 0, scores [n], masks [n, H, W] bool, for images of `sizes` (H, W) px."""
        batch, _ = self.transform(list(images))
        features = {name: level.float() for name, level in self.backbone(batch.tensors).items()}
        proposals, _ = self.rpn(batch, features)
        found, _ = self.roi_heads(features, proposals, batch.image_sizes)
        placed = self.transform.postprocess(found, batch.image_sizes, list(sizes))
        return [{**f, "labels": f["labels"] - 1, "masks": f["masks"][:, 0] > THRESHOLD} for f in placed]

    def groups(self) -> Mapping[str, Sequence[tuple[str, nn.Parameter]]]:
        """Parameters by part: backbone (with its pyramid), rpn, box_head, mask_head."""
        named = list(self.named_parameters())
        return {part: [(n, p) for n, p in named if n.startswith(begins)] for part, begins in PARTS.items()}


def _widened(_: nn.Module, inputs: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.float()
    return type(output)(_widened(_, inputs, item) for item in output)


def _reached(level: Tensor) -> Tensor:
    """A level that the per-loss probe can differentiate to, under a frozen backbone too."""
    level = level.float()
    return level if level.requires_grad or not torch.is_grad_enabled() else level.requires_grad_()


def _network(spec: Mapping[str, Any]) -> MaskRCNN:
    size, classes = spec["image_size"], spec["classes"] + 1
    if spec["arch"] in ARCHS:
        return ARCHS[spec["arch"]](weights=None, weights_backbone=None, num_classes=classes, min_size=size,
                                   max_size=size)  # fmt: skip
    channels, features = spec["channels"], spec["box_features"]
    trunk = Trunk("resnet18", spec["width"])
    widths = [trunk.channels // 8, trunk.channels // 4, trunk.channels // 2, trunk.channels]
    levels = {f"layer{i + 1}": str(i) for i in range(4)}
    finest = max(4, size // 16)  # anchors from a sixteenth of the image's side to all of it
    anchors = AnchorGenerator(tuple((finest * 2**i,) for i in range(5)), ((0.5, 1.0, 2.0),) * 5)
    return MaskRCNN(
        BackboneWithFPN(trunk, levels, widths, channels), None, min_size=size, max_size=size,
        rpn_anchor_generator=anchors, rpn_batch_size_per_image=SMALL_SAMPLES,
        rpn_pre_nms_top_n_train=2 * SMALL_PROPOSALS, rpn_post_nms_top_n_train=SMALL_PROPOSALS,
        rpn_pre_nms_top_n_test=2 * SMALL_PROPOSALS,
        rpn_post_nms_top_n_test=SMALL_PROPOSALS, box_batch_size_per_image=SMALL_SAMPLES,
        box_head=TwoMLPHead(channels * 7 * 7, features), box_predictor=FastRCNNPredictor(features, classes),
        mask_head=MaskRCNNHeads(channels, (channels,) * SMALL_LAYERS, 1),
        mask_predictor=MaskRCNNPredictor(channels, channels, classes),
    )  # fmt: skip
