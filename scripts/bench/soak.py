# SPDX-License-Identifier: AGPL-3.0-or-later
"""The step under thousands of drawn events, and hundreds of drawn faults that its reports must name.

    python scripts/bench/soak.py                        # 10,000 sequences of events, and what they broke
    python scripts/bench/soak.py --injections 600       # six losses x 100 places in a real detector
    python scripts/bench/soak.py --backoffs 1000        # fp16 looking for its scale, without one false alarm
    python scripts/bench/soak.py --minutes 5            # any of them, as many as fit into that time

The machines are those of the tests (tests/engine/machine.py, tests/tasks/injection.py). Exit code 1 when anything
broke.
"""

import argparse
import logging
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import torch

import fsdet  # noqa: F401  (environment switches)
from engine import machine
from tasks import injection

SHOWN = 10  # failures printed


def sequences(count: int, seed: int) -> Iterator[tuple[str, str | None]]:
    """(kind, what broke) of each drawn sequence of events."""
    os.fsync = lambda handle: None  # waiting for the disk is not what this is about
    logging.getLogger("fsdet").setLevel(logging.CRITICAL)
    rng = random.Random(seed)
    for _ in range(count):
        drawn = machine.draw(rng)
        try:
            machine.check(drawn)
        except Exception as error:  # whatever it is, it is a finding
            yield drawn.precision, f"{type(error).__name__}: {error}"
        else:
            yield drawn.precision, None


def injections(count: int, seed: int) -> Iterator[tuple[str, str | None]]:
    """(kind, what was misnamed) of each fault; the losses and places take turns, the rest is drawn."""
    bench = injection.Bench()
    for fault in injection.faults(count, seed):
        yield f"{fault.place} of {fault.loss}", injection.misnamed(fault, injection.strike(bench, fault))


def backoffs(count: int, seed: int) -> Iterator[tuple[str, str | None]]:
    """(outcome, false alarm) of each step of fp16 whose scale grows after every step, up to `count` overflows."""
    for report, alarm in machine.climb(count, seed):
        yield report.outcome, alarm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=10_000)
    parser.add_argument("--injections", type=int, default=0)
    parser.add_argument("--backoffs", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0, help="stop then; 0: at the end")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.injections:
        run = injections(args.injections, args.seed)
    elif args.backoffs:
        run = backoffs(args.backoffs, args.seed)
    else:
        run = sequences(args.sequences, args.seed)
    began, kinds, broken = time.monotonic(), Counter(), []
    for kind, problem in run:
        kinds[kind] += 1
        if problem:
            broken.append(problem)
            if len(broken) <= SHOWN:
                print(problem, flush=True)
        if args.minutes and time.monotonic() - began > 60 * args.minutes:
            break
    shown = ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items()))
    print(f"{sum(kinds.values())} in {time.process_time():.0f} s of one core, {len(broken)} broken: {shown}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
