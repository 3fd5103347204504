# SPDX-License-Identifier: AGPL-3.0-or-later
"""Ten thousand small steps: memory, file descriptors, threads and logs of a run must not grow with its length.

    python scripts/bench/endurance.py                     # 10,000 steps, loader workers, saves, evaluations, rejections
    python scripts/bench/endurance.py --steps 100000 --workers 2

Prints RSS and descriptors over the run. Exit code 1 when either grew after the first fifth, or a log is too long.
"""

import argparse
import logging
import os
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import psutil
import torch

import fsdet  # noqa: F401  (environment switches)
from engine.test_step import spoiled
from engine.toy import ToyTask, trainer
from fsdet.config import Guard, Log, Save

ALLOWED_RSS, ALLOWED_FILES = 8 << 20, 2  # bytes, descriptors and threads more than after the first fifth
LINE = 1200  # bytes of a logged step in all text files together, at most
EPOCH = 500  # batches
REJECTED = 97  # every so many batches a loss is NaN
SAMPLES = 50  # measurements


@dataclass(frozen=True)
class Sample:
    """What the process holds at a step: bytes, open descriptors of it and its workers, threads of it."""

    step: int
    rss: int
    files: int
    threads: int


def endure(steps: int, workers: int, folder: Path, every: int = 10) -> tuple[list[Sample], int]:
    """Train; returns the samples and the bytes of all text logs."""
    process, samples = psutil.Process(), []

    def spoil(batch, report):
        if batch.index % max(1, steps // SAMPLES) == 0:
            samples.append(Sample(batch.index, process.memory_info().rss, process.num_fds(), process.num_threads()))
        return spoiled("bbox", float("nan"))(batch, report) if batch.index % REJECTED == REJECTED - 1 else report

    task = ToyTask(batches_per_epoch=min(EPOCH, max(1, steps // 4)), spoil=spoil)
    run = trainer(task, folder, changes={"epochs": steps / task.batches_per_epoch}, workers=workers,
                  guard=Guard(max_rejected_share=0.5), save=Save(every_steps=max(1, steps // 20)),
                  log=Log(every=every), eval_every=1)  # fmt: skip
    run.fit()
    texts = [*folder.glob("*.jsonl"), *folder.glob("*.log"), *folder.glob("*.csv")]
    return samples, sum(path.stat().st_size for path in texts)


def grown(samples: list[Sample]) -> list[str]:
    """What grew from after the first fifth to the last fifth, medians of both; empty when nothing did."""
    fifth = max(1, len(samples) // 5)
    out = []
    for name, allowed in (("rss", ALLOWED_RSS), ("files", ALLOWED_FILES), ("threads", ALLOWED_FILES)):
        early, late = (sorted(getattr(s, name) for s in part)[len(part) // 2]
                       for part in (samples[fifth : 2 * fifth], samples[-fifth:]))  # fmt: skip
        if late - early > allowed:
            out.append(f"{name} grew from {early:,} to {late:,}, {allowed:,} are allowed")
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("fsdet").setLevel(logging.ERROR)
    os.fsync = lambda handle: None  # waiting for the disk is not what this is about
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        samples, size = endure(args.steps, args.workers, Path(folder) / "run")
    for s in samples[:: max(1, len(samples) // 10)]:
        print(f"batch {s.step:7d}: {s.rss / 2**20:7.1f} MiB, {s.files} descriptors, {s.threads} threads")
    problems = grown(samples)
    logged = args.steps / 10 + args.steps / REJECTED
    if size > LINE * logged + 200_000:
        problems.append(f"logs are {size:,} bytes for {logged:.0f} logged steps")
    print(f"{args.steps} batches in {time.monotonic() - began:.0f} s, logs {size / 2**20:.2f} MiB")
    print("\n".join(problems) or "nothing grew")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
