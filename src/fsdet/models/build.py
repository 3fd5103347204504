# SPDX-License-Identifier: AGPL-3.0-or-later
"""A model from the plain spec that is stored in its checkpoint."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fsdet.errors import CheckpointError, explain
from fsdet.models.detector import DualDetector

SPEC_KEYS = ("backbone", "levels", "classes", "embed_dim", "reg_max", "support", "proxies", "tower_classes")
SWITCHES = ("refine", "objectness")  # off in a spec that does not name them, as older ones do not


def model_spec(backbone: str, levels: str, classes: int, embed_dim: int, reg_max: int, support: str,
               proxies: bool, tower_classes: int,
               encoder: Mapping[str, Any] | None = None, **switches: bool) -> dict[str, Any]:  # fmt: skip
    """The plain values that DualDetector is built from; `encoder`, of vit_spec, and SWITCHES only where there are."""
    values = (backbone, levels, classes, embed_dim, reg_max, support, proxies, tower_classes)
    on = {name: True for name in SWITCHES if switches.get(name)}
    return dict(zip(SPEC_KEYS, values, strict=True)) | ({"encoder": dict(encoder)} if encoder else {}) | on


def build_model(spec: Mapping[str, Any], where: str = "checkpoint") -> DualDetector:
    """DualDetector of `spec`. Raises CheckpointError naming the keys that are missing."""
    missing = [k for k in SPEC_KEYS if k not in spec]
    if missing:
        raise CheckpointError(explain("a fsdet detector's spec", f"no {', '.join(missing)}", where,
                                      "use a checkpoint written by fsdet train"))  # fmt: skip
    return DualDetector(**{k: spec[k] for k in SPEC_KEYS}, encoder=spec.get("encoder"),
                        **{name: bool(spec.get(name)) for name in SWITCHES})  # fmt: skip


def model_sha256(model: nn.Module) -> str:
    """Hash over names, shapes and values of the state dict, and the ViT's identity where a detector has one: which
    weights made a bank of prototypes."""
    digest = hashlib.sha256()
    if encoder := getattr(model, "encoder", None):
        digest.update(encoder.identity.encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)  # flat: 1x1 kernels have strides that no view takes
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
