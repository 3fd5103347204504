# SPDX-License-Identifier: AGPL-3.0-or-later
"""The classifier's trunk is torchvision's; its head starts without an opinion, as a mean that can learn to look."""

import pytest
import torch
import torchvision

from fsdet.models.classifier import Attention, Average, ImageClassifier, Trunk

SPEC = {"backbone": "resnet18", "width": 0.25, "head": "attention", "dropout": 0.5, "columns": 3}


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50"])
def test_at_full_width_the_trunk_is_torchvisions_by_name_and_shape(name):
    with torch.device("meta"):
        own = {k: v.shape for k, v in Trunk(name).state_dict().items()}
        theirs = {k: v.shape for k, v in getattr(torchvision.models, name)().state_dict().items()}
    assert own == {k: v for k, v in theirs.items() if not k.startswith("fc.")}


def test_the_trunk_computes_what_torchvision_does():
    theirs, own = torchvision.models.resnet18().eval(), Trunk("resnet18").eval()
    own.load_state_dict(theirs.state_dict(), strict=False)
    theirs.avgpool, theirs.fc = torch.nn.Identity(), torch.nn.Identity()
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(own(images).flatten(1), theirs(images))


def test_width_narrows_every_stage():
    assert (Trunk("resnet18", 0.25).channels, Trunk("resnet18").channels) == (128, 512)


def test_logits_start_near_nothing_and_groups_are_the_parts():
    model = ImageClassifier(SPEC).eval()
    assert model(torch.rand(4, 3, 64, 64)).abs().max() < 1
    assert list(model.groups()) == ["backbone", "attention", "classifier"]
    plain = ImageClassifier({**SPEC, "head": "dropout"}).groups()
    assert list(plain) == list(model.groups()) and not plain["attention"], "a rate for it is no slip"


def test_attention_starts_as_the_mean_and_can_point_at_one_place():
    features, attention = torch.randn(2, 16, 3, 3), Attention(16)
    torch.testing.assert_close(attention(features), Average()(features))
    attention(features).square().sum().backward()
    assert attention.score[-1].weight.grad.abs().sum() > 0
    with torch.no_grad():
        attention.score[-1].weight.normal_(std=1e4)
    assert attention(features).isfinite().all(), "a softmax in float32 has no logit that breaks it"


def test_pixels_are_standardised_inside_so_that_serving_cannot_forget_it():
    model = ImageClassifier(SPEC)
    seen = []
    model.backbone.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.eval()(torch.full((1, 3, 32, 32), 0.5))
    torch.testing.assert_close(seen[0][0, :, 0, 0], (0.5 - model.mean.flatten()) / model.std.flatten())
    assert {"mean", "std"} <= set(model.state_dict())
