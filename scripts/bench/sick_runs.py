# SPDX-License-Identifier: AGPL-3.0-or-later
"""Records the runs that `fsdet doctor` is tested with: tiny real trainings, each with one fault injected.

Every run is yolov8n at 64 px on drawn squares, discs and crosses, a minute on one thread. What is kept of a run is
what the doctor reads: metrics.jsonl, training_debug.log, config.yaml, manifest.json and the reports of two incidents.

    OMP_NUM_THREADS=1 python scripts/bench/sick_runs.py --out tests/corpus
    OMP_NUM_THREADS=1 python scripts/bench/sick_runs.py --out tests/corpus --only dead_dfl cpe_zero
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from fsdet import config, objective, tasks
from fsdet.engine.trainer import Trainer
from fsdet.errors import RunFailed

NAMES = ("square", "disc", "cross", "ring")
COLOURS = ((220, 60, 50), (60, 180, 75), (70, 90, 220), (230, 200, 40))
SIZE, BASE = 64, 3  # px; the last class is novel
COUNTS = {"train": 96, "val": 24, "support": 12}
KEPT = ("metrics.jsonl", "training_debug.log", "config.yaml", "manifest.json")
INCIDENTS, LOG_LINES = 2, 40  # reports and last lines of the log that are kept
COMMON = ["data.path=shapes/data.yaml", f"data.image_size={SIZE}", "data.support_size=32", "data.workers=0",
          "data.augment.mosaic=0", "run.threads=1", "run.precision=fp32", "model.embed_dim=16", "episode.queries=8",
          "episode.per_epoch=30", "optim.steps=120", "optim.name=sgd", "optim.lr=1e-2",
          "optim.min_lr=1e-3", "optim.clip_norm=15", "optim.warmup_epochs=0.5",
          "optim.ema=0.9", "optim.ema_warmup=10", "loss.bbox=wiou_v3",
          "loss.weights.supcon=0.1", "log.every=5", "log.debug=true", "eval.every=1",
          "guard.max_rewinds=0"]  # fmt: skip
WIDE = "neck.11"  # the module whose half-precision output is spoilt
Inject = Callable[[Trainer], None]


def draw(root: Path) -> None:
    """The data set: one to three shapes an image on noise, a colour and a form a class."""
    rng = np.random.default_rng(0)
    for split, count in COUNTS.items():
        document: dict[str, list] = {"images": [], "annotations": [], "categories": []}
        document["categories"] = [{"id": i, "name": name} for i, name in enumerate(NAMES)]
        (root / split).mkdir(parents=True)
        for number in range(count):
            canvas = Image.fromarray(rng.integers(90, 150, (SIZE, SIZE, 3), np.uint8))
            document["images"].append({"id": number, "file_name": f"{split}/{number:03d}.png", "height": SIZE,
                                       "width": SIZE})  # fmt: skip
            for _ in range(int(rng.integers(1, 4))):
                label = int(rng.integers(len(NAMES) if split == "support" else BASE))
                x, y, side = *rng.integers(0, SIZE - 26, 2).tolist(), int(rng.integers(14, 26))
                shape(ImageDraw.Draw(canvas), label, x, y, side)
                document["annotations"].append({"id": len(document["annotations"]), "image_id": number, "iscrowd": 0,
                                                "category_id": label, "bbox": [x, y, side, side]})  # fmt: skip
            canvas.save(root / split / f"{number:03d}.png")
        (root / f"{split}.json").write_text(json.dumps(document), encoding="utf-8")
    lines = [*(f"{split}: {split}.json" for split in COUNTS), f"base: [{', '.join(NAMES[:BASE])}]", "novel: [ring]"]
    (root / "data.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def shape(pen: ImageDraw.ImageDraw, label: int, x: int, y: int, side: int) -> None:
    box, third = (x, y, x + side - 1, y + side - 1), side // 3
    if label == 0:
        pen.rectangle(box, fill=COLOURS[0])
    elif label == 1:
        pen.ellipse(box, fill=COLOURS[1])
    elif label == 2:
        pen.rectangle((x + third, y, x + side - 1 - third, y + side - 1), fill=COLOURS[2])
        pen.rectangle((x, y + third, x + side - 1, y + side - 1 - third), fill=COLOURS[2])
    else:
        pen.ellipse(box, outline=COLOURS[3], width=3)


@dataclass(frozen=True)
class Run:
    """A run of the corpus: its overrides, and what is done to the trainer before it starts."""

    overrides: tuple[str, ...] = ()
    inject: Inject = lambda trainer: None


def at_step(trainer: Trainer, step: int, change: Callable[[], None]) -> None:
    """Call `change` once, before the forward of `step`."""
    losses, done = trainer.task.losses, []

    def changed(batch: Any) -> Any:
        if trainer.controller.step >= step and not done:
            done.append(True)
            change()
        return losses(batch)

    trainer.task.losses = changed


def relabel(change: Callable[[np.ndarray], np.ndarray]) -> Inject:
    """Other classes on the training images' boxes than the images show."""

    def inject(trainer: Trainer) -> None:
        store = trainer.task.batches.store
        store.records[:] = [replace(r, labels=change(r.labels)) for r in store.records]

    return inject


def clamped_dfl(trainer: Trainer) -> None:
    """The sum over four sides, held below 8 against explosions: it starts at 4 ln 16 = 11.09, so nothing moves it."""
    whole = objective.dfl_loss
    objective.dfl_loss = lambda logits, distance: (4 * whole(logits, distance)).clamp(max=8.0)


def far_boxes(trainer: Trainer) -> None:
    """A box branch that is sure of the farthest bin: no box overlaps anything, so no anchor weighs anything."""
    with torch.no_grad():
        for level in trainer.task.model.head.box:
            level[-1].bias.view(4, -1)[:, -1] = 60.0


