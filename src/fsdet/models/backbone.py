# SPDX-License-Identifier: AGPL-3.0-or-later
"""Backbone and neck from Ultralytics' model YAMLs, and their weights from a local file. The door to ultralytics."""

import argparse
import contextlib
import io
import logging
import pickle  # for the name of its error alone
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

_pil_open, _disabled = Image.open, logging.root.manager.disable
logging.disable(logging.INFO)  # on a machine's first use ultralytics tells on stdout of the settings file it makes
from ultralytics.nn import modules as ul_modules  # noqa: E402
from ultralytics.nn.tasks import DetectionModel  # noqa: E402
from ultralytics.utils import LOGGER as _UL_LOGGER  # noqa: E402

from fsdet.errors import CheckpointError, ConfigError, did_you_mean, explain  # noqa: E402
from fsdet.files import UNREADABLE, damaged_part  # noqa: E402

logging.disable(_disabled)
Image.open = _pil_open  # ultralytics replaces it with one that pip-installs plugins for unreadable images
log = logging.getLogger("fsdet")
NORM_EPS, NORM_MOMENTUM = 1e-3, 0.03  # what the YAML's own layers use
DAMAGE = (
    *UNREADABLE,
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    KeyError,
    IndexError,
)  # as torch tells it
BACKBONES = tuple(f"{family}{size}" for family in ("yolov8", "yolo11") for size in "nsmlx")


class ConvBlock(ul_modules.Conv):
    """Conv2d without bias, BatchNorm, SiLU; on a CPU a BatchNorm that keeps its statistics is part of the convolution.

    With s = gamma / sqrt(variance + eps) it says act(conv(x; w s) + beta - mean s): the same, with the same gradients
    to w, gamma and beta, without the tensor between convolution and BatchNorm. A step with frozen BatchNorm keeps a
    third less for the backward pass and takes about .95 of its time (docs/notebook.md). Without gradients there is
    nothing to keep, and an exported file is to have constant weights (`fused` is for use alone). A GPU would have more
    small kernels to start a layer, which nobody has measured.
    """

    def forward(self, x: Tensor) -> Tensor:
        norm, conv = self.bn, self.conv
        still = isinstance(norm, nn.BatchNorm2d) and not norm.training
        heard = conv._forward_hooks or norm._forward_hooks  # who listens to a part is told what that part says
        if not still or heard or not torch.is_grad_enabled() or x.device.type != "cpu":
            return super().forward(x)
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        weight, bias = conv.weight * scale[:, None, None, None], norm.bias - norm.running_mean * scale
        return self.act(conv._conv_forward(x, weight, bias))


def _ours(network: nn.Module) -> nn.Module:
    """`network` with Ultralytics' blocks as ours: their parser makes layers of its own classes alone."""
    for block in network.modules():
        if type(block).forward is ul_modules.Conv.forward:
            block.__class__ = ConvBlock
    return network


@dataclass(frozen=True, eq=False)
class Trunk:
    """Layers of a backbone and a neck with their wiring; the detector owns the modules.

    outputs: indices (over backbone + neck) of the layers that feed the head, finest first.
    saved: indices whose outputs later layers read. channels, strides: one per output.
    """

    backbone: nn.ModuleList
    neck: nn.ModuleList
    outputs: tuple[int, ...]
    saved: frozenset[int]
    channels: tuple[int, ...]
    strides: tuple[int, ...]


def build_trunk(name: str, levels: str) -> Trunk:
    """The trunk `name` (one of BACKBONES) with pyramid `levels` P3-P5 or P2-P5, randomly initialised.

    Raises:
        ConfigError: for an unknown name, or levels that Ultralytics has no YAML for.
    """
    plain = name.removesuffix("-p2")
    if plain not in BACKBONES:
        raise ConfigError(explain(f"one of {', '.join(BACKBONES)}", repr(name), "model.backbone",
                                  f"choose one of those.{did_you_mean(plain, BACKBONES)}"))  # fmt: skip
    p2 = levels == "P2-P5" or name.endswith("-p2")
    if p2 and not plain.startswith("yolov8"):
        raise ConfigError(explain("a yolov8 backbone for levels P2-P5", repr(name), "model.levels",
                                  "use levels P3-P5 or a yolov8 backbone"))  # fmt: skip
    with _quiet():
        detector = DetectionModel(f"{plain}{'-p2' if p2 else ''}.yaml", ch=3, nc=3, verbose=False)
    layers, detect, split = list(_ours(detector).model[:-1]), detector.model[-1], len(detector.yaml["backbone"])
    channels = tuple(branch[0].conv.in_channels for branch in detect.cv2)
    return Trunk(nn.ModuleList(layers[:split]), nn.ModuleList(layers[split:]), tuple(detect.f),
                 frozenset(detector.save), channels, tuple(int(s) for s in detect.stride))  # fmt: skip


