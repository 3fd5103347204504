# SPDX-License-Identifier: AGPL-3.0-or-later
"""What it costs to look: the first-batch probe of six losses, and the full report of a rejected step, in steps.

Interleaved in one process on the same detector and images, process time, so that other load drops out of the ratio. A
rejected step counts whole: its own forward and backward, the replay in float32 with hooks, report.json and batch.pt.

    python scripts/bench/forensics.py --pairs 30 --size 320 --batch 4 --threads 1
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from step import WEIGHTS, Ours, scene, seconds

from fsdet.config import Guard
from fsdet.engine import probe
from fsdet.engine.guard import StepGuard
from fsdet.types import Episode


class Looking(Ours):
    """Ours, with a probe on every step, or with a fault in every step and its incident written."""

    fault: Callable | None = None
    probing = False

    def step(self, batch: Episode) -> None:
        report = self.control.run(
            [batch], lr_factor=1.0, clip_norm=10.0, observe=probe.measure if self.probing else None
        )
        if report.committed == (self.fault is not None):
            raise SystemExit(f"expected a {'rejected' if self.fault else 'committed'} step: {report}")
        if self.fault is not None:
            guard = StepGuard(Guard(), Path(tempfile.mkdtemp()))
            if guard.record(report, [batch], 0, 1) is None:
                raise SystemExit("no incident was written")


def loss_fault(looking: Looking) -> Callable[[], None]:
    """The first weighted loss is NaN."""
    honest = type(looking).losses

    def losses(batch: Episode):
        report = honest(looking, batch)
        first = next(iter(report.raw))
        report.weighted[first] = report.weighted[first] * torch.nan
        object.__setattr__(report, "total", sum(report.weighted.values()))
        return report

    looking.losses = losses
    return lambda: delattr(looking, "losses")


def gradient_fault(looking: Looking) -> Callable[[], None]:
    """All losses are finite and the gradient that they send is not, so that each loss is asked on its own."""
    honest = type(looking).losses

    def losses(batch: Episode):
        report = honest(looking, batch)
        first = next(iter(report.raw))
        loss = report.weighted[first]
        report.weighted[first] = loss + (loss - loss.detach()).sqrt()
        object.__setattr__(report, "total", sum(report.weighted.values()))
        return report

    looking.losses = losses
    return lambda: delattr(looking, "losses")


def module_fault(looking: Looking) -> Callable[[], None]:
    """The output of the first convolution is NaN."""
    first = next(m for m in looking.model.modules() if isinstance(m, torch.nn.Conv2d))
    return first.register_forward_hook(lambda m, i, out: out * torch.nan).remove


FAULTS = {"probe of six losses": None, "rejected: a loss": loss_fault, "rejected: a gradient": gradient_fault,
          "rejected: a module's output": module_fault}  # fmt: skip


def one(looking: Looking, batch: Episode, name: str, device: str) -> float:
    """Seconds of one step of that kind."""
    looking.fault, looking.probing = FAULTS[name], FAULTS[name] is None
    undo = looking.fault(looking) if looking.fault else lambda: None
    spent = seconds(looking, batch, device)
    undo()
    looking.fault, looking.probing = None, False
    return spent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--backbone", default="yolov8n")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="what begins with this: probe, rejected")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    args = parser.parse_args()
    args.losses = list(WEIGHTS)
    torch.set_num_threads(args.threads)
    looking = Looking(args)
    batches = [scene(args.batch, args.size, args.classes, seed).to(torch.device(args.device)) for seed in range(4)]
    ratios: dict[str, list[float]] = {name: [] for name in FAULTS if name.startswith(args.only)}
    for i in range(args.pairs + 2):
        for name, found in ratios.items():
            batch = batches[i % 4]
            looked = one(looking, batch, name, args.device) if i % 2 else None
            plain = seconds(looking, batch, args.device)
            looked = looked or one(looking, batch, name, args.device)
            if i >= 2:
                found.append(looked / plain)
    print(f"{args.backbone} {args.size} px batch {args.batch} {args.precision} {args.device}, {args.threads} threads, "
          f"{args.pairs} pairs each, in steps of six losses")  # fmt: skip
    for name, found in ratios.items():
        boot = np.random.default_rng(0).choice(found, (2000, len(found)))
        low, high = np.quantile(np.median(boot, 1), (0.025, 0.975))
        print(f"{name:<28}{np.median(found):.2f} (95 % {low:.2f} to {high:.2f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
