# SPDX-License-Identifier: AGPL-3.0-or-later
"""A frozen ViT that reads support crops in the detector's place. The door to timm.

It stands beside the detector, outside its module tree: no optimizer, average, checkpoint or export holds it, and
`train()` does not reach it. What is kept of it is its name, the sha256 of its file and where that file was.
"""

import hashlib
import importlib
import io
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn
from torchvision.ops import roi_align

from fsdet.errors import CheckpointError, ConfigError, UserError, counted, did_you_mean, explain
from fsdet.models.backbone import DAMAGE

MARGIN = 0.1  # of the box's longer side, shown around it on each side
CLASSIFIER = ("head.", "head_dist.", "fc.")  # what a file may hold beyond the features
RESIZED = ("pos_embed",)  # what may have another shape in the file: it was made for another image size


def crops(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Squares around boxes, resampled: windows [S, 3, h, w], boxes [S, 4] xyxy px -> [S, 3, size, size] float32.

    A square's side is the box's longer side and MARGIN of it on each side; beyond the window it is 0. Each pixel is the
    mean of bilinear samples, as many as the window has pixels there.
    """
    boxes = boxes.float()
    centre, side = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).amax(1, keepdim=True).clamp(min=1)
    half = side * (0.5 + MARGIN)
    number = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype).unsqueeze(1)
    return roi_align(images.float(), torch.cat((number, centre - half, centre + half), 1), size, aligned=True)


class FrozenVit:
    """A ViT of timm, read from a local file when it is first needed and never changed.

    Args:
        name: as timm calls it. image_size: px of the squares that it sees. features: F of one of them. sha256: of the
            file. weights: where the file was; `beside` names another folder to look in.
    """

    def __init__(self, name: str, image_size: int, features: int, sha256: str, weights: str) -> None:
        self.name, self.image_size, self.features, self.sha256 = name, image_size, features, sha256
        self.places = [Path(weights).expanduser()]
        self._network: nn.Module | None = None

    def __deepcopy__(self, memo: dict) -> "FrozenVit":
        """Itself: copies of a detector share what never changes."""
        return self

    @property
    def identity(self) -> str:
        """Equal exactly where the same crop has the same features."""
        return f"{self.name}@{self.image_size}:{self.sha256}"

    def beside(self, folder: Path) -> None:
        """Look for the file in this folder, too, where it is not at its own place."""
        self.places.append(folder / self.places[0].name)

    @property
    def path(self) -> Path:
        """Where the file is, or should be."""
        return next((p for p in self.places if p.is_file()), self.places[0])

    def network(self) -> nn.Module:
        """The ViT, read on first use.

        Raises:
            CheckpointError: the file is gone, or another. UserError: timm is missing.
        """
        if self._network is None:
            path = self.path
            data = _bytes(path)
            if (found := hashlib.sha256(data).hexdigest()) != self.sha256:
                raise CheckpointError(explain(f"the ViT that the detector was trained with ({self.sha256[:12]})",
                                              f"another file ({found[:12]})", str(path),
                                              "put the file that it was trained with there"))  # fmt: skip
            self._network = _filled(self.name, self.image_size, data, path)
        return self._network

    def __call__(self, images: Tensor, boxes: Tensor) -> Tensor:
        """Windows [S, 3, h, w] RGB in [0, 1] and their boxes [S, 4] px -> [S, F] float32 features, without gradient."""
        vit = self.network()
        with torch.inference_mode(False):  # weights that move in there could not be used in training
            vit.to(images.device)
        mean, std = (images.new_tensor(vit.pretrained_cfg[key], dtype=torch.float32).view(3, 1, 1)
                     for key in ("mean", "std"))  # fmt: skip
        with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
            return vit(crops((images.float() - mean) / std, boxes, self.image_size))

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Its parameters, which never train; of a fresh network where the file has not been needed yet."""
        network = _fresh(self.name, self.image_size) if self._network is None else self._network
        yield from network.named_parameters()


def vit_spec(name: str, weights: str, image_size: int) -> dict[str, Any]:
    """The plain values that FrozenVit is built from; the file is read and fitted once.

    Raises:
        ConfigError: timm has no such ViT, or not for this image size. CheckpointError: the file is no weights of it.
        UserError: timm is missing.
    """
    path = Path(weights).expanduser()
    data = _bytes(path)
    network = _filled(name, image_size, data, path)
    return {"name": name, "image_size": image_size, "features": int(network.num_features),
            "sha256": hashlib.sha256(data).hexdigest(), "weights": str(weights)}  # fmt: skip


def _timm() -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise UserError(explain("timm (extra vit)", "not installed", "model.support_encoder=vit",
                                f"{sys.executable} -m pip install timm")) from error  # fmt: skip


def _fresh(name: str, image_size: int) -> nn.Module:
    """A frozen network in eval mode, with random weights; torch's global generator is left as it was."""
    timm = _timm()
    if not timm.is_model(name.partition(".")[0]):  # which also keeps `hf-hub:...` from being fetched
        near = did_you_mean(name, timm.list_models("*vit*"))
        raise ConfigError(
            explain("the name of a ViT of timm", f"'{name}'.{near}", "model.vit.name", "correct the name")
        )
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.device("cpu"):
            network = timm.create_model(name, pretrained=False, num_classes=0, img_size=image_size)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ConfigError(explain(f"a ViT of timm for {image_size} px", f"'{name}' ({_first_line(error)})",
                                  "model.vit.name", "name another ViT")) from error  # fmt: skip
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    if patch is None:
        raise ConfigError(explain("a ViT", f"'{name}', which has no patches", "model.vit.name", "name a ViT of timm"))
    if any(image_size % side for side in patch):
        raise ConfigError(explain(f"a multiple of the patches of {name}, {patch[0]} px", str(image_size),
                                  "model.vit.image_size", f"{patch[0] * max(1, round(image_size / patch[0]))} is the "
                                  "nearest"))  # fmt: skip
    return network.eval().requires_grad_(False)


def _filled(name: str, image_size: int, data: bytes, path: Path) -> nn.Module:
    """The network with the weights of a file. Raises CheckpointError where one is missing, odd, or not finite."""
    network, given = _fresh(name, image_size), _tensors(data, path)
    own = network.state_dict()
    odd = [k for k, v in given.items() if k in own and v.shape != own[k].shape and k not in RESIZED]
    fit = getattr(sys.modules[type(network).__module__], "checkpoint_filter_fn", None)
    try:
        fitted = given if odd or fit is None else fit(given, network)
    except (RuntimeError, ValueError, KeyError, IndexError, AttributeError, AssertionError) as error:
        raise _foreign(name, _first_line(error), path) from error
    fitted = {k: v for k, v in fitted.items() if k in own or not k.startswith(CLASSIFIER)}
    missing, extra = [k for k in own if k not in fitted], [k for k in fitted if k not in own]
    if not odd:
        odd = [k for k, v in fitted.items() if k in own and v.shape != own[k].shape]
    wrong = {"missing": missing, "of another shape": odd, "unknown": extra}
    told = [f"{counted(len(names), 'tensor')} {what} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
            for what, names in wrong.items() if names]  # fmt: skip
    if told:
        raise _foreign(name, "; ".join(told), path)
    if bad := next((k for k, v in fitted.items() if v.is_floating_point() and not v.isfinite().all()), None):
        raise CheckpointError(explain("finite weights", f"NaN or inf in {bad}", str(path), "use another file"))
    with torch.inference_mode(False), torch.no_grad():
        network.load_state_dict(fitted)
    return network


def _foreign(name: str, got: str, path: Path) -> CheckpointError:
    return CheckpointError(explain(f"weights of {name} as timm names them", got, str(path),
                                   "check model.vit.name against model.vit.weights"))  # fmt: skip


def _bytes(path: Path) -> bytes:
    if not path.is_file():
        got = "a folder" if path.is_dir() else "nothing there"
        cure = "put it there (model.vit.weights) or beside the checkpoint; nothing is downloaded"
        raise CheckpointError(explain("a file of the ViT's weights", got, str(path), cure))
    return path.read_bytes()


def _tensors(data: bytes, path: Path) -> Mapping[str, Tensor]:
    """A state dict from a safetensors or torch file, without running code; also one under `model` or `state_dict`."""
    try:
        if data.startswith((b"PK", b"\x80")):  # a zip archive, or a pickle as old torch wrote it
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        else:
            content = load_safetensors(data)
    except (SafetensorError, *DAMAGE) as error:
        raise CheckpointError(explain("a safetensors file, or a torch file of tensors alone",
                                      "something else, which was not run", str(path),
                                      "save the ViT's state_dict() with safetensors")) from error  # fmt: skip
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(explain("a state dict of tensors", type(content).__name__, str(path),
                                      "save the ViT's state_dict() with safetensors"))  # fmt: skip
    return content


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error) or 'no text').splitlines()[0][:120]}"
