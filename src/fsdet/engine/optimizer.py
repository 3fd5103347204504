# SPDX-License-Identifier: AGPL-3.0-or-later
"""The optimizer, its parameter groups, and the precision of a run."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import nn

from fsdet.config import Optim
from fsdet.engine.muon import Muon
from fsdet.errors import ConfigError, did_you_mean, explain

NO_DECAY_NAMES = ("bias", "scale", "temperature", "logit_scale", "log_temperature", "gamma", "beta")
NamedGroups = Mapping[str, Sequence[tuple[str, nn.Parameter]]]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str, where: str = "run.device") -> torch.device:
    """`auto` takes CUDA, then MPS, then the CPU; a named device must exist. `where`: what asked, for the message."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}.get(device.type, True)
    if not present or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(
            explain(
                f"a {device.type} device that exists",
                f"{name}, but this machine has none such",
                where,
                "use auto or cpu",
            )
        )
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """`auto` is bf16 where the hardware multiplies bf16, else fp16 on CUDA devices and fp32 elsewhere."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if device.type == "cpu" and cpu_multiplies_bf16() else "fp32"


def cpu_multiplies_bf16() -> bool:
    """Whether the CPU has bf16 products (AVX512-BF16 or AMX); without them torch emulates and is slower than fp32."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(supported is not None and supported() for supported in asked)


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """The context of forward and losses; losses switch it off for themselves."""
    return torch.autocast(device.type, dtype=DTYPES.get(precision, torch.bfloat16), enabled=precision in DTYPES)


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Weight decay acts on matrices and kernels, not on norms, biases, scales and temperatures."""
    return parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in NO_DECAY_NAMES


def parameter_groups(groups: NamedGroups, optim: Optim) -> list[dict]:
    """One optimizer group per task group and kind of parameter, built once; each knows its `group` and base LR.

    Kinds: with muon the convolution kernels (`orthogonal`), then the decayed and the undecayed others.

    Raises:
        ConfigError: a key of optim.lr_scale is no group of the task. ValueError: a parameter is in two groups.
    """
    for key in optim.lr_scale:
        if key not in groups:
            raise ConfigError(
                explain(
                    f"one of the groups {sorted(groups)}",
                    f"{key!r}.{did_you_mean(key, groups)}",
                    "optim.lr_scale",
                    "rename or remove the key",
                )
            )
    out, seen = [], set()
    for group, members in groups.items():
        scale = optim.lr_scale.get(group, 1.0)
        kinds: dict[str, list[nn.Parameter]] = {"kernel": [], "decayed": [], "plain": []}
        for name, parameter in members:
            kernel = optim.name == "muon" and parameter.ndim == 4
            kinds["kernel" if kernel else "decayed" if is_decayed(name, parameter) else "plain"].append(parameter)
        for kind, chosen in kinds.items():
            if any(id(p) in seen for p in chosen):
                raise ValueError(f"a parameter of group {group!r} is listed twice")
            seen.update(id(p) for p in chosen)
            if chosen:
                lr = scale * (optim.muon_lr if kind == "kernel" else optim.lr)
                decay = {"kernel": optim.muon_decay, "decayed": optim.weight_decay, "plain": 0.0}[kind]
                out.append({"params": chosen, "group": group, "base_lr": lr, "lr": lr, "weight_decay": decay,
                            "orthogonal": kind == "kernel"})  # fmt: skip
    return out


def build_optimizer(groups: NamedGroups, optim: Optim) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, AdamW (fused where this device and torch have it), or Muon with SGD."""
    params = parameter_groups(groups, optim)
    if optim.name == "muon":
        for group in params:
            group["momentum"] = optim.muon_momentum if group["orthogonal"] else optim.momentum
        return Muon(params)
    if optim.name == "sgd":
        kind, options = torch.optim.SGD, {"momentum": optim.momentum, "nesterov": optim.momentum > 0}
    else:
        kind, options = torch.optim.AdamW, {"betas": (optim.momentum, 0.999)}
    try:
        return kind(params, lr=optim.lr, fused=True, **options)
    except RuntimeError:  # raised at birth when a parameter's device has no fused kernel
        return kind(params, lr=optim.lr, **options)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> dict[str, float]:
    """Give every group its base LR times `factor`; returns {task group: LR}, and {task group}_kernels with muon."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return rates(optimizer)


def rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """{task group: LR} now, kernels that Muon moves as {task group}_kernels."""
    return {g["group"] + ("_kernels" if g.get("orthogonal") else ""): g["lr"] for g in optimizer.param_groups}