def in_half(name: str, change: Callable[[torch.Tensor], torch.Tensor], step: int) -> Inject:
    """Change a module's output from `step` on where it is half precision; float32 sees nothing of it."""

    def inject(trainer: Trainer) -> None:
        def hook(module: torch.nn.Module, inputs: Any, out: torch.Tensor) -> torch.Tensor:
            return change(out) if out.dtype == torch.float16 and trainer.controller.step >= step else out

        dict(trainer.task.model.named_modules())[name].register_forward_hook(hook)

    return inject


def infinite_gradient(out: torch.Tensor) -> torch.Tensor:
    if out.requires_grad:
        out.register_hook(lambda g: g * float("inf"))
    return out


def nan_weight(step: int) -> Inject:
    """One weight of the head becomes NaN before `step`."""

    def inject(trainer: Trainer) -> None:
        weight = trainer.task.param_groups()["head"][0][1]
        at_step(trainer, step, lambda: weight.data.view(-1)[:1].fill_(float("nan")))

    return inject


def shaken(trainer: Trainer) -> None:
    """Noise on the head's weights at step 80, as a careless surgery or a wrong checkpoint would bring."""

    def change() -> None:
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, p in trainer.task.param_groups()["head"]:
                p += 3 * p.std() * torch.randn(p.shape, generator=g) if p.ndim > 1 else 0

    at_step(trainer, 80, change)


def bad_image(trainer: Trainer) -> None:
    """One image whose pixels make its loss NaN, whenever it comes: a row that is not a number in its label."""
    losses = trainer.task.losses
    wanted = trainer.task.batches.store.records[17].image_id

    def spoilt(batch: Any) -> Any:
        if trainer.controller.step > 12 and wanted in batch.image_ids:
            query = batch.query.clone()
            query[batch.image_ids.index(wanted)] *= 1e38
            batch = replace(batch, query=query)
        return losses(batch)

    trainer.task.losses = spoilt


def poisoned_norm(trainer: Trainer) -> None:
    """One running variance far off from step 96 on, as after a forward of inf that was skipped and not undone."""
    norms = (m for m in trainer.task.model.modules() if isinstance(m, torch.nn.BatchNorm2d))

    def change() -> None:
        next(norms).running_var.fill_(1e12)

    at_step(trainer, 96, change)


SHORT = ("optim.steps=45", "log.every=2")
RUNS = {
    "healthy": Run(),
    "episodes_from_scratch": Run(("stage.name=episodic", "episode.ways=2", "episode.shots=2", "loss.weights.cpe=0.1",
                             "loss.weights.triplet=0.1", "loss.cpe_iou=0.5")),
    "lr_too_high": Run(("optim.lr=3", "optim.steps=75")),
    "lr_explodes": Run(("optim.lr=1e5", "optim.clip_norm=0", "optim.warmup_epochs=0")),
    "lr_too_low": Run((*SHORT, "optim.lr=1e-7", "optim.min_lr=0")),
    "label_slip": Run(("optim.steps=180",), relabel(lambda labels: (labels + 1) % BASE)),
    "fp16_overflow": Run(("run.precision=fp16",), in_half(WIDE, lambda out: out * 3e4, 50)),
    "scale_collapse": Run(("run.precision=fp16",), in_half(WIDE, infinite_gradient, 40)),
    "over_clipping": Run((*SHORT, "optim.clip_norm=0.02")),
    "dead_dfl": Run(SHORT, clamped_dfl),
    "collapsed_boxes": Run(SHORT, far_boxes),
    "cpe_zero": Run((*SHORT, "loss.weights.cpe=0.5", "loss.cpe_iou=1.0")),
    "frozen_head": Run((*SHORT, "stage.freeze=[head]")),
    "all_frozen": Run(("stage.freeze=[backbone,neck,head,support]",)),
    "loss_jump": Run((), shaken),
    "nan_at_start": Run((), nan_weight(0)),
    "nan_late": Run((), nan_weight(75)),
    "nan_sometimes": Run(SHORT, bad_image),
    "poisoned_norm": Run(("eval.every=0.5",), poisoned_norm),
}  # fmt: skip


def record(name: str, out: Path) -> str:
    """Train one run in the working folder and keep what the doctor reads; how it ended."""
    run, dfl = RUNS[name], objective.dfl_loss
    settings = config.load(None, [*COMMON, *run.overrides, f"run.dir={name}"])
    ended = "finished"
    try:
        trainer = tasks.build(settings, exist_ok=True)
        run.inject(trainer)
        trainer.fit()
    except RunFailed as error:
        ended = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    finally:
        objective.dfl_loss = dfl
    kept = out / name
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for file in KEPT:
        if (source := Path(name) / file).is_file():
            keep(source, kept / file)
    for report in sorted((Path(name) / "incidents").glob("*/report.json"))[:INCIDENTS]:
        keep(report, kept / "incidents" / report.parent.name / report.name)
    return ended


def keep(source: Path, to: Path) -> None:
    """A copy that knows no folder of this machine; of a log its end."""
    text = source.read_text(encoding="utf-8").replace(f"{Path.cwd()}/", "").replace(sys.executable, "python")
    lines = text.splitlines(keepends=True)
    to.parent.mkdir(parents=True, exist_ok=True)
    to.write_text("".join(lines[-LOG_LINES:] if source.suffix == ".log" else lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RUN")
    args = parser.parse_args()
    out = args.out.resolve()
    with tempfile.TemporaryDirectory() as work:
        os.chdir(work)
        draw(Path("shapes"))
        for name in args.only:
            print(f"{name}: {record(name, out)}", flush=True)


if __name__ == "__main__":
    main()
