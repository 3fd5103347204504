# SPDX-License-Identifier: AGPL-3.0-or-later
"""One stage-1 step of ours against Ultralytics' own, interleaved in one process, on the same images and targets.

Ours: dual head, the losses given by --losses, guards, EMA, a row in metrics.jsonl. Theirs: DetectionModel,
v8DetectionLoss, clip, SGD, EMA. `--against plain` is our own model, losses, clip, SGD and EMA without guards and row;
`--against apart` freezes BatchNorm in both, as stages 2 and 3 do, and leaves it outside the convolutions in the other.
Both count process time of one step, so that other load on the machine drops out of the ratio; on a GPU, wall time
from pinned batches on the host to the end of the step's kernels.

    python scripts/bench/step.py --pairs 100 --size 320 --batch 4 --threads 1
    python scripts/bench/step.py --pairs 200 --against plain
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import fsdet  # noqa: F401  (environment switches, before torch)
from fsdet.config import Guard, Optim
from fsdet.engine.ema import Ema
from fsdet.engine.guard import StepGuard
from fsdet.engine.optimizer import autocast, build_optimizer
from fsdet.engine.records import Records
from fsdet.engine.step import StepController
from fsdet.models.backbone import ConvBlock
from fsdet.models.build import build_model, model_spec
from fsdet.objective import MultiLoss
from fsdet.types import Episode, Targets

WEIGHTS = {"bbox": 7.5, "cls": 0.5, "dfl": 1.5, "supcon": 0.5, "cpe": 0.3, "triplet": 0.3}
BOXES = 5


def scene(batch: int, size: int, classes: int, seed: int) -> Episode:
    """Random images and boxes."""
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, BOXES, 2, generator=g) * 0.6 * size
    boxes = torch.cat((corner, corner + (0.1 + 0.25 * torch.rand(batch, BOXES, 2, generator=g)) * size), -1)
    labels = torch.randint(classes, (batch, BOXES), generator=g)
    known = torch.ones(batch, classes, dtype=torch.bool)
    targets = Targets(boxes, labels, torch.full_like(labels, -1), torch.ones_like(labels, dtype=torch.bool), known,
                      known[:, :0])  # fmt: skip
    none = torch.zeros(0, dtype=torch.long)
    return Episode(seed, torch.rand(batch, 3, size, size, generator=g), targets, torch.zeros(0, 3, 32, 32),
                   torch.zeros(0, 4), none, none, tuple(f"scene {seed}/{i}" for i in range(batch)))  # fmt: skip


class Ours:
    """The engine's step on the dual-head detector."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        self.name, self.backbone = "bench", args.backbone
        spec = model_spec(args.backbone, "P3-P5", args.classes, 128, 16, "anchors", True, args.classes)
        self.model = build_model(spec).to(args.device, memory_format=torch.channels_last).train()
        self.objective = MultiLoss({n: WEIGHTS[n] for n in args.losses}).to(args.device)
        self.device, self.precision = torch.device(args.device), args.precision
        if args.against == "apart":
            for norm in self.model.modules():
                if isinstance(norm, torch.nn.BatchNorm2d):
                    norm.eval()
        self.optimizer, self.ema = build_optimizer(self.param_groups(), Optim(lr=1e-3)), Ema(self.model, 0.9999, 2000)
        self.open(args)

    def open(self, args: argparse.Namespace) -> None:
        """What guards a step and remembers it."""
        folder = Path(tempfile.mkdtemp())
        self.control = StepController(self, self.optimizer, device=self.device, precision=self.precision,
                                      guard=Guard(), ema=self.ema)  # fmt: skip
        self.guard, self.records = StepGuard(Guard(), folder), Records(folder)
        self.records.open()

    def param_groups(self):
        return self.model.groups()

    def losses(self, batch: Episode):
        output, dense = self.model(batch)
        return self.objective(output, batch.targets, batch.class_ids, contrast=self.model.contrast,
                              probe_at=dense.features, image_ids=batch.image_ids)  # fmt: skip

    def step(self, batch: Episode) -> None:
        report = self.control.run([batch], lr_factor=1.0, clip_norm=10.0)
        if not report.committed:
            raise SystemExit(f"our step was rejected: {report}")
        self.guard.see(report, warm=True)
        self.records.step(report, 1, report.step, 10.0)


