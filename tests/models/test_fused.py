# SPDX-License-Identifier: AGPL-3.0-or-later
"""BatchNorm folded into convolutions says the same, and leaves the model as it was."""

import pytest
import torch
from torch import nn

from fsdet.models.build import build_model, model_sha256, model_spec
from fsdet.models.fused import fused


@pytest.mark.parametrize("backbone", ["yolov8n", "yolo11n"])
def test_a_fused_detector_says_the_same(backbone):
    torch.manual_seed(0)
    model = build_model(model_spec(backbone, "P3-P5", 5, 32, 16, "anchors", True, 5)).eval()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):  # as after a training, not the identity of a fresh one
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias, std=0.3)
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2.0)
    before = model_sha256(model)
    alone = fused(model)
    assert model_sha256(model) == before and all(p.requires_grad for p in model.head.parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in alone.modules())
    for net, in_place in ((model, False), (alone, True)):  # a training needs what an activation was made of
        assert {m.inplace for m in net.modules() if isinstance(m, nn.SiLU)} == {in_place}
    images = torch.rand(2, 3, 96, 128)
    with torch.no_grad():
        one, two = model.double().dense(images.double()), alone.dense(images)
    torch.testing.assert_close(two.embeddings, one.embeddings, atol=2e-5, rtol=0, check_dtype=False)
    torch.testing.assert_close(two.standard, one.standard, atol=1e-4, rtol=1e-4, check_dtype=False)
    torch.testing.assert_close(two.boxes, one.boxes, atol=1e-2, rtol=0, check_dtype=False)


def test_a_hash_is_of_values_and_not_of_how_they_lie_in_memory():
    model = build_model(model_spec("yolov8n", "P3-P5", 5, 32, 16, "anchors", True, 5))
    told = model_sha256(model)
    assert model_sha256(model.to(memory_format=torch.channels_last)) == told
    with torch.no_grad():
        model.head.embed[0].weight.set_(
            model.head.embed[0].weight.new_zeros(32, 80, 1, 1).as_strided((32, 80, 1, 1), (80, 1, 80, 80))
        )
    assert model_sha256(model) != told
