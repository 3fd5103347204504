# SPDX-License-Identifier: AGPL-3.0-or-later
"""A rival's grid of settings: which runs there are, which are missing, which setting is best, and the table's file.

Every finished run is one line of JSON in `runs.jsonl`, so that a grid can be stopped, widened and continued, and two
processes may share it. Nothing here trains.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from fsdet.evaluation import summary

# what makes two runs the same run; the rest of a line is what came of it
KEY = ("what", "depth", "k", "seed", "draw", "base", "optimizer", "lr", "length", "replay", "size", "test_images")
SETTING = ("optimizer", "lr", "length", "replay")
CHOICE = "by mean nAP50 on the test split, which favours the rival"


@dataclass(frozen=True)
class Point:
    """One setting of a fine-tuning. length: "60 epochs" (times that each shot is seen) or "600 steps" (batches).

    replay: base images for each image of a shot.
    """

    optimizer: str
    lr: float
    length: str
    replay: float = 1.0

    @classmethod
    def of(cls, row: Mapping) -> "Point":
        """The setting of a run."""
        return cls(*(row[key] for key in SETTING))

    def __str__(self) -> str:
        return f"{self.optimizer} {self.lr:g}, {self.length}, {self.replay:g} base images a shot's image"

    def epochs(self, images: int, batch: int) -> float:
        """How often each of `images` shot images is seen."""
        number, unit = self.length.split()
        return float(number) if unit == "epochs" else int(number) * batch / (images * (1 + self.replay))


def points(optimizers: Sequence[str], lrs: Sequence[float], epochs: Sequence[float], steps: Sequence[int],
           replay: float) -> list[Point]:  # fmt: skip
    """The product of optimizers, learning rates and lengths, each setting once."""
    lengths = [*(f"{e:g} epochs" for e in epochs), *(f"{s} steps" for s in steps)]
    return list(dict.fromkeys(Point(o, lr, length, replay) for o in optimizers for lr in lrs for length in lengths))


def passes(epochs: float, most: int = 10) -> tuple[int, int]:
    """(passes over the list of files, times that a shot is in it): at most `most` passes, so that each of them holds
    many base images, and the product as near to `epochs` as whole numbers go."""
    times = max(1, round(epochs / most))
    return max(1, round(epochs / times)), times


def key_of(row: Mapping) -> tuple:
    """What a run is recognised by."""
    return tuple(row.get(key) for key in KEY)


def read_runs(path: Path) -> list[dict]:
    """The finished runs of a file, the last one where a run was made twice; a line cut short counts as not run."""
    rows: dict[tuple, dict] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines() if path.is_file() else (), 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            print(f"{path}:{number}: cut short, so that run is made again", file=sys.stderr)
            continue
        if row is not None:
            rows[key_of(row)] = row
    return list(rows.values())


def append_run(path: Path, row: Mapping) -> None:
    """One line for one finished run, after whatever is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + json.dumps(row, allow_nan=False) + "\n")


def best(rows: Sequence[Mapping], seeds: Sequence[int]) -> tuple[Point, float] | None:
    """(setting, its mean nAP50) of the best among those that have a run for every one of `seeds`; None without any.

    rows: runs of one depth and K. A tie goes to the setting that was run first.
    """
    if not seeds:
        return None
    found: dict[Point, dict[int, float]] = {}
    for row in rows:
        found.setdefault(Point.of(row), {})[row["seed"]] = row["nAP50"]
    means = {point: fmean(scores[s] for s in seeds) for point, scores in found.items() if set(seeds) <= set(scores)}
    return max(means.items(), key=lambda item: item[1]) if means else None


def common_seeds(rows: Sequence[Mapping]) -> list[int]:
    """The draws that each K has in at least one of its settings."""
    by_k: dict[int, set[int]] = {}
    for row in rows:
        by_k.setdefault(row["k"], set()).add(row["seed"])
    return sorted(set.intersection(*by_k.values())) if by_k else []


def results(rows: Sequence[Mapping], what: str) -> dict | None:
    """results.json of the best setting at each K over the draws that all K have, with every setting's mean beside it.

    rows: runs of one depth, base checkpoint and test split. None before each K has a setting with all these draws.
    """
    seeds, ks = common_seeds(rows), sorted({row["k"] for row in rows})
    chosen = {k: best([r for r in rows if r["k"] == k], seeds) for k in ks}
    if not ks or None in chosen.values():
        return None
    shots: dict[int, list[Mapping]] = {}
    for k in ks:
        of_point = {r["seed"]: r for r in rows if r["k"] == k and Point.of(r) == chosen[k][0]}
        shots[k] = [{name: _figure(of_point[s], name) for name in summary.FIGURES} for s in seeds]
    first = rows[0]
    nothing = {"bAP50": float("nan"), "bAP": float("nan")}
    return summary.results_json(
        setting="gfsod", metric="coco", checkpoint_sha256=first["base"], seeds=seeds, standard=nothing, shots=shots,
        ms_per_image=fmean(r["ms_per_image"] for r in rows), split="test", images=first["test_images"], rival=what,
        chosen={str(k): str(point) for k, (point, _) in chosen.items()}, choice=CHOICE,
        grid={str(k): _grid([r for r in rows if r["k"] == k]) for k in ks})  # fmt: skip


def _figure(row: Mapping, name: str) -> float:
    return float("nan") if row.get(name) is None else row[name]


def _grid(rows: Sequence[Mapping]) -> list[dict]:
    """Every setting that was tried at one K, with its draws and mean nAP50 and bAP50."""
    found: dict[Point, list[Mapping]] = {}
    for row in rows:
        found.setdefault(Point.of(row), []).append(row)
    return [{"setting": str(point), "seeds": sorted(r["seed"] for r in runs),
             "nAP50": fmean(r["nAP50"] for r in runs), "bAP50": fmean(_figure(r, "bAP50") for r in runs),
             "steps": runs[0].get("steps"), "seconds": fmean(r.get("seconds", 0) for r in runs)}
            for point, runs in found.items()]  # fmt: skip
