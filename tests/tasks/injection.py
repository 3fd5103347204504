# SPDX-License-Identifier: AGPL-3.0-or-later
"""Faults put into one place of a real detector's step, and what the report of the rejected step must name.

`scripts/bench/soak.py --injections` draws hundreds of them.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fsdet import objective as objectives
from fsdet.config import Guard, Optim
from fsdet.engine.optimizer import build_optimizer
from fsdet.engine.step import StepController
from fsdet.losses.cpe import cpe_rows
from fsdet.losses.supcon import rows_with_positive
from fsdet.losses.triplet import triplet_rows
from fsdet.models.build import build_model, model_spec
from fsdet.types import Episode, LossReport, StepReport, Targets

LOSSES = {"bbox": "ciou_loss", "cls": "_cls_rows", "dfl": "dfl_loss", "supcon": "supcon_loss", "cpe": "cpe_loss",
          "triplet": "triplet_loss"}  # the function of fsdet.objective that gives a loss's rows  # fmt: skip
PLACES = ("row", "parameter", "loss_gradient", "module")
SIZE, IMAGES, BOXES, CLASSES, PHI = 64, 3, 2, 4, 0.0


def episode(seed: int = 0) -> Episode:
    """Three images of two boxes, no two alike, and two ways with five supports in all."""
    g = torch.Generator().manual_seed(seed)
    corner = 2 + torch.rand(IMAGES, BOXES, 2, generator=g) * 20
    boxes = torch.cat((corner, corner + 16 + 20 * torch.rand(IMAGES, BOXES, 2, generator=g)), -1)
    labels = torch.tensor([[0, 1], [1, 0], [0, 2]])
    ways = torch.where(labels < 2, labels, -1)
    every = [torch.ones(shape, dtype=torch.bool) for shape in (labels.shape, (IMAGES, CLASSES), (IMAGES, 2))]
    targets = Targets(boxes, labels, ways, *every)
    crops = torch.rand(5, 3, 32, 32, generator=g)
    return Episode(seed, torch.rand(IMAGES, 3, SIZE, SIZE, generator=g), targets, crops,
                   torch.tensor([[4.0, 4.0, 28.0, 28.0]]).repeat(5, 1), torch.tensor([0, 0, 1, 1, 1]),
                   torch.tensor([0, 1]), tuple(f"photo_{i}.jpg" for i in range(IMAGES)))  # fmt: skip


class Bench:
    """A nano detector with all six losses under a StepController; it satisfies what a step asks of a Task."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = build_model(model_spec("yolov8n", "P3-P5", CLASSES, 16, 16, "anchors", True, CLASSES)).train()
        self.objective = objectives.MultiLoss(dict.fromkeys(LOSSES, 1.0), cpe_iou=PHI)
        optimizer = build_optimizer(self.model.groups(), Optim(lr=1e-6))
        self.control = StepController(self, optimizer, device=torch.device("cpu"), guard=Guard())
        self.batch = episode()
        self.modules, self.parameters = _used(self)

    def param_groups(self) -> Mapping[str, Any]:
        return self.model.groups()

    def losses(self, batch: Episode) -> LossReport:
        output, dense = self.model(batch)
        return self.objective(output, batch.targets, batch.class_ids, contrast=self.model.contrast,
                              probe_at=dense.features, image_ids=batch.image_ids)  # fmt: skip

    def step(self) -> StepReport:
        return self.control.run([self.batch], lr_factor=1.0, clip_norm=10.0)


def _used(bench: Bench) -> tuple[list[str], list[str]]:
    """Names of the modules with a tensor for every image, and of the parameters that get a gradient."""
    seen: dict[str, None] = {}

    def note(name: str) -> Callable:
        return lambda m, i, out: seen.setdefault(name) if _is_of_images(out) else None

    handles = [m.register_forward_hook(note(n)) for n, m in bench.model.named_modules() if n]
    bench.losses(bench.batch).total.backward()
    for handle in handles:
        handle.remove()
    trained = [n for members in bench.param_groups().values() for n, p in members
               if p.grad is not None and p.grad.abs().sum() > 0]  # fmt: skip
    bench.model.zero_grad(set_to_none=True)
    return list(seen), trained


def _is_of_images(output: Any) -> bool:
    return isinstance(output, Tensor) and output.ndim > 1 and len(output) == IMAGES


@dataclass
class Injection:
    """What was put where. expected: the parts of the report's evidence that must be these; filled while it strikes."""

    loss: str
    place: str
    seed: int
    outcome: str = ""
    expected: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.rng, self.expected = random.Random(self.seed), {}

    def value(self) -> float:
        return self.rng.choice((math.nan, math.inf))


def faults(count: int, seed: int = 0) -> Iterator[Injection]:
    """`count` faults: the losses take turns, and the places within each loss."""
    for i in range(count):
        loss, turn = list(LOSSES)[i % len(LOSSES)], i // len(LOSSES)
        yield Injection(loss, PLACES[(turn + i) % len(PLACES)], seed * 10**6 + i)


def strike(bench: Bench, injection: Injection) -> StepReport:
    """One step with the fault in place; its report. The bench is as before afterwards."""
    with {"row": _row, "parameter": _parameter, "loss_gradient": _loss_gradient, "module": _module}[injection.place](
        bench, injection
    ):
        return bench.step()


def misnamed(injection: Injection, report: StepReport) -> str | None:
    """What the report of a rejected step gets wrong, or None."""
    if report.outcome != injection.outcome:
        return f"{injection}: ended as {report.outcome} ({report.culprit})"
    wrong = {k: (v, report.evidence.get(k)) for k, v in injection.expected.items() if report.evidence.get(k) != v}
    unsaid = [w for w in _words(injection) if w not in report.culprit]
    return f"{injection}: expected and got {wrong}, unsaid {unsaid}; {report.culprit}" if wrong or unsaid else None


