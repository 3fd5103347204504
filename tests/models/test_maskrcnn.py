# SPDX-License-Identifier: AGPL-3.0-or-later
"""Our Mask R-CNN is torchvision's: names, losses, detections; only its parts are in reach."""

import pytest
import torch
from torchvision.models import detection

from fsdet.models.maskrcnn import InstanceDetector

SPEC = {"arch": "resnet18_fpn", "classes": 3, "image_size": 64, "channels": 16, "box_features": 16, "width": 0.125}


def targets():
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 10:40, 10:40] = 1
    box = torch.tensor([[10.0, 10, 40, 40]])
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "masks": mask[:0]}
    return [{"boxes": box, "labels": torch.tensor([2]), "masks": mask}, empty]


def images():
    return list(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return InstanceDetector(SPEC)


@pytest.mark.parametrize("name", ["resnet50_fpn", "resnet50_fpn_v2"])
def test_names_and_shapes_are_those_of_torchvisions_files(name):
    with torch.device("meta"):
        theirs = getattr(detection, f"maskrcnn_{name}")(weights=None, weights_backbone=None, num_classes=91)
        own = InstanceDetector({**SPEC, "arch": name, "classes": 90, "image_size": 800})
    assert {k: v.shape for k, v in own.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_losses_and_detections_are_those_of_torchvisions_forward(small):
    """The same parts, put back into torchvision's own model."""
    whole = detection.MaskRCNN(small.backbone, 4)
    whole.transform, whole.rpn, whole.roi_heads = small.transform, small.rpn, small.roi_heads
    for mode in (True, False):
        small.train(mode)
        whole.train(mode)
        torch.manual_seed(3)
        with torch.no_grad():
            theirs = whole(images(), targets()) if mode else whole(images())
        torch.manual_seed(3)
        with torch.no_grad():
            own = small.losses(images(), targets())[0] if mode else small.detect(images(), [(64, 64)] * 2)
        if mode:
            assert {f"loss_{k}" for k in own} == set(theirs) and all(own[k[5:]] == v for k, v in theirs.items())
        else:
            assert all(torch.equal(a["boxes"], b["boxes"]) and torch.equal(a["labels"] + 1, b["labels"])
                       and torch.equal(a["masks"], b["masks"][:, 0] > 0.5)
                       for a, b in zip(own, theirs, strict=True))  # fmt: skip


def test_losses_are_float32_and_reach_every_part_in_half_precision_too(small):
    small.train()
    heads, seen = (small.rpn.head, small.roi_heads.box_predictor, small.roi_heads.mask_predictor), []
    hooks = [h.register_forward_hook(lambda _, inputs, output: seen.append(output)) for h in heads]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, levels = small.losses(images(), targets())
    for hook in hooks:
        hook.remove()
    assert {t.dtype for t in torch.utils._pytree.tree_leaves(seen)} == {torch.float32}, "boxes are decoded from these"
    assert all(v.dtype == torch.float32 and v.isfinite() for v in losses.values())
    assert all(level.dtype == torch.float32 for level in levels)
    sum(losses.values()).backward()
    for part, members in small.groups().items():
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for _, p in members), part
    small.zero_grad(set_to_none=True)


def test_the_probe_reaches_the_pyramid_under_a_frozen_backbone_too(small):
    for _, p in small.groups()["backbone"]:
        p.requires_grad_(False)
    try:
        losses, levels = small.train().losses(images(), targets())
        grads = torch.autograd.grad(losses["objectness"], levels, allow_unused=True)
        assert any(g is not None and g.abs().sum() > 0 for g in grads)
    finally:
        for _, p in small.groups()["backbone"]:
            p.requires_grad_(True)


def test_detections_come_at_the_size_that_is_asked_for(small):
    found = small.eval().detect(images(), [(128, 96), (64, 64)])
    assert [f["masks"].shape[1:] for f in found] == [(128, 96), (64, 64)]
    assert all(f["masks"].dtype == torch.bool and (f["labels"] >= 0).all() for f in found)
