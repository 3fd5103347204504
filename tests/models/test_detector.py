# SPDX-License-Identifier: AGPL-3.0-or-later
"""The dual detector: shapes, initialisation, gradients on every path, prototypes against their definition."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from fsdet.errors import CheckpointError
from fsdet.models.build import build_model, model_sha256, model_spec
from fsdet.models.detector import DualDetector
from fsdet.models.heads import unit
from fsdet.models.initialise import mean_exponential
from fsdet.models.prototypes import class_prototypes, pool_instances
from fsdet.objective import MultiLoss
from fsdet.types import Episode, Targets

ALL = {"bbox": 7.5, "cls": 0.5, "dfl": 1.5, "supcon": 0.5, "cpe": 0.5, "triplet": 0.5}


def detector(**change):
    torch.manual_seed(0)
    return DualDetector(**{"classes": 5, "embed_dim": 32, **change})


def episode(ways=2, shots=(1, 3), queries=2, size=64, base=5):
    g = torch.Generator().manual_seed(3)
    way = torch.tensor([w for w in range(ways) for _ in range(shots[w % len(shots)])], dtype=torch.long)
    boxes = torch.tensor([[8.0, 8, 40, 44], [30, 20, 60, 60]]).expand(queries, 2, 4).clone()
    labels = torch.tensor([[0, 3]]).expand(queries, 2).clone()
    known = torch.ones(queries, base, dtype=torch.bool)
    way_labels = torch.where(labels < ways, labels, -1)
    targets = Targets(boxes, labels, way_labels, torch.ones_like(labels, dtype=torch.bool), known,
                      torch.ones(queries, ways, dtype=torch.bool))  # fmt: skip
    return Episode(0, torch.rand(queries, 3, size, size, generator=g), targets,
                   torch.rand(len(way), 3, 64, 64, generator=g), torch.tensor([[10.0, 10, 50, 50]]).expand(len(way), 4),
                   way, torch.arange(ways), tuple(str(i) for i in range(queries)))  # fmt: skip


@pytest.mark.parametrize(("ways", "shots", "proxies"), [(0, (1,), True), (2, (1, 3), True), (40, (2,), False)])
def test_shapes_for_any_number_of_ways_and_ragged_shots(ways, shots, proxies):
    model = detector(proxies=proxies).eval()
    with torch.no_grad():
        output, _ = model(episode(ways=ways, shots=shots))
    points = 8 * 8 + 4 * 4 + 2 * 2
    assert output.boxes.shape == (2, points, 4) and output.box_logits.shape == (2, points, 4, 16)
    assert output.standard.shape == (2, points, 5)
    assert output.prototype.shape == (2, points, ways + (5 if proxies else 0))
    torch.testing.assert_close(output.embeddings.norm(dim=-1), torch.ones(2, points), atol=1e-3, rtol=0)


def test_both_classifiers_start_at_their_prior():
    model = detector().eval()
    with torch.no_grad():
        output, _ = model(episode())
    standard = [math.log(5 / 5 / (640 / s) ** 2) for s in (8, 16, 32)]
    assert min(standard) - 0.5 < output.standard.min() and output.standard.max() < max(standard) + 0.5
    bias, scale = -math.log(0.999 / 0.001), 10.0
    assert bias - scale <= output.prototype.min() and output.prototype.max() <= bias + scale + 1e-4


def test_every_parameter_gets_a_gradient_in_dual_mode():
    model, objective = detector().train(), MultiLoss(ALL, cpe_iou=0.0)
    e = episode()
    output, _ = model(e)
    objective(output, e.targets, e.class_ids, contrast=model.contrast).total.backward()
    coarse = ("head.box.1", "head.box.2")  # connected, but no box of this scene is assigned to the coarse levels
    silent = [n for n, p in model.named_parameters()
              if p.grad is None or not (p.grad.abs().sum() > 0 or n.startswith(coarse))]  # fmt: skip
    assert silent == []


def test_what_corrects_starts_as_nothing_and_learns():
    """Same seed, same weights: an MLP and an objectness change no output before they are trained, and both train."""
    e, plain = episode(), detector().eval()
    model = detector(refine=True, objectness=True).eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(model(e)[0].prototype, plain(e)[0].prototype, atol=1e-4, rtol=0)
    output, _ = model(e)
    MultiLoss(ALL, cpe_iou=0.0)(output, e.targets, e.class_ids, contrast=model.contrast).total.backward()
    assert model.head.refine[-1].weight.grad.abs().sum() > 0
    assert all(level.weight.grad.abs().sum() > 0 for level in model.head.objectness[:1])


def test_a_prototype_is_corrected_before_it_is_compared_and_a_place_raised_by_its_own_logit():
    model = detector(refine=True, objectness=True).eval()
    dense = replace(model.dense(episode().query), objectness=torch.tensor([[[2.0]], [[-1.0]]]).expand(2, 84, 1))
    rows = unit(torch.randn(3, 32))
    with torch.no_grad():
        torch.nn.init.normal_(model.head.refine[-1].weight)
        first, last = model.head.refine[0], model.head.refine[-1]
        moved = rows + (rows @ first.weight.T + first.bias).relu() @ last.weight.T + last.bias
        cosine = dense.embeddings @ (moved / moved.norm(dim=1, keepdim=True)).T
        logits = model.head.similarity_logits(dense, rows)
        wanted = model.head.scale() * cosine + model.head.bias
        torch.testing.assert_close(logits[0], wanted[0] + 2, atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[1], wanted[1] - 1, atol=1e-4, rtol=0)
        dual = model.with_prototypes(dense, rows).prototype
        torch.testing.assert_close(dual[..., :3], logits, atol=1e-5, rtol=0)


def test_some_places_of_some_images():
    model = detector(objectness=True).eval()
    with torch.no_grad():
        dense = model.dense(episode().query)
        dense = replace(dense, objectness=torch.randn(2, 84, 1))
    places = torch.tensor([3, 80])
    cut = dense.cut(slice(1, 2), places)
    assert torch.equal(cut.points, dense.points[places]) and torch.equal(cut.strides, dense.strides[places])
    for name in ("box_logits", "boxes", "embeddings", "standard", "objectness"):
        assert torch.equal(getattr(cut, name)[0], getattr(dense, name)[1, places]), name
    assert cut.features == () and dense.cut(slice(0, 1)).objectness.shape == (1, 84, 1)
    assert replace(dense, objectness=None).cut(slice(0, 1)).objectness is None


def test_gradient_reaches_the_trunk_through_the_support_path_alone():
    model = detector(proxies=False).eval()
    e = episode(ways=2)
    with torch.no_grad():
        dense = model.dense(e.query)
    instances = model.instances(e.support, e.support_boxes)
    model.with_prototypes(dense, class_prototypes(instances, e.support_way, 2)).prototype.sum().backward()
    assert model.backbone[0].conv.weight.grad.abs().sum() > 0
    assert model.head.embed[0].weight.grad.abs().sum() > 0


def test_prototypes_are_renormalised_means_for_ragged_k():
    rows = unit(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)))
    made = class_prototypes(rows, torch.tensor([0, 1, 1, 1]), 2)
    torch.testing.assert_close(made[0], rows[0], atol=1e-5, rtol=0)
    mean = rows[1:].double().mean(0)
    torch.testing.assert_close(made[1].double(), mean / mean.norm(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["anchors", "roi", "both"])
def test_an_instance_is_read_from_its_own_image_and_place(how):
    model = detector().eval()
    crops = episode().support[:2].clone()
    boxes = torch.tensor([[4.0, 4, 28, 28], [4.0, 4, 28, 28]])
    with torch.no_grad():
        dense = model.dense(crops)
        near = ((dense.points - 16).abs().max(1).values <= 16).expand(2, -1)
        embeddings = torch.zeros_like(dense.embeddings)
        embeddings[..., 0] = 1.0  # everywhere
        embeddings[0, near[0]] = 0.0
        embeddings[0, near[0], 1] = 1.0  # but inside the box of image 0
        decoded = dense.boxes.clone()
        decoded[:, :] = torch.tensor([40.0, 40, 60, 60])
        decoded[near] = torch.tensor([4.0, 4, 28, 28])  # only points near the box predict it
        pooled = pool_instances(replace(dense, boxes=decoded, embeddings=embeddings), boxes, how)
    assert pooled[0, 1] > 0.95 and pooled[1, 0] > 0.95


def test_an_instance_that_no_box_overlaps_is_still_finite_and_connected():
    model = detector().train()
    e = episode()
    out = model.instances(e.support, torch.tensor([[63.0, 63, 63, 63]]).expand(len(e.support), 4))
    out.sum().backward()
    assert out.isfinite().all() and model.head.embed[0].weight.grad.isfinite().all()


def test_unit_is_finite_at_the_zero_vector():
    x = torch.zeros(3, 8, requires_grad=True)
    unit(x).sum().backward()
    assert x.grad.abs().max() <= 1e3 + 1


def test_a_deep_copy_runs_on_its_own_layers():
    model = detector().eval()
    twin = copy.deepcopy(model)
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        assert twin.dense(image).standard.abs().sum() > 0
        assert model.dense(image).standard.abs().sum() == 0


def test_model_hash_depends_on_values_and_nothing_else():
    a, b = detector(), detector()
    assert model_sha256(a) == model_sha256(b)
    with torch.no_grad():
        b.head.bias += 1e-6
    assert model_sha256(a) != model_sha256(b)


def test_build_refuses_an_incomplete_spec():
    spec = model_spec("yolov8n", "P3-P5", 5, 32, 16, "anchors", True, 5)
    assert build_model(spec).head.classes == 5
    with pytest.raises(CheckpointError, match="reg_max"):
        build_model({k: v for k, v in spec.items() if k != "reg_max"}, "x.pt")


def test_a_spec_that_names_no_switch_has_none():
    plain = model_spec("yolov8n", "P3-P5", 5, 32, 16, "anchors", True, 5)
    assert plain == model_spec("yolov8n", "P3-P5", 5, 32, 16, "anchors", True, 5, refine=False, objectness=False)
    assert build_model(plain).head.refine is None and build_model(plain).head.objectness is None
    both = build_model(plain | {"refine": True, "objectness": True}).head
    assert both.refine is not None and both.objectness is not None


def test_temperature_is_stored_as_its_log_and_capped_at_100():
    head = detector().head
    with torch.no_grad():
        head.log_scale.fill_(20.0)
    assert head.scale().item() == pytest.approx(100.0, rel=1e-4)


@pytest.mark.parametrize("dims", [2, 16, 64, 256])
def test_the_mean_of_an_exponential_of_a_random_cosine(dims):
    """By quadrature of the density (1 - t^2)^((D - 3) / 2) of a cosine in D dimensions, at t = cos a."""
    angle = (torch.arange(200_000, dtype=torch.float64) + 0.5) * math.pi / 200_000
    density = angle.sin() ** (dims - 2)
    exact = ((10 * angle.cos()).exp() * density).sum() / density.sum()
    assert mean_exponential(10.0, dims) == pytest.approx(exact.item(), rel=1e-6)
