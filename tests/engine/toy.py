# SPDX-License-Identifier: AGPL-3.0-or-later
"""A Task of a few hundred parameters: convolution, BatchNorm, two losses, batches made from their index."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fsdet.config import Guard, Log, Optim, Run, Save
from fsdet.engine.trainer import Trainer
from fsdet.types import LossReport


@dataclass(frozen=True, eq=False)
class ToyBatch:
    """pixels [B, 3, 8, 8], answer [B], or [0] for a batch in which nothing is labelled."""

    index: int
    pixels: Tensor
    answer: Tensor
    image_ids: tuple[str, ...]

    def to(self, device: torch.device) -> "ToyBatch":
        return replace(self, pixels=self.pixels.to(device), answer=self.answer.to(device))

    def finite(self) -> bool:
        return bool(self.pixels.sum().isfinite())


class ToyObjective(nn.Module):
    """A running mean that moves in the forward, as WIoU's would; `committed` and `discarded` count how steps ended."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))
        self.committed = self.discarded = 0

    def commit(self) -> None:
        self.committed += 1

    def discard(self) -> None:
        self.discarded += 1


@dataclass
class ToyTask:
    """`tamper` may change a batch before it is used; `spoil` a report before it is returned."""

    batches_per_epoch: int = 5
    seed: int = 0
    rows: int = 4
    norm: bool = True
    tamper: Callable[[ToyBatch], ToyBatch] | None = None
    spoil: Callable[[ToyBatch, LossReport], LossReport] | None = None
    scores: Sequence[float] = ()
    name: str = "toy"
    best_metric: str = "val/score"
    evaluated: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.model = nn.Sequential()
        self.model.add_module("backbone", nn.Sequential(stem, nn.BatchNorm2d(4) if self.norm else nn.Identity()))
        self.model.add_module("drop", nn.Dropout(0.1 if self.norm else 0.0))
        self.model.add_module("head", nn.Linear(4, 1))
        self.objective = ToyObjective()

    def param_groups(self) -> Mapping[str, Sequence[tuple[str, nn.Parameter]]]:
        named = list(self.model.named_parameters())
        return {g: [(n, p) for n, p in named if n.startswith(g)] for g in ("backbone", "head")}

    def batch(self, index: int) -> ToyBatch:
        g = torch.Generator().manual_seed(1000 * self.seed + index)
        pixels, answer = torch.randn(self.rows, 3, 8, 8, generator=g), torch.randn(self.rows, generator=g)
        batch = ToyBatch(index, pixels, answer, tuple(f"image_{index}_{i}" for i in range(self.rows)))
        return self.tamper(batch) if self.tamper else batch

    def losses(self, batch: ToyBatch) -> LossReport:
        features = self.model.drop(self.model.backbone(batch.pixels)).relu()
        pooled = features.mean((2, 3))
        guess = self.model.head(pooled).squeeze(-1).float()
        rows = len(batch.answer)
        error = (guess[:rows] - batch.answer) ** 2
        count = torch.tensor(float(max(1, rows)))
        self.objective.mean.lerp_(error.detach().sum() / count, 0.1)
        raw = {"bbox": error.sum() / count, "cls": pooled[:rows].float().abs().sum() / count}
        weighted = {"bbox": 2.0 * raw["bbox"], "cls": 0.5 * raw["cls"]}
        report = LossReport(sum(weighted.values()), raw, weighted, {"bbox": len(error), "cls": len(error)}, len(error),
                            count, {"bbox": error.detach()}, {"bbox": torch.arange(len(error))}, (features,),
                            batch.image_ids)  # fmt: skip
        return self.spoil(batch, report) if self.spoil else report

    def expected_initial(self, report: LossReport) -> Mapping[str, float]:
        return {"bbox": 1.0}

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        torch.rand(3)  # a validation that draws must not move training
        self.evaluated.append(1)
        if len(self.evaluated) <= len(self.scores):
            return {"val/score": self.scores[len(self.evaluated) - 1]}
        return {"val/score": -float(next(model.parameters()).float().norm())}

    def illustrate(self, model: nn.Module, folder: Path, step: int) -> Sequence[Path]:
        return []

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "toy", "rows": self.rows}


def optim(**changes: Any) -> Optim:
    """Two epochs of SGD at once."""
    return Optim(**{"lr": 0.05, "epochs": 2, "warmup_epochs": 0.4, "ema_warmup": 5, "ema": 0.9, **changes})


def trainer(task: ToyTask, folder: Path, *, changes: Mapping[str, Any] | None = None, guard: Guard | None = None,
            save: Save | None = None, log: Log | None = None, precision: str = "fp32", workers: int = 0,
            eval_every: float = 1, **more: Any) -> Trainer:  # fmt: skip
    """A Trainer on the CPU with small defaults."""
    return Trainer(task, run=Run(device="cpu", precision=precision, threads=1), optim=optim(**(changes or {})),
                   guard=guard or Guard(), save=save or Save(), log=log or Log(every=1), workers=workers,
                   eval_every=eval_every, folder=folder, **{"resolved": {"task": "toy"}, **more})  # fmt: skip