def run_trunk(trunk: Trunk, images: Tensor) -> tuple[Tensor, ...]:
    """[B, 3, H, W] RGB in [0, 1], sides a multiple of the coarsest stride -> one [B, C_i, H_i, W_i] per output."""
    kept: dict[int, Tensor] = {}
    x = images
    for index, layer in enumerate((*trunk.backbone, *trunk.neck)):
        if layer.f != -1:  # ultralytics' wiring: -1 is the previous layer, a list is concatenated
            x = kept[layer.f] if isinstance(layer.f, int) else [x if j == -1 else kept[j] for j in layer.f]
        x = layer(x)
        if index in trunk.saved or index in trunk.outputs:
            kept[index] = x
    return tuple(kept[i] for i in trunk.outputs)


@contextlib.contextmanager
def _quiet():
    """Ultralytics logs a line per construction; it belongs to nobody's training log."""
    level = _UL_LOGGER.level
    _UL_LOGGER.setLevel(logging.WARNING)
    try:
        yield
    finally:
        _UL_LOGGER.setLevel(level)


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """State dict of a local weights file: a plain state dict, or an Ultralytics .pt, both loaded without running code.

    Ultralytics pickles whole modules. Names of torch's and ultralytics' own layers are admitted, and an inert stand-in
    takes the place of each: the classes themselves run code when a file has them called (a model is built by `eval`).
    Raises:
        CheckpointError: if the file is missing, damaged, or names anything beyond layers.
    """
    if not path.is_file():
        raise CheckpointError(explain("a weights file", "nothing there", str(path), "correct the path in the config"))
    data = path.read_bytes()
    if not data:
        raise CheckpointError(explain("a weights file", "an empty file", str(path), "fetch the file again"))
    try:
        if part := damaged_part(data):
            raise CheckpointError(explain("a readable torch file", f"one whose part {part} is not as it was written",
                                          str(path), "fetch the file again"))  # fmt: skip
        needed = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))
        with torch.serialization.safe_globals([_admitted(name, path) for name in needed]):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except DAMAGE as error:
        cure = f"fetch the file again ({str(error).splitlines()[0][:120]})"
        raise CheckpointError(explain("a readable torch file", type(error).__name__, str(path), cure)) from error
    if isinstance(content, Mapping):
        content = next((content[k] for k in ("ema", "model") if content.get(k) is not None), content)
    state = dict(_tensors(content, path)) if isinstance(content, Layer) else content
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(explain("a state dict of tensors", type(state).__name__, str(path), "use another file"))
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}


_PLAIN = {"collections.OrderedDict": OrderedDict, "builtins.set": set, "argparse.Namespace": argparse.Namespace}
_LAYERS = ("torch.nn.modules.", "ultralytics.nn.modules.", "ultralytics.nn.tasks.", "ultralytics.utils.")
_DEPTH, _TENSORS = 50, 100_000  # beyond which a file is no detector


class Layer:
    """What stands for a class that a weights file names: it holds what was stored and can do nothing."""

    def __init__(self, *given: object) -> None:
        """What a file wants a class to be called with is not looked at."""


def _admitted(name: str, path: Path) -> tuple[type, str]:
    """The class that stands for `name` in the file; its own module is not imported."""
    if name in _PLAIN:
        return _PLAIN[name], name
    if name.startswith(_LAYERS) and name.rpartition(".")[2][:1].isupper():  # a class, no function
        return Layer, name
    raise CheckpointError(explain("only layers and tensors", name, str(path),
                                  "do not trust this file; it asks for code to be run"))  # fmt: skip


def _tensors(layer: Layer, path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a stored module, as nn.Module.state_dict has them."""
    waiting, told = [("", layer, 0)], 0
    while waiting:
        prefix, one, depth = waiting.pop()
        own, absent = vars(one), vars(one).get("_non_persistent_buffers_set") or ()
        for group in ("_parameters", "_buffers"):
            for name, value in _items(own.get(group)):
                if isinstance(value, Tensor) and not (group == "_buffers" and name in absent):
                    told += 1
                    yield f"{prefix}{name}", value
        inner = [(f"{prefix}{n}.", c, depth + 1) for n, c in _items(own.get("_modules")) if isinstance(c, Layer)]
        waiting += reversed(inner)
        if depth > _DEPTH or told > _TENSORS or len(waiting) > _TENSORS:
            raise CheckpointError(explain("the layers of a detector", "layers within layers without end", str(path),
                                          "use another file"))  # fmt: skip


def _items(value: object) -> list[tuple[object, object]]:
    return list(value.items()) if isinstance(value, Mapping) else []


def trunk_names(state: Mapping[str, Tensor], backbone_layers: int, neck_layers: int) -> dict[str, Tensor]:
    """Ultralytics' `model.<i>.<rest>` names rewritten to ours: backbone.<i>, neck.<i - n>, head.box / head.tower."""
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        parts = name.removeprefix("model.").removeprefix("model.").split(".")
        if not parts[0].isdigit():
            out[name] = value
            continue
        index, rest = int(parts[0]), parts[1:]
        if index < backbone_layers:
            out[".".join(["backbone", str(index), *rest])] = value
        elif index < backbone_layers + neck_layers:
            out[".".join(["neck", str(index - backbone_layers), *rest])] = value
        elif rest[0] == "cv2":
            out[".".join(["head", "box", *rest[1:]])] = value
        elif rest[0] == "cv3" and rest[2] in "01":
            out[".".join(["head", "tower", *rest[1:]])] = value
    return out
