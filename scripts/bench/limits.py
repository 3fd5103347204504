# SPDX-License-Identifier: AGPL-3.0-or-later
"""What limits nAP50: each kind of mistake taken away by itself, as Bolya et al. 2020 (TIDE, arXiv 2008.08115) ask.

    python scripts/bench/limits.py checkpoints/stage2/best.pt datasets/demo/data.yaml --shots 1,5,10 --seeds 3
    python scripts/bench/limits.py checkpoints/stage3/best.pt datasets/demo/data.yaml        # its own classes and shots

A detection of a novel class is right where it overlaps an object of its class by .5. Otherwise it is, in this order, on
another novel object (.5), on a base object (.5), beside an object of its own class (.1 to .5), or on nothing. Rows:
mistakes of one kind removed; named: detections on a novel object take its name. The test split is looked at to explain
a figure, not to choose a setting.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

import fsdet  # noqa: F401  (environment switches, before torch)
from fsdet.boxes import iou_matrix
from fsdet.data import sources
from fsdet.detect.scoring import DEFAULT
from fsdet.errors import FsdetError
from fsdet.evaluation.scorer import Scorer
from fsdet.tasks.loading import load_trained
from fsdet.tasks.protocol import Study, evaluations
from fsdet.types import Detections, ImageRecord

HIT, NEAR = 0.5, 0.1
KINDS = ("another novel object", "a base object", "beside its object", "nothing")
ROWS = ("as it is", "without those on another novel object", "without those on a base object",
        "without those beside their object", "without those on nothing", "named",
        "named, and without those on a base object or on nothing")  # fmt: skip


def kinds(found: Detections, record: ImageRecord, base: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[n] kind of each detection: -1 right or of a base class, else its place in KINDS; and [n] the class of the novel
    object it overlaps most by HIT, -1 where there is none."""
    kind, name = torch.full((2, len(found)), -1, dtype=torch.long)
    novel = found.labels >= base
    if not len(record.labels):
        return torch.where(novel, KINDS.index("nothing"), kind), name
    truth, labels = torch.as_tensor(record.boxes), torch.as_tensor(record.labels)
    overlap = iou_matrix(found.boxes, truth)
    own = overlap.where(labels[None] == found.labels[:, None], 0).amax(1)
    new, value = labels >= base, overlap.where(labels[None] >= base, 0)
    if new.any():
        best = value.max(1)
        name = torch.where(best.values >= HIT, labels[best.indices], name)
    old = overlap.where(~new[None], 0).amax(1)
    found_kind = torch.where(name >= 0, 0, torch.where(old >= HIT, 1, torch.where(own >= NEAR, 2, 3)))
    return torch.where(novel & (own < HIT), found_kind, kind), name


def without(found: Detections, wrong: torch.Tensor) -> Detections:
    keep = ~wrong
    return Detections(found.boxes[keep], found.scores[keep], found.labels[keep], found.branch[keep])


def mended(found: Sequence[Detections], records: Sequence[ImageRecord], base: int) -> dict[str, list[Detections]]:
    """{row: detections of every image}."""
    out: dict[str, list[Detections]] = {row: [] for row in ROWS}
    for detections, record in zip(found, records, strict=True):
        kind, name = kinds(detections, record, base)
        rename = (detections.labels >= base) & (name >= 0)
        labels = torch.where(rename, name, detections.labels)
        named = Detections(detections.boxes, detections.scores, labels, detections.branch)
        made = [detections, *(without(detections, kind == k) for k in range(len(KINDS))), named,
                without(named, (kind == 1) | (kind == 3))]  # fmt: skip
        for row, one in zip(ROWS, made, strict=True):
            out[row].append(one)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--shots", type=lambda s: tuple(int(v) for v in s.split(",")), default=(1, 5, 10))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", default="test")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    try:
        trained, data = load_trained(args.checkpoint), sources.load(args.data)
        study = Study(data, args.split, args.shots, tuple(range(args.seeds)), "gfsod", "coco")
        [(_, _, found)] = evaluations(trained, study, None, (DEFAULT,))
    except FsdetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    records, novel = data.split(args.split), study.novel
    scorer = Scorer(records, len(data.names))
    figures: dict[int, dict[str, list[float]]] = {}
    for (k, _), detections in found.items():
        for row, some in mended(detections, records, data.num_base).items():
            figures.setdefault(k, {}).setdefault(row, []).append(scorer.score(some).ap50(novel))
    table = {k: {row: fmean(values) for row, values in rows.items()} for k, rows in sorted(figures.items())}
    for row in ROWS:
        print(f"{row:55s}" + "".join(f"  {k} shots {100 * rows[row]:5.1f}" for k, rows in table.items()))
    print(json.dumps({"checkpoint": trained.sha256, "split": args.split, "seeds": args.seeds, "nAP50": table}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