class Plain(Ours):
    """The same training without its guards: forward, backward, clip, step, EMA."""

    def open(self, args: argparse.Namespace) -> None:
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")

    def step(self, batch: Episode) -> None:
        with autocast(self.device, self.precision):
            report = self.losses(batch.to(self.device))
        self.scaler.scale(report.total).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=10.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.model)
        self.objective.commit()


class Apart(Ours):
    """The same step with Ultralytics' own blocks, in which a frozen BatchNorm is a pass of its own."""

    def __init__(self, args: argparse.Namespace) -> None:
        from ultralytics.nn.modules import Conv

        super().__init__(args)
        for block in self.model.modules():
            if isinstance(block, ConvBlock):
                block.__class__ = Conv


class Theirs:
    """Ultralytics' step, from its own parts."""

    def __init__(self, args: argparse.Namespace) -> None:
        from ultralytics.nn.tasks import DetectionModel
        from ultralytics.utils.torch_utils import ModelEMA

        torch.manual_seed(0)
        self.model = DetectionModel(f"{args.backbone}.yaml", nc=args.classes, verbose=False).to(args.device).train()
        self.model.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5, overlap_mask=True)
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.SGD([{"params": decay, "weight_decay": 5e-4}, {"params": rest}], lr=1e-3,
                                         momentum=0.9, nesterov=True)  # fmt: skip
        self.ema = ModelEMA(self.model)
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
        self.precision, self.device = args.precision, args.device

    def step(self, batch: Episode) -> None:
        batch, size = batch.to(torch.device(self.device)), batch.query.shape[-1]
        boxes = batch.targets.boxes.flatten(0, 1) / size
        xywh = torch.cat(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), 1)
        labels = batch.targets.base_labels.flatten().float()
        index = torch.arange(len(batch.query), device=labels.device).repeat_interleave(BOXES).float()
        batch_dict = {"img": batch.query, "batch_idx": index, "cls": labels[:, None], "bboxes": xywh}
        dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self.precision)
        with torch.autocast(self.device, dtype, enabled=dtype is not None):
            loss, _ = self.model(batch_dict)
        self.scaler.scale(loss.sum()).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=10.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.ema.update(self.model)


def seconds(stepper: Ours | Theirs, batch: Episode, device: str) -> float:
    """Cost of one step: process time on the CPU, wall time with a sync on a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    stepper.step(batch)
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--backbone", default="yolov8n")
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--against", default="theirs", choices=("theirs", "plain", "apart"))
    parser.add_argument("--losses", nargs="+", default=["bbox", "cls", "dfl", "supcon"], choices=sorted(WEIGHTS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ours, theirs = Ours(args), {"theirs": Theirs, "plain": Plain, "apart": Apart}[args.against](args)
    batches = [scene(args.batch, args.size, args.classes, seed) for seed in range(4)]
    if args.device != "cpu":
        batches = [batch.pin_memory() for batch in batches]
    rows = []
    for i in range(args.pairs + 3):
        batch = batches[i % 4]
        order = (ours, theirs) if i % 2 else (theirs, ours)
        spent = {s: seconds(s, batch, args.device) for s in order}
        rows.append((spent[ours], spent[theirs]))
    rows = np.array(rows[3:])
    ratio = rows[:, 0] / rows[:, 1]
    boot = np.random.default_rng(0).choice(ratio, (2000, len(ratio)))
    low, high = np.quantile(np.median(boot, 1), (0.025, 0.975))
    print(f"{args.backbone} {args.size} px batch {args.batch} {args.precision} {args.device}, {args.threads} threads, "
          f"{len(rows)} pairs, losses {' '.join(args.losses)}")  # fmt: skip
    print(f"ours {1000 * np.median(rows[:, 0]):.1f} ms, {args.against} {1000 * np.median(rows[:, 1]):.1f} ms, "
          f"ratio median {np.median(ratio):.3f} (95 % {low:.3f} to {high:.3f})")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
