# SPDX-License-Identifier: AGPL-3.0-or-later
"""A frozen ViT reads support crops: equal to timm on pixels cut by hand, never changed, and no other file passes."""

import copy
import io
import pickle
import sys

import pytest
import timm
import torch
from safetensors.torch import save
from torch.nn.functional import avg_pool2d, normalize

from fsdet.errors import CheckpointError, ConfigError, UserError
from fsdet.models.build import build_model, model_sha256, model_spec
from fsdet.models.vit import crops, vit_spec

NAME, SIDE, D = "test_vit", 48, 16  # 0.3 M parameters, 16 px patches


def torch_bytes(content) -> bytes:
    out = io.BytesIO()
    torch.save(content, out)
    return out.getvalue()


@pytest.fixture(scope="module")
def vit():
    """timm's own, random, with a classifier and made for another size than is used here."""
    torch.manual_seed(0)
    return timm.create_model(NAME, pretrained=False, num_classes=7, img_size=64).eval()


@pytest.fixture(scope="module")
def file(vit, tmp_path_factory):
    path = tmp_path_factory.mktemp("vit") / "vit.safetensors"
    path.write_bytes(save(vit.state_dict()))
    return path


def detector(file, side: int = SIDE):
    torch.manual_seed(1)
    spec = model_spec("yolov8n", "P3-P5", 3, D, 16, "anchors", True, 3, vit_spec(NAME, str(file), side))
    return build_model(spec).eval()


def test_a_crop_is_the_square_around_the_box_with_its_margin():
    image = torch.rand(2, 3, 128, 128)
    boxes = torch.tensor([[20.0, 20, 60, 60], [44.0, 30, 64, 70]])  # sides 40: 4 px more on each side
    found = crops(image, boxes, 48)
    torch.testing.assert_close(found[0], image[0, :, 16:64, 16:64])
    torch.testing.assert_close(found[1], image[1, :, 26:74, 30:78], msg="a narrow box keeps its shape")
    twice = crops(image[:1], torch.tensor([[20.0, 20, 100, 100]]), 48)
    torch.testing.assert_close(twice[0], avg_pool2d(image[0, :, 12:108, 12:108], 2))
    outside = crops(image[:1], torch.tensor([[-20.0, -20, 20, 20]]), 48)[0]
    assert not outside[:, :22, :22].any() and outside[:, 26:, 26:].all()


def test_an_embedding_is_timms_features_projected_to_length_1(vit, file):
    model = detector(file, 64)
    windows, boxes = torch.rand(3, 3, 128, 128), torch.tensor([[44.0, 44, 84, 84]] * 3)
    seen = crops(windows, boxes, 64)  # held to slices above
    with torch.no_grad():
        features = vit.forward_head(vit.forward_features((seen - 0.5) / 0.5), pre_logits=True)  # test_vit: .5, .5
        wanted = normalize(features @ model.projection.weight.T + model.projection.bias, dim=-1)
        torch.testing.assert_close(model.instances(windows, boxes), wanted, rtol=1e-4, atol=1e-5)
    assert model.instances(windows[:0], boxes[:0]).shape == (0, D)


def test_normalisation_is_the_models_own(file):
    model = detector(file)
    boxes = torch.tensor([[20.0, 20, 60, 60]])
    grey = torch.full((1, 3, 96, 96), 0.5)
    with torch.no_grad():
        of_zeros = model.encoder.network()(torch.zeros(1, 3, SIDE, SIDE))
    torch.testing.assert_close(model.encoder(grey, boxes), of_zeros)
    assert timm.create_model("vit_small_patch14_dinov2", img_size=28).pretrained_cfg["mean"] == (0.485, 0.456, 0.406)


def test_the_default_has_384_features(tmp_path):
    full = timm.create_model("vit_small_patch14_dinov2", pretrained=False, num_classes=0, img_size=56)
    path = tmp_path / "vit.pt"
    path.write_bytes(torch_bytes(full.state_dict()))
    assert vit_spec("vit_small_patch14_dinov2", str(path), 28)["features"] == 384


def test_the_projection_learns_and_the_vit_does_not(file):
    model = detector(file).train()
    model.requires_grad_(True)
    before = {k: v.clone() for k, v in model.encoder.network().state_dict().items()}
    assert not model.encoder.network().training
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    windows, boxes = torch.rand(2, 3, 96, 96), torch.tensor([[20.0, 20, 60, 60]] * 2)
    weight = model.projection.weight.detach().clone()
    for _ in range(2):
        model.train()
        optimizer.zero_grad()
        model.instances(windows, boxes)[:, 0].sum().backward()
        assert model.projection.weight.grad.abs().max() > 0 and model.head.proxies.grad is None
        optimizer.step()
    assert (model.projection.weight != weight).any()
    assert all(torch.equal(v, before[k]) for k, v in model.encoder.network().state_dict().items())
    assert all(p.grad is None for _, p in model.encoder.named_parameters())


def test_nothing_of_the_vit_is_in_the_state_groups_or_copies(file):
    model, plain = detector(file), build_model(model_spec("yolov8n", "P3-P5", 3, D, 16, "anchors", True, 3))
    assert set(model.state_dict()) - set(plain.state_dict()) == {"projection.weight", "projection.bias"}
    grouped = [id(p) for members in model.groups().values() for _, p in members]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    parts = model.parts()
    assert sum(p.numel() for _, p in parts["vit"]) == 300_416
    assert not any(p.requires_grad for _, p in parts["vit"]) and len(parts["contrast"]) == 4
    assert copy.deepcopy(model).encoder is model.encoder
    assert "encoder" not in model_spec("yolov8n", "P3-P5", 3, D, 16, "anchors", True, 3)