def _words(injection: Injection) -> list[str]:
    """What the one line of the log must contain."""
    said = injection.expected
    words = [*said.get("losses", {}), *(i for r in said.get("losses", {}).values() for i in r["images"])]
    words += [said[k] for k in ("parameter", "module") if said.get(k)]
    return [*words, *said.get("gradient_of", []), *said.get("module_images", [])]


@contextmanager
def _patched(loss: str, change: Callable[[Tensor, tuple], Tensor]) -> Iterator[None]:
    """The rows of a loss go through `change` together with the arguments they came from."""
    name, kinds = LOSSES[loss], objectives.KINDS.get(loss)
    honest = getattr(objectives, name)

    def changed(*args: Any, **kwargs: Any) -> Tensor:
        return change(honest(*args, **kwargs), args)

    setattr(objectives, name, changed)
    if kinds:
        objectives.KINDS[loss] = (changed, *kinds[1:])
    try:
        yield
    finally:
        setattr(objectives, name, honest)
        if kinds:
            objectives.KINDS[loss] = kinds


@contextmanager
def _row(bench: Bench, injection: Injection) -> Iterator[None]:
    """One row of a loss is NaN or inf."""
    value, draw = injection.value(), injection.rng.random()
    images, output = [], {}
    injection.outcome = "bad_loss"
    watch = bench.model.register_forward_hook(lambda m, i, out: output.update(now=out[0]))
    contrast = bench.model.contrast

    def listening(rows: Tensor) -> Tensor:
        images[:] = _images_of(rows.detach(), output["now"].embeddings)
        return contrast(rows)

    def change(rows: Tensor, args: tuple) -> Tensor:
        place = int(draw * rows.numel())
        row, image = _where(injection.loss, place, args, output["now"], images, bench.batch)
        injection.expected.update(losses={injection.loss: {"rows": [row], "images": [bench.batch.image_ids[image]]}},
                                  module=None, parameter=None, cause="loss")  # fmt: skip
        return rows.flatten().index_fill(0, torch.tensor([place]), value).reshape(rows.shape)

    bench.model.contrast = listening
    try:
        with _patched(injection.loss, change):
            yield
    finally:
        del bench.model.contrast
        watch.remove()


def _where(loss: str, place: int, args: tuple, output: Any, projected: list[int], batch: Episode) -> tuple[int, int]:
    """(row of the report, image) of element `place` of a loss's rows, told from the values the loss was called with."""
    if loss == "cls":
        image = place // output.boxes.shape[1]  # [B, A]; the report's rows are the images
        return image, image
    if loss == "bbox":
        same = (batch.targets.boxes == args[1][place].detach()).all(-1).any(-1)
        return place, int(same.nonzero())
    if loss == "dfl":
        return place, _images_of(args[0][place : place + 1].detach().flatten(1), output.box_logits.flatten(2))[0]
    if loss == "cpe":
        return place, projected[int(cpe_rows(args[2], args[1], PHI)[place])]
    kept = rows_with_positive(args[1]) if loss == "supcon" else triplet_rows(args[1], len(args[4]))
    return place, _images_of(args[0][kept[place]].detach()[None], output.embeddings)[0]


def _images_of(rows: Tensor, everywhere: Tensor) -> list[int]:
    """The image in whose [B, A, D] each of [n, D] occurs."""
    return [int((everywhere == row).all(-1).any(-1).nonzero()[0]) for row in rows]


@contextmanager
def _parameter(bench: Bench, injection: Injection) -> Iterator[None]:
    """One element of one parameter's gradient is NaN, inf, or so large that the norm overflows."""
    name = injection.rng.choice(bench.parameters)
    parameter = dict(bench.model.named_parameters())[name]
    place, value = injection.rng.randrange(parameter.numel()), injection.rng.choice((math.nan, math.inf, -1e30))
    injection.outcome = "bad_grad"
    injection.expected.update(parameter=name, losses={}, module=None, gradient_of=[], cause="backward")

    def change(grad: Tensor) -> Tensor:
        return grad.flatten().index_fill(0, torch.tensor([place]), value).reshape(grad.shape)

    handle = parameter.register_hook(change)
    yield
    handle.remove()


@contextmanager
def _loss_gradient(bench: Bench, injection: Injection) -> Iterator[None]:
    """A finite loss with a row whose gradient is NaN: the square root of zero is added to it."""
    draw = injection.rng.random()
    injection.outcome = "bad_grad"
    injection.expected.update(losses={}, module=None, gradient_of=[injection.loss], cause="loss")

    def change(rows: Tensor, args: tuple) -> Tensor:
        one = torch.zeros(rows.numel()).index_fill(0, torch.tensor([int(draw * rows.numel())]), 1.0).reshape(rows.shape)
        return rows + one * ((rows - rows.detach()) * one).sum().sqrt()

    with _patched(injection.loss, change):
        yield


@contextmanager
def _module(bench: Bench, injection: Injection) -> Iterator[None]:
    """The output of a module is NaN or inf for one image."""
    name, image, value = injection.rng.choice(bench.modules), injection.rng.randrange(IMAGES), injection.value()
    module: nn.Module = bench.model.get_submodule(name)
    injection.outcome = "bad_loss"
    injection.expected.update(module=f"{name} ({type(module).__name__})",
                              module_images=[bench.batch.image_ids[image]], cause="data")  # fmt: skip

    def change(_: nn.Module, inputs: Any, output: Any) -> Any:
        if not _is_of_images(output):
            return output
        return output.index_fill(0, torch.tensor([image]), value)

    handle = module.register_forward_hook(change)
    yield
    handle.remove()
