# SPDX-License-Identifier: AGPL-3.0-or-later
"""Trainings that are killed, checkpoints whose bits flip, batches that are spoilt: what is left is what should be.

    python scripts/bench/kills.py kills --count 200    # SIGKILL at random moments, another number of workers each time
    python scripts/bench/kills.py flips --count 1000   # one bit of last.pt
    python scripts/bench/kills.py faults --count 1000  # NaN pixels, losses and gradients in every other batch

kills: small trainings of stages 1, 2 and 3 in turn, some of them struck while a checkpoint is being written, resumed
until they end, and compared with the undisturbed run to the last bit. flips: detected, and the file before it taken.
faults: no state that is saved holds a NaN, and the last metric is within two standard deviations of five clean runs.
Exit code 1 when anything is not so.
"""

import argparse
import logging
import mmap
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import torch

import fsdet  # noqa: F401  (environment switches)
import test_durability as small
from engine.test_trainer import same
from fsdet import config as configs
from fsdet import tasks
from fsdet.data.documents import draw_documents
from fsdet.data.synthetic import draw_demo
from fsdet.engine.checkpoint import Writer, candidates, first_non_finite, load, newest
from fsdet.errors import CheckpointError

ROOT = Path(__file__).resolve().parents[2]
LIVES = 6  # kills that one training survives before it is let to its end


def in_a_child(act: Callable[[], None], seconds: float | None, saving: mmap.mmap) -> tuple[bool, bool]:
    """Run `act` in a fork and kill it after `seconds`; (killed, while a checkpoint was being written)."""
    saving[0] = 0
    child = os.fork()
    if not child:
        os.setsid()
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        raise SystemExit(f"a training failed by itself with exit code {os.WEXITSTATUS(status)}")
    return os.WIFSIGNALED(status), bool(saving[0])


def marked(saving: mmap.mmap) -> None:
    """Let `saving` say in this process, and its children, whether a checkpoint is being written."""
    honest = Writer._write

    def write(self: Writer, *args: object) -> None:
        saving[0] = 1
        honest(self, *args)
        saving[0] = 0

    Writer._write = write


def kills(count: int, rng: random.Random) -> bool:
    saving = mmap.mmap(-1, 1)
    marked(saving)
    draw_demo("datasets/demo", sizes={"train": 48, "val": 4, "test": 4, "support": 24}, processes=1)
    whole, spent = {1: Path("one"), 2: Path("two"), 3: Path("three")}, {}
    for stage, folder in whole.items():
        began = time.monotonic()
        in_a_child(lambda stage=stage, folder=folder: small.straight(stage, folder), None, saving)
        spent[stage] = time.monotonic() - began
    struck = inside = broken = runs = 0
    while struck < count:
        stage, folder, runs = 1 + runs % 3, Path(f"run{runs}"), runs + 1
        for life in range(LIVES + 1):
            last = life == LIVES
            workers = f"data.workers={life % 3}"
            hit, during = in_a_child(
                lambda: small.straight(stage, folder, bool(candidates(folder)), workers),  # noqa: B023  (called at once)
                None if last else rng.uniform(0.15, 0.85) * spent[stage], saving)  # fmt: skip
            struck, inside = struck + hit, inside + (hit and during)
            if not hit:
                break
        broken += not exact(whole[stage], folder)
        shutil.rmtree(folder)
        if not runs % 10:
            print(f"... {struck} SIGKILLs, {inside} inside a save, {runs - broken} of {runs} exact", flush=True)
    print(f"kills    {struck} SIGKILLs over {runs} trainings, {inside} while a checkpoint was being written: "
          f"{runs - broken} of {runs} to the last bit")  # fmt: skip
    return not broken


def exact(whole: Path, folder: Path) -> bool:
    """Whether logs and checkpoints are those of the undisturbed run; what differs is printed."""
    wrong = [
        name for name in ("metrics.jsonl", "results.csv") if (whole / name).read_text() != (folder / name).read_text()
    ]
    for name in ("last.pt", "best.pt"):
        a, b = load(whole / name), load(folder / name)
        a.pop("config"), b.pop("config")  # their folders and workers
        wrong += [] if same(a, b) else [name]
    if wrong:
        print(f"kills    {folder}: {', '.join(wrong)} differ from {whole}")
    return not wrong