def test_building_one_leaves_torchs_generator_alone(file):
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    vit_spec(NAME, str(file), SIDE)
    assert torch.equal(torch.rand(4), wanted)


def test_in_use_and_in_training_it_is_the_same_and_either_may_come_first(file):
    windows, boxes = torch.rand(1, 3, 96, 96), torch.tensor([[20.0, 20, 60, 60]])
    model = detector(file)
    with torch.inference_mode():
        first = model.instances(windows, boxes)
    model.instances(windows, boxes).sum().backward()
    assert torch.equal(first, detector(file).instances(windows, boxes))


def test_autocast_does_not_reach_it(file):
    model, windows, boxes = detector(file), torch.rand(1, 3, 96, 96), torch.tensor([[20.0, 20, 60, 60]])
    with torch.autocast("cpu", torch.bfloat16):
        low = model.encoder(windows.bfloat16().float(), boxes)
    seen = (crops(windows.bfloat16().float(), boxes, SIDE) - 0.5) / 0.5
    with torch.no_grad():
        torch.testing.assert_close(low, model.encoder.network()(seen), rtol=1e-5, atol=1e-5)


def test_another_file_of_the_same_name_is_refused_and_makes_another_hash(file, tmp_path):
    moved = tmp_path / "vit.safetensors"
    moved.write_bytes(file.read_bytes())
    model = detector(moved)
    changed = {k: v + 1 for k, v in timm.create_model(NAME, img_size=SIDE, num_classes=0).state_dict().items()}
    moved.write_bytes(save(changed))
    with pytest.raises(CheckpointError, match="expected the ViT that the detector was trained with"):
        model.encoder.network()
    other = detector(moved)
    other.load_state_dict(model.state_dict())
    assert model_sha256(other) != model_sha256(model)
    moved.unlink()
    with pytest.raises(CheckpointError, match="expected a file of the ViT's weights, got nothing there"):
        model.encoder.network()
    model.encoder.beside(file.parent)
    assert model.encoder.network() is model.encoder.network()


class Code:
    def __reduce__(self):
        return print, ("this file runs code",)


def without(state, name):
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda s: save(without(s, "norm.weight")), r"1 tensor missing \(norm.weight\)"),
        (lambda s: save(s | {"norm.weight": torch.ones(65)}), r"1 tensor of another shape \(norm.weight\)"),
        (lambda s: save(s | {"patch_embed.proj.weight": torch.ones(64, 3, 8, 8)}), "of another shape"),
        (lambda s: save(s | {"blocks.99.norm1.weight": torch.ones(64)}), r"1 tensor unknown \(blocks.99"),
        (lambda s: save(s | {"pos_embed": torch.ones(1, 12, 64)}), "got"),
        (lambda s: save(s | {"norm.weight": s["norm.weight"] * float("nan")}), "NaN or inf in norm.weight"),
        (lambda s: save({"weight": torch.ones(3)}), "tensors missing"),
        (lambda s: b"", "something else, which was not run"),
        (lambda s: b"\x10\0\0\0\0\0\0\0no json at all..", "something else, which was not run"),
        (lambda s: torch_bytes(s)[:1000], "something else, which was not run"),
        (lambda s: torch_bytes(s | {"norm.weight": Code()}), "something else, which was not run"),
        (lambda s: pickle.dumps(Code(), 2), "something else, which was not run"),
        (lambda s: torch_bytes([1, 2]), "expected a state dict of tensors, got list"),
    ],
)
def test_a_file_that_is_no_weights_of_it_is_refused_in_one_message(vit, tmp_path, capsys, make, told):
    path = tmp_path / "odd.pt"
    path.write_bytes(make(vit.state_dict()))
    with pytest.raises(CheckpointError, match=told) as caught:
        vit_spec(NAME, str(path), SIDE)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value) and "Next:" in str(caught.value)
    assert "runs code" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "side", "told"),
    [
        ("test_vitt", SIDE, "Did you mean 'test_vit'"),
        ("hf-hub:timm/test_vit.r160_in1k", SIDE, "expected the name of a ViT of timm"),
        ("resnet18", SIDE, "got 'resnet18'"),
        ("test_vit.nothing_like_it", SIDE, "test_vit.nothing_like_it"),
        (NAME, 50, "expected a multiple of the patches of test_vit, 16 px, got 50. Next: 48 is the nearest"),
    ],
)
def test_a_name_or_size_that_timm_has_not_is_refused(file, name, side, told):
    with pytest.raises(ConfigError, match=told):
        vit_spec(name, str(file), side)


def test_without_timm_the_message_has_the_command(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(
        UserError, match=r"expected timm \(extra vit\), got not installed. Next: .* -m pip install timm"
    ):
        vit_spec(NAME, str(file), SIDE)


def test_a_torch_file_with_the_state_under_a_name_is_read(vit, file, tmp_path):
    path = tmp_path / "vit.pt"
    path.write_bytes(torch_bytes({"model": vit.state_dict(), "epoch": 3}))
    one, two = detector(file), detector(path)
    for a, b in zip(one.encoder.named_parameters(), two.encoder.named_parameters(), strict=True):
        assert torch.equal(a[1], b[1])
