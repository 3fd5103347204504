# SPDX-License-Identifier: AGPL-3.0-or-later
"""Trunks are Ultralytics' own, and weights are read without running code."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from ultralytics.nn import modules as ul_modules
from ultralytics.nn.tasks import DetectionModel

from fsdet.engine.footprint import saved_bytes
from fsdet.errors import CheckpointError, ConfigError
from fsdet.models.backbone import ConvBlock, build_trunk, read_weights, run_trunk, trunk_names
from fsdet.models.detector import DualDetector

CASES = [("yolov8n", "P3-P5", (8, 16, 32)), ("yolov8n-p2", "P3-P5", (4, 8, 16, 32)),
         ("yolov8n", "P2-P5", (4, 8, 16, 32)), ("yolo11n", "P3-P5", (8, 16, 32))]  # fmt: skip


@pytest.mark.parametrize(("name", "levels", "strides"), CASES)
def test_trunk_gives_what_ultralytics_feeds_its_head(name, levels, strides):
    trunk = build_trunk(name, levels)
    model = DetectionModel(f"{name.removesuffix('-p2')}{'-p2' if len(strides) == 4 else ''}.yaml", nc=3, verbose=False)
    own = trunk_names(model.state_dict(), len(trunk.backbone), len(trunk.neck))
    for prefix, part in (("backbone.", trunk.backbone), ("neck.", trunk.neck)):
        part.load_state_dict({n.removeprefix(prefix): v for n, v in own.items() if n.startswith(prefix)})
        part.eval()
    seen = []
    model.eval().model[-1].register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[0]))
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        model(image)
        ours = run_trunk(trunk, image)
    assert trunk.strides == strides
    assert [x.shape[1] for x in ours] == list(trunk.channels)
    for mine, theirs in zip(ours, seen, strict=True):
        torch.testing.assert_close(mine, theirs)


def trained_norms(model):
    """As after a training: statistics and affine of every BatchNorm away from the identity."""
    torch.manual_seed(3)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 2.0)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.2, 3.0)
    return model


@pytest.mark.parametrize("settings", [(6, 8, 3, 2), (6, 6, 3, 1, None, 6), (6, 8, 1, 1, None, 1, 1, False)])
def test_a_frozen_norm_within_its_convolution_has_the_values_and_gradients_of_the_two(settings):
    block = trained_norms(ConvBlock(*settings)).double().train()
    block.bn.eval()
    x = torch.randn(2, 6, 9, 10, dtype=torch.double, requires_grad=True)
    leaves = [x, block.conv.weight, block.bn.weight, block.bn.bias]
    between = F.conv2d(x, block.conv.weight, None, block.conv.stride, block.conv.padding, groups=block.conv.groups)
    norm = block.bn
    between = F.batch_norm(between, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    wanted = F.silu(between) if isinstance(block.act, nn.SiLU) else between
    towards = torch.randn_like(wanted)
    got = block(x)
    torch.testing.assert_close(got, wanted)
    for one, two in zip(torch.autograd.grad(got, leaves, towards), torch.autograd.grad(wanted, leaves, towards),
                        strict=True):  # fmt: skip
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", ["yolov8n", "yolo11n"])
def test_a_detector_with_frozen_norms_keeps_a_third_less_for_its_backward_pass(name, monkeypatch):
    model = trained_norms(DualDetector(name, classes=5, embed_dim=32)).eval()
    first = model.backbone[0].conv.weight

    def passed(count=1):
        dense = model.dense(torch.full((count, 3, 96, 96), 0.5))
        return dense.box_logits.square().mean() + dense.standard.square().mean() + dense.embeddings[..., 0].mean()

    def of_an_image():  # beside them stand the scaled weights, once a pass
        return saved_bytes(lambda: passed(2), model) - saved_bytes(passed, model)

    less, grads = of_an_image(), torch.autograd.grad(passed(), first)
    monkeypatch.setattr(ConvBlock, "forward", ul_modules.Conv.forward)
    more, wanted = of_an_image(), torch.autograd.grad(passed(), first)
    assert less < 0.75 * more
    torch.testing.assert_close(grads, wanted, rtol=1e-3, atol=1e-4)


def test_who_listens_to_a_norm_hears_it_frozen_too_and_one_that_trains_learns():
    block, heard = ConvBlock(3, 4).train(), []
    block(torch.randn(2, 3, 8, 8) + 5)
    moved = block.bn.running_mean.clone()
    assert moved.abs().max() > 0
    block.bn.eval()
    x = torch.randn(2, 3, 8, 8)
    alone = block(x)
    handle = block.bn.register_forward_hook(lambda *told: heard.append(told[2]))
    torch.testing.assert_close(block(x), alone)
    handle.remove()
    block(x)
    assert len(heard) == 1 and torch.equal(block.bn.running_mean, moved)


def test_a_graph_for_use_alone_has_the_weights_as_they_are():
    with torch.no_grad():
        graph = str(torch.export.export(ConvBlock(3, 4).eval(), (torch.rand(1, 3, 8, 8),)).graph)
    assert "rsqrt" not in graph and "batch_norm" in graph


@pytest.mark.parametrize(("name", "levels", "word"), [("yolov8q", "P3-P5", "yolov8"), ("yolo11n", "P2-P5", "P2-P5"),
                                                      ("yolov8", "P3-P5", "Did you mean")])  # fmt: skip
def test_unknown_trunk_is_told_with_what_would_do(name, levels, word):
    with pytest.raises(ConfigError, match=word):
        build_trunk(name, levels)


def test_ultralytics_checkpoint_is_read_by_name_of_its_layers(tmp_path):
    torch.manual_seed(1)
    model = DetectionModel("yolov8n.yaml", nc=3, verbose=False)
    torch.save({"model": model.half(), "ema": None, "epoch": 3}, tmp_path / "weights.pt")
    detector = DualDetector("yolov8n", "P3-P5", classes=3)
    given = trunk_names(read_weights(tmp_path / "weights.pt"), len(detector.backbone), len(detector.neck))
    own = detector.state_dict()
    fits = {n for n, v in given.items() if n in own and own[n].shape == v.shape}
    assert sum(n.startswith(("backbone.", "neck.")) for n in fits) == sum(
        n.startswith(("backbone.", "neck.")) for n in own
    )
    assert any(n.startswith("head.box.2.2") for n in fits) and any(n.startswith("head.tower.0.1") for n in fits)
    assert given["backbone.0.conv.weight"].dtype == torch.float32


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_payload_in_a_weights_file_is_refused_and_not_run(tmp_path):
    torch.save({"model": Payload(tmp_path / "owned")}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"mkdir.*do not trust"):
        read_weights(tmp_path / "bad.pt")
    assert not (tmp_path / "owned").exists()


def test_an_empty_weights_file_is_told_as_one(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"best\.pt: expected a weights file, got an empty file"):
        read_weights(tmp_path / "best.pt")


def built_by_the_file(call):
    """What a file holds that has a class of an admitted name called with arguments of its own."""

    class Called:
        def __reduce__(self):
            return call

    return Called()


def with_activation(code):
    """A model description from which ultralytics builds a model, by `eval` of the activation that it names."""
    return {"activation": code, "nc": 1, "scales": {"n": [0.33, 0.25, 1024]}, "scale": "n",
            "backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": [[[0], 1, "Detect", ["nc"]]]}  # fmt: skip


def test_a_layer_that_a_file_has_called_does_nothing(tmp_path):
    code = f"__import__('os').mkdir({str(tmp_path / 'owned')!r}) or torch.nn.SiLU()"
    call = (DetectionModel, (with_activation(code),))
    torch.save({"model": built_by_the_file(call)}, tmp_path / "bad.pt")
    try:
        assert read_weights(tmp_path / "bad.pt") == {}
    finally:
        assert not (tmp_path / "owned").exists()
    DetectionModel(with_activation(code), verbose=False)
    assert (tmp_path / "owned").exists(), "the payload is one"


def test_the_tensors_of_a_stored_model_are_its_state_dict(tmp_path):
    model = DetectionModel("yolov8n.yaml", nc=3, verbose=False)
    model.register_buffer("left_out", torch.ones(1), persistent=False)
    torch.save({"model": model}, tmp_path / "weights.pt")
    given, want = read_weights(tmp_path / "weights.pt"), model.state_dict()
    assert list(given) == list(want)
    assert all(torch.equal(given[name], value) or not value.is_floating_point() for name, value in want.items())


def test_layers_within_themselves_end_with_a_word(tmp_path):
    loop = torch.nn.Sequential()
    loop._modules["again"] = loop
    torch.save({"model": loop}, tmp_path / "loop.pt")
    with pytest.raises(CheckpointError, match="without end"):
        read_weights(tmp_path / "loop.pt")


def test_a_function_of_an_admitted_module_is_refused(tmp_path):
    call = (torch.nn.modules.activation._is_make_fx_tracing, ())
    torch.save({"model": built_by_the_file(call)}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=r"_is_make_fx_tracing.*do not trust"):
        read_weights(tmp_path / "bad.pt")


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04 torn"])
def test_damaged_weights_are_named(tmp_path, content):
    (tmp_path / "torn.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"torn\.pt"):
        read_weights(tmp_path / "torn.pt")


def test_missing_weights_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="nothing there"):
        read_weights(tmp_path / "none.pt")


SPY = """
import sys
seen = []
sys.addaudithook(lambda event, args: seen.append(event) if event.startswith("socket.") and "getaddrinfo" in event
                 or event == "socket.connect" else None)
import fsdet.models.backbone
from PIL import Image
print(Image.open.__module__, seen)
"""


def test_importing_the_trunk_opens_no_socket_writes_no_home_and_leaves_pillow_alone(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    env = {k: v for k, v in os.environ.items() if not k.startswith(("YOLO_", "XDG_"))}
    env |= {"HOME": str(home), "YOLO_CONFIG_DIR": str(tmp_path / "settings")}
    done = subprocess.run([sys.executable, "-c", SPY], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "PIL.Image []"
    assert [p for p in home.rglob("*") if p.is_file()] == []
