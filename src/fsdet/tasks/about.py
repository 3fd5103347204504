# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet info`: what a configuration or checkpoint is: parameters by part, operations, memory of a training step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fsdet import config as configs
from fsdet.config import Config
from fsdet.engine import checkpoint as checkpoints
from fsdet.engine.footprint import GIB, Line, Memory, flops, line_through, memory, saved_bytes
from fsdet.engine.freezing import is_frozen
from fsdet.engine.optimizer import autocast, choose_device, choose_precision
from fsdet.engine.schedule import frozen_at
from fsdet.errors import ConfigError, counted
from fsdet.tasks import kind_of
from fsdet.tasks.kind import Kind
from fsdet.tasks.loading import rebuilt, spec_of

BUDGET = 50.0  # million parameters
MEASURED = (64, 128)  # sides of the images whose activations are measured, px
PAIR = 2  # of them: BatchNorm wants more than one


@dataclass(frozen=True)
class Asked:
    """budget: million parameters. batch: images a step; size: px of their sides; None takes the configuration's."""

    budget: float = BUDGET
    batch: int | None = None
    size: int | None = None


def about_checkpoint(path: Path, asked: Asked | None = None) -> str:
    """What a checkpoint holds: task, classes, parameters and what it costs."""
    content = checkpoints.load(path)
    spec = spec_of(path, content)
    kind = kind_of(spec["task"], str(path))
    trained = rebuilt(path, content, kind.network(spec["model"], str(path)), torch.device("cpu"))
    head = f"{path}: {kind.told(spec)}, {spec['image_size']} px, {trained.sha256[:12]}"
    config = _config_of(content)
    return "\n".join([head, *_told(kind, trained.model, spec["model"], config, asked or Asked(), spec["image_size"])])


def about_config(config: Config, asked: Asked | None = None) -> str:
    """What a configuration would build, for the classes of its data where they are on disk."""
    kind = kind_of(config.task, "task")
    spec, classes = kind.planned(config)
    head = f"{classes}, {config.data.image_size} px"
    model = kind.network(spec, "the configuration")
    return "\n".join([head, *_told(kind, model, spec, config, asked or Asked(), config.data.image_size)])


def _config_of(content: Mapping[str, Any]) -> Config | None:
    """The configuration that a checkpoint was written under; None where this version does not read it any more."""
    try:
        return configs.Config.model_validate(content.get("config") or None)
    except (ConfigError, ValueError):
        return None


def _told(kind: Kind, model: nn.Module, spec: Mapping[str, Any], config: Config | None, asked: Asked,
          side: int) -> list[str]:  # fmt: skip
    frozen = frozen_at(1, config.stage.freeze) if config else ()
    for group, members in model.groups().items():
        for name, parameter in members:
            parameter.requires_grad_(not is_frozen(group, name, frozen))
    size = asked.size or side
    used = _sized(kind, model, spec, size)
    billions = flops(lambda: kind.look(used.eval(), torch.zeros(1, 3, size, size))) / 1e9
    lines = [*_parameters(model, asked.budget), f"  {billions:.3g} GFLOPs an image at {size} px, two a multiply-add"]
    if config is None:
        return [
            *lines,
            "  no estimate of memory: the configuration it holds is of another version; name a YAML instead",
        ]
    return lines + _memory_lines(kind, model, spec, config, asked)


def _parameters(model: nn.Module, budget: float) -> list[str]:
    """A line a part: parameters, and how many of them train in the first epoch where that is not all."""
    parts = model.parts() if hasattr(model, "parts") else model.groups()
    rows, total, trained = [], 0, 0
    for name, members in parts.items():
        count, moved = (sum(p.numel() for _, p in members if p.requires_grad or not only) for only in (False, True))
        total, trained = total + count, trained + moved
        rows.append(f"  {name:<10}{count / 1e6:>8.2f} M{_frozen(count, moved)}")
    share = f"{total / 1e6 / budget:.0%} of {budget:g} M"
    over = "" if total <= budget * 1e6 else ": over the budget"
    return [*rows, f"  {'total':<10}{total / 1e6:>8.2f} M, {share}{over}{_frozen(total, trained)}"]


def _frozen(count: int, trained: int) -> str:
    if trained == count:
        return ""
    return ", frozen" if not trained else f", {trained / 1e6:.2f} M of it trains, the rest is frozen"