def flips(count: int, rng: random.Random) -> bool:
    draw_demo("datasets/demo", sizes={"train": 48, "val": 4, "test": 4, "support": 24}, processes=1)
    folder = Path("flipped")
    small.straight(1, folder)
    last = folder / "last.pt"
    before = load(candidates(folder)[2])  # last.pt and the newest of the ring are the same state
    (folder / f"step_{small.STEPS:08d}.pt").unlink()
    data, missed = bytearray(last.read_bytes()), 0
    for _ in range(count):
        place, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[place] ^= bit
        last.write_bytes(data)
        data[place] ^= bit
        try:
            path, state = newest(folder)
            missed += path == last or not same(state, before)
        except CheckpointError:
            missed += 1
    print(f"flips    {count - missed} of {count} bit flips were detected and the checkpoint before was taken")
    return not missed


def classifier(folder: Path, seed: int, data: Path, steps: int) -> configs.Config:
    keys = [f"data.path={data}", f"run.dir={folder}", f"run.seed={seed}", "run.threads=1", "run.precision=fp32",
            "data.image_size=64", "data.workers=0", "classifier.width=0.25", "optim.epochs=null",
            f"optim.steps={steps}", "eval.every=0", "log.wandb.mode=disabled", "log.every=1000000",
            "save.every_steps=100", "guard.max_rejected_in_row=100", "guard.max_rejected_share=1.0"]  # fmt: skip
    return configs.load(ROOT / "configs/demo/docuforge.yaml", keys)


def spoil(trainer, count: int, rng: random.Random) -> list[str]:
    """Every other batch is spoilt, `count` in all: a pixel, the loss or a gradient; what was done so far."""
    done: list[str] = []
    task, batch, losses = trainer.task, trainer.task.batch, trainer.task.losses
    weights = [p for members in task.param_groups().values() for _, p in members]

    def spoilt_batch(index: int):
        made = batch(index)
        if index % 2 and len(done) < count and rng.random() < 0.34:
            done.append("pixel")
            made.images[rng.randrange(len(made.images)), 0, 0, 0] = rng.choice([float("nan"), float("inf")])
            vars(made).pop("_finite", None)
        return made

    def spoilt_losses(made):
        report = losses(made)
        if made.index % 2 and len(done) < count and torch.is_grad_enabled() and made.images.isfinite().all():
            if rng.random() < 0.5:
                done.append("loss")
                report.total.data.mul_(float("nan"))
                report.raw["cls"].data.mul_(float("nan"))
            else:
                done.append("gradient")
                chosen = rng.choice(weights)
                handle = chosen.register_hook(lambda g: (handle.remove(), g * float("inf"))[1])
        return report

    task.batch, task.losses = spoilt_batch, spoilt_losses
    return done


def faults(count: int, rng: random.Random) -> bool:
    data, clean = draw_documents(Path("pages"), processes=1), []
    for seed in range(5):
        result = tasks.build(classifier(Path(f"clean{seed}"), seed, data, count)).fit()
        clean.append(result.metrics["val/auc"])
    trainer = tasks.build(classifier(Path("spoilt"), 5, data, count))
    done = spoil(trainer, count, rng)
    result = trainer.fit()
    unsound = [name for file in candidates(Path("spoilt")) if (name := first_non_finite(load(file)))]
    live = first_non_finite({k: v for k, v in trainer.state.take().items() if k in ("model", "ema", "optimizer")})
    mean, spread = statistics.fmean(clean), statistics.stdev(clean)
    found = result.metrics["val/auc"]
    kinds = ", ".join(f"{done.count(kind)} {kind}" for kind in sorted(set(done)))
    states = f"{len(unsound) + bool(live)} states with a NaN"
    print(f"faults   {len(done)} ({kinds}) in {result.steps} steps: {states}; val AUC "
          f"{found:.4f}, five clean runs {mean:.4f} with a standard deviation of {spread:.4f}")  # fmt: skip
    return not unsound and not live and found >= mean - 2 * spread


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "flips", "faults"))
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.getLogger("fsdet").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as tmp:
        os.chdir(tmp)
        try:
            fine = {"kills": kills, "flips": flips, "faults": faults}[args.what](args.count, random.Random(args.seed))
        finally:
            os.chdir(ROOT)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
