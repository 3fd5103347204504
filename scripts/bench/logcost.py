# SPDX-License-Identifier: AGPL-3.0-or-later
"""What logging costs a step while a W&B server works, is down, answers nothing, answers errors, or dies.

    python scripts/bench/logcost.py                      # steps of 100 ms, each of them logged
    python scripts/bench/logcost.py --ms 20 --rounds 40

Each way is a process of its own; they take turns in drawn order, a few steps each, so that a busy machine is busy for
all. Prints the median time of a step and its ratio to that without W&B; exit code 1 when a ratio is above 1.02.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]
WAYS = ("none", "offline", "fine", "down", "black_hole", "error", "dies")
STEPS = 10  # a turn
LIMIT = 1.02


def child(way: str, ms: float, folder: Path) -> None:
    """Do a turn for every line that comes in, and say how many seconds it took."""
    import torch

    from engine.test_guard import report
    from engine.wandb_stub import Stub
    from fsdet.config import Log, Wandb
    from fsdet.engine.runlog import RunLog

    torch.set_num_threads(1)
    mode = {"none": "disabled", "offline": "offline"}.get(way, "auto")
    stub = Stub("fine" if way in ("fine", "dies", "none", "offline") else "error" if way == "error" else "black_hole")
    with stub:
        os.environ |= {"WANDB_BASE_URL": "http://127.0.0.1:9" if way == "down" else stub.url, "WANDB_API_KEY": "a" * 40}
        log, step = RunLog(folder, Log(every=1, wandb=Wandb(mode=mode)), {}), 0
        with log:
            print("ready", flush=True)
            for _ in sys.stdin:
                began = time.perf_counter()
                for _ in range(STEPS):
                    step += 1
                    _work(ms)
                    log.step(report(step=step), 1, step, 10.0, {"committed": step})
                print(json.dumps(time.perf_counter() - began), flush=True)
                if way == "dies" and step == 3 * STEPS:
                    stub.mood = "gone"


def _work(ms: float) -> None:
    """As much arithmetic as takes about `ms` on an idle core; it is the work, not the time, that is kept equal."""
    import torch

    a = torch.ones(256, 256)
    for _ in range(max(1, round(ms / 0.35))):
        a = (a @ a).clamp_(max=1.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ms", type=float, default=100, help="work of a step")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS, metavar="WAY", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child[0], args.ms, Path(args.child[1]))
        return 0
    ways = list(dict.fromkeys(["none", *args.ways]))
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        environment = {**os.environ, "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
        environment |= {f"WANDB_{name}_DIR": folder for name in ("CONFIG", "CACHE", "DATA")}
        waits, running = {}, {}
        for way in ways:
            (Path(folder) / way).mkdir()
            command = [sys.executable, __file__, "--ms", str(args.ms), "--child", way, f"{folder}/{way}"]
            began = time.monotonic()
            running[way] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                            stderr=subprocess.DEVNULL, env=environment)  # fmt: skip
            while running[way].stdout.readline().strip() != "ready":
                assert running[way].poll() is None, f"{way} ended"
            waits[way] = time.monotonic() - began
        for _ in range(args.rounds):
            for way in random.sample(ways, len(ways)):
                running[way].stdin.write("\n")
                running[way].stdin.flush()
                seconds[way].append(float(running[way].stdout.readline()) / STEPS)
        for process in running.values():
            process.communicate()
    return _tell(seconds, waits)


def _tell(seconds: dict[str, list[float]], waits: dict[str, float]) -> int:
    plain, worst = statistics.median(seconds["none"]), 0.0
    for way, found in seconds.items():
        ratio = statistics.median(found) / plain
        worst = max(worst, ratio)
        start = waits[way] - waits["none"]
        print(f"{way:11s} {1000 * statistics.median(found):8.2f} ms a step, {ratio:.4f}x; {start:+.1f} s at the start")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
