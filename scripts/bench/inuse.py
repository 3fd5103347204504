# SPDX-License-Identifier: AGPL-3.0-or-later
"""What registration takes, and what a prediction takes beside Ultralytics' of the same backbone.

    python scripts/bench/inuse.py --threads 2                 # 20 classes x 5 shots, 320 px, random weights
    python scripts/bench/inuse.py --checkpoint checkpoints/stage2/best.pt --pairs 100 --images datasets/demo/test

Predictions with 20 and with 500 registered classes and Ultralytics' take turns in one process, in drawn order; printed
are medians of the ratios of turns and their 95 % intervals (bootstrap). Registration is printed in seconds, as its best
of three: only an idle machine says what it takes. With --images, what a second look takes beside one look is measured
on LOOKED_AT pictures of a folder. Exit code 1 when a median is above its limit.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

import fsdet  # noqa: F401  (environment switches)
from fsdet.bank import PrototypeBank
from fsdet.data.images import is_image, read_rgb
from fsdet.data.preprocessing import Preprocessing
from fsdet.detect.predictor import Predictor
from fsdet.detect.support import VIEWS
from fsdet.models.build import build_model, model_spec
from fsdet.tasks.loading import load_trained

CLASSES, SHOTS, MANY = 20, 5, 500
LOOKED_AT = 16
LIMITS = {"20 classes / Ultralytics": 1.15, "500 classes / 20": 1.3}
REGISTERING = 2.5  # s, at the size and on the threads of the default


def detector(checkpoint: Path | None, size: int) -> Callable[..., Predictor]:
    """Makes predictors of one model."""
    if checkpoint:
        trained = load_trained(checkpoint)
        model, classes = trained.model, trained.classes
    else:
        torch.manual_seed(0)
        classes = tuple(f"base {i}" for i in range(80))
        model = build_model(model_spec("yolov8n", "P3-P5", 80, 128, 16, "anchors", True, 80)).eval()
    prepare = Preprocessing(size, size // 2 // 32 * 32)
    return lambda bank=None, **more: Predictor(model, classes, prepare, bank, views=VIEWS[:1], **more)


def registered(
    make: Callable[..., Predictor], size: int, rng: np.random.Generator
) -> tuple[PrototypeBank, float, float]:
    """A bank of CLASSES x SHOTS from blotches; the seconds of `add` alone, and with thresholds."""
    images = [rng.integers(0, 255, (size // 8, size // 8, 3), np.uint8) for _ in range(CLASSES * SHOTS)]
    shots = [(str(i), cv2.resize(small, (size, size)), np.float32([[20, 20, size // 2, size // 2]]))
             for i, small in enumerate(images)]  # fmt: skip
    own, began = make(), time.perf_counter()
    for c in range(CLASSES):
        own.add(f"class {c}", shots[SHOTS * c : SHOTS * (c + 1)])
    middle = time.perf_counter()
    return own.bank, middle - began, time.perf_counter() - began


def widened(bank: PrototypeBank, dim: int) -> PrototypeBank:
    """A bank of MANY classes of one threshold, of the same weights."""
    rows = torch.nn.functional.normalize(
        torch.randn(MANY, SHOTS, dim, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    names = tuple(f"class {c}" for c in range(MANY))
    wide = PrototypeBank(names, tuple(rows), bank.model_sha256)
    return wide.proposed(dict.fromkeys(names, (0.25, "")))


def turns(ways: dict[str, Callable[[], object]], pairs: int) -> dict[str, list[float]]:
    """Seconds of each way in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    order, rng = list(ways), random.Random(0)
    for number in range(pairs + 5):
        rng.shuffle(order)
        for name in order:
            began = time.perf_counter()
            ways[name]()
            if number >= 5:  # warm
                seconds[name].append(time.perf_counter() - began)
    return seconds


def second_look(make: Callable[..., Predictor], bank: PrototypeBank, paths: Sequence[Path], pairs: int) -> str:
    """Time of two looks beside one, at the usual thresholds."""
    pictures = [read_rgb(path) for path in paths]
    once, twice = make(bank), make(bank, rescore=True)
    seconds = turns({"once": lambda: [once.predict(p) for p in pictures],
                     "twice": lambda: [twice.predict(p) for p in pictures]}, max(1, pairs // 4))  # fmt: skip
    middle, low, high = interval([a / b for a, b in zip(seconds["twice"], seconds["once"], strict=True)])
    return f"two looks / one, {len(pictures)} pictures: {middle:.3f} ({low:.3f} to {high:.3f})"


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Median, and 95 % of the medians of 2,000 resamplings."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[49], medians[1949]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="a yolov8n; default: random weights")
    parser.add_argument("--size", type=int, default=320, help="px")
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=Path, metavar="DIR", help="pictures to look at twice")
    args = parser.parse_args()
    there = sorted(args.images.iterdir()) if args.images and args.images.is_dir() else ()
    paths = [path for path in there if is_image(path.name)][:LOOKED_AT]
    if args.images and not paths:
        parser.error(f"expected a folder of pictures at --images, got '{args.images}'")
    from ultralytics import YOLO

    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    make, rng = detector(args.checkpoint, args.size), np.random.default_rng(0)
    registered(make, args.size, rng)
    tries = [registered(make, args.size, rng) for _ in range(3)]
    alone, whole = min(t[1] for t in tries), min(t[2] for t in tries)
    print(f"register {CLASSES} x {SHOTS} at {args.size} px, one view each, {args.threads} threads: {alone:.2f} s, with "
          f"thresholds {whole:.2f} s (limit {REGISTERING} s, idle)")  # fmt: skip
    bank = tries[0][0]
    few, many, theirs = make(bank), make(widened(bank, bank.instances[0].shape[1])), YOLO("yolov8n.yaml")
    image = cv2.resize(rng.integers(0, 255, (40, 40, 3), np.uint8), (args.size, args.size))
    flipped = np.ascontiguousarray(image[..., ::-1])
    seconds = turns({"few": lambda: few.predict(image), "many": lambda: many.predict(image),
                     "theirs": lambda: theirs.predict(flipped, imgsz=args.size, verbose=False, device="cpu")},
                    args.pairs)  # fmt: skip
    ratios = {"20 classes / Ultralytics": ("few", "theirs"), "500 classes / 20": ("many", "few")}
    failed = whole > REGISTERING and (args.size, args.threads) == (320, 2)
    for name, (one, two) in ratios.items():
        middle, low, high = interval([a / b for a, b in zip(seconds[one], seconds[two], strict=True)])
        failed |= middle > LIMITS[name]
        print(f"{name}: {middle:.3f} ({low:.3f} to {high:.3f}), limit {LIMITS[name]}")
    if paths:
        print(second_look(make, bank, paths, args.pairs))
    print("ms: " + ", ".join(f"{name} {1000 * statistics.median(s):.1f}" for name, s in seconds.items()))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
