# SPDX-License-Identifier: AGPL-3.0-or-later
"""What checkpoints cost a training: the loop's stall, the CPU time, the first step after a resume, the way to the disk.

    python scripts/bench/saving.py                 # yolov8n, 320 px, batch 4, one thread
    python scripts/bench/saving.py --steps 200

stall     how long the loop waits for one save, as a share of the median step
cost      CPU seconds of the loop's thread in a save over those of 50 steps; and of the thread that writes
resume    from Trainer(resume=True) to the first committed step, saved at 99 % and at 1 % of an epoch, in turns
signal    from SIGTERM until last.pt and the manifest are on the disk, beside the longest step before it
"""

import argparse
import logging
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import torch
from step import WEIGHTS, scene  # the file beside
from torch import nn

import fsdet  # noqa: F401  (environment switches)
from engine.toy import trainer
from fsdet.config import Save
from fsdet.engine.checkpoint import Writer
from fsdet.engine.saving import Saver
from fsdet.engine.step import StepController
from fsdet.errors import Stopped
from fsdet.models.build import build_model, model_spec
from fsdet.objective import MultiLoss

CLASSES, EPOCH, EVERY = 80, 1000, 50
LOSSES = ("bbox", "cls", "dfl", "supcon")


class Detector:
    """Stage 1 of yolov8n on four drawn batches; `EPOCH` batches make an epoch."""

    name, best_metric, batches_per_epoch = "bench", "val/score", EPOCH

    def __init__(self, size: int, batch: int) -> None:
        torch.manual_seed(0)
        self.model = build_model(model_spec("yolov8n", "P3-P5", CLASSES, 128, 16, "anchors", True, CLASSES))
        self.objective = MultiLoss({name: WEIGHTS[name] for name in LOSSES})
        self.scenes = [scene(batch, size, CLASSES, seed) for seed in range(4)]

    def param_groups(self) -> Mapping[str, Sequence[tuple[str, nn.Parameter]]]:
        return self.model.groups()

    def batch(self, index: int):
        return self.scenes[index % len(self.scenes)]

    def losses(self, batch):
        output, dense = self.model(batch)
        return self.objective(output, batch.targets, batch.class_ids, contrast=self.model.contrast,
                              probe_at=dense.features, image_ids=batch.image_ids)  # fmt: skip

    def expected_initial(self, report) -> Mapping[str, float]:
        return {}

    def evaluate(self, model: nn.Module) -> Mapping[str, float]:
        return {"val/score": 0.0}

    def illustrate(self, model: nn.Module, folder: Path, step: int) -> Sequence[Path]:
        return []

    def describe(self) -> Mapping[str, Any]:
        return {"task": self.name}


class Watch:
    """Wall and thread seconds of every call of a method, while the context lasts."""

    def __init__(self, owner: type, name: str) -> None:
        self.owner, self.name, self.honest = owner, name, getattr(owner, name)
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def __enter__(self) -> "Watch":
        def timed(this: object, *args: object, **options: object) -> object:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                return self.honest(this, *args, **options)
            finally:
                self.wall.append(time.perf_counter() - wall)
                self.cpu.append(time.thread_time() - cpu)

        setattr(self.owner, self.name, timed)
        return self

    def __exit__(self, *_: object) -> None:
        setattr(self.owner, self.name, self.honest)


def made(folder: Path, args: argparse.Namespace, steps: int, *, every: int = 0, resume: bool = False):
    """A Trainer of the detector in `folder`."""
    changes = {"steps": steps, "epochs": None, "lr": 1e-3, "warmup_epochs": 0.0}
    return trainer(Detector(args.size, args.batch), folder, changes=changes, save=Save(every_steps=every),
                   eval_every=0, resume=resume)  # fmt: skip


def stall_and_cost(folder: Path, args: argparse.Namespace) -> None:
    with Watch(Saver, "save") as saves, Watch(Writer, "_write") as writes, Watch(StepController, "run") as steps:
        made(folder, args, args.steps, every=10).fit()
    kept = saves.wall[1:-1]  # the last one waits, being the end
    print(f"stall     {len(kept)} saves: {1000 * median(kept):.1f} ms, most {1000 * max(kept):.1f}; a step "
          f"{1000 * median(steps.wall):.1f} ms: {median(kept) / median(steps.wall):.3f} of a step, most "
          f"{max(kept) / median(steps.wall):.3f}")  # fmt: skip
    loop, thread = (100 * median(w.cpu[1:-1]) / (EVERY * median(steps.cpu)) for w in (saves, writes))
    print(f"cost      saving every {EVERY} steps: {loop:.3f} % of the CPU time of the loop's steps; the writing "
          f"thread {thread:.2f} %")  # fmt: skip


def resume(folder: Path, args: argparse.Namespace) -> None:
    places = {"1 %": EPOCH // 100, "99 %": 99 * EPOCH // 100}
    for name, at in places.items():
        run = made(folder / name, args, at)
        run.position.batch, run.controller.step = at, at  # there without the way to it
        run.saver.save(wait=True)
    spent: dict[str, list[float]] = {name: [] for name in places}
    for n in range(args.resumes):
        for name in sorted(places, reverse=bool(n % 2)):
            copy = folder / f"{name} {n}"
            copy.mkdir()
            for file in (folder / name).iterdir():
                if file.is_file():
                    (copy / file.name).write_bytes(file.read_bytes())
            began = time.perf_counter()
            run = made(copy, args, places[name] + 1, resume=True)
            with Watch(StepController, "run") as steps:
                run.saver.writer.save = lambda *a, **k: None
                run.fit()
            spent[name].append(time.perf_counter() - began)
            assert len(steps.wall) == 1
    ratio = median(b / a for a, b in zip(spent["1 %"], spent["99 %"], strict=True))
    print(f"resume    to the end of the first step: {median(spent['99 %']):.2f} s at 99 % of an epoch, "
          f"{median(spent['1 %']):.2f} s at 1 %, ratio median {ratio:.3f} of {args.resumes} pairs")  # fmt: skip


def signalled(folder: Path, args: argparse.Namespace) -> None:
    """SIGTERM from a thread in the middle of a step."""
    run, sent = made(folder, args, 10_000), []

    def strike() -> None:
        time.sleep(0.4 * median(steps.wall or [0.5]))
        sent.append(time.time())
        os.kill(os.getpid(), signal.SIGTERM)

    with Watch(StepController, "run") as steps:
        threading.Timer(5.0, strike).start()
        try:
            run.fit()
        except Stopped:
            pass
    durable = max((folder / name).stat().st_mtime for name in ("last.pt", "manifest.json"))
    print(f"signal    durable {durable - sent[0]:.2f} s after SIGTERM; the longest step {max(steps.wall):.2f} s")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--resumes", type=int, default=9)
    args = parser.parse_args(argv)
    logging.getLogger("fsdet").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as tmp:
        for n, part in enumerate((stall_and_cost, resume, signalled)):
            (home := Path(tmp) / str(n)).mkdir()
            part(home, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