def _memory_lines(kind: Kind, model: nn.Module, spec: Mapping[str, Any], config: Config, asked: Asked) -> list[str]:
    device = torch.device("cpu") if config.run.device == "cpu" else choose_device("auto")
    precision = choose_precision(config.run.precision, device)
    images = images_of(kind, config, asked)
    found = step_memory(kind, model, spec, config, images, precision, device)
    (count, side), *windows = images
    beside = "".join(f" and {counted(n, 'support')} at {px} px" for n, px in windows)
    parts = {"activations": found.activations, "weights, gradients, optimizer, EMA": found.weights + found.gradients
             + found.optimizer + found.ema, "in passing": found.passing, "images": found.batch}  # fmt: skip
    shown = ", ".join(f"{value / GIB:.2f} {name}" for name, value in parts.items())
    return [
        f"  a training step of {counted(count, 'image')} at {side} px{beside}, {precision}: "
        f"about {found.total / GIB:.2f} GiB",
        f"  ({shown}; what autograd keeps of {PAIR} images of {MEASURED[0]} and of {MEASURED[1]} px, scaled by pixels; "
        "without the libraries themselves)",
    ]


def images_of(kind: Kind, config: Config, asked: Asked) -> list[tuple[int, int]]:
    """(number, side px) of what a training step looks at; what was asked for goes for the queries."""
    (count, side), *windows = kind.inputs(config)
    return [(asked.batch or count, asked.size or side), *windows]


def step_memory(kind: Kind, model: nn.Module, spec: Mapping[str, Any], config: Config,
                images: Sequence[tuple[int, int]], precision: str,
                device: torch.device) -> Memory:  # fmt: skip
    """Of a training step over `images`, (number, side px) each; the model's frozen parameters keep nothing."""
    within = config.stage.freeze_norm and device.type == "cpu"  # models/backbone.py: nowhere else
    line, fixed = activations_of(kind, model, spec, precision, still=within)
    kept = sum(fixed + count * line.at(side) for count, side in images)
    pixels = sum(count * 3 * side**2 * 4 for count, side in images)
    found = memory(model, kept, pixels, optimizer=config.optim.name, ema=config.optim.ema > 0)
    return replace(found, weights=found.weights + _beside(model))


def _beside(model: nn.Module) -> int:
    """Bytes of frozen parameters that a model uses and does not hold: a ViT's."""
    own = {id(p) for p in model.parameters()}
    listed = (p for members in model.parts().values() for _, p in members) if hasattr(model, "parts") else ()
    return sum(p.numel() * p.element_size() for p in listed if id(p) not in own)


def activations_of(kind: Kind, model: nn.Module, spec: Mapping[str, Any], precision: str, *,
                   still: bool = False) -> tuple[Line, int]:  # fmt: skip
    """What one image leaves for the backward pass, by its size, and bytes that a pass leaves whatever its images.

    Measured on two small batches of each of two sizes. still: BatchNorm keeps its statistics, as stage.freeze_norm
    has it; the weights of a convolution are then made anew for a pass.
    """
    kept, fixed = [], 0
    for side in MEASURED:
        used = _sized(kind, model, spec, side).train()
        for norm in used.modules():
            if isinstance(norm, _BatchNorm) and still:
                norm.eval()
        one, two = (_saved(kind, used, pairs * PAIR, side, precision) for pairs in (1, 2))
        kept.append((two - one) // PAIR)
        fixed = max(fixed, 2 * one - two)
    return line_through(MEASURED, (kept[0], kept[1])), fixed


def _saved(kind: Kind, model: nn.Module, count: int, side: int, precision: str) -> int:
    """Bytes that a pass over `count` images with this side, px, keeps."""
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(side))

    def run() -> Tensor:
        with autocast(images.device, precision):
            return kind.practice(model, images)

    return saved_bytes(run, model)


def _sized(kind: Kind, model: nn.Module, spec: Mapping[str, Any], side: int) -> nn.Module:
    """A model for images of this size: itself, unless its own spec fixes another size; frozen alike."""
    if spec.get("image_size", side) == side:
        return model
    other = kind.network({**spec, "image_size": side}, "fsdet info")
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        theirs.requires_grad_(mine.requires_grad)
    return other
