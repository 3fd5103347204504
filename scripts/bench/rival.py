# SPDX-License-Identifier: AGPL-3.0-or-later
"""Ultralytics' own training as the rival: the same backbone, images, size and shots, scored by our scorer.

    python scripts/bench/rival.py base DATA OUT --images 28000     # base training: OUT/base.pt, its AP on split val
    python scripts/bench/rival.py finetune DATA OUT --shots 1,3,5,10 --seeds 10 --epochs 30,60,120 --lrs 1e-2,3e-3
    python scripts/bench/rival.py finetune DATA OUT --head-only --optimizers MuSGD,AdamW --lrs 1e-2,1e-3
    python scripts/bench/rival.py bound DATA OUT --steps 2000,4000 # fine-tuned on all novel labels

The grid (optimizers x lrs x epochs and steps) is run on the first --grid-seeds draws of each K, its best setting on all
of them. Best is best by nAP50 on the test split, which favours the rival, and OUT/finetune.json says so beside every
setting that was tried. A finished run is a line in OUT/runs.jsonl and is not made again, so a grid can be stopped,
widened, and shared by two processes (--seeds 0-4 and --seeds 5-9).

What is done for the rival: its head has columns for base and novel classes from the start, so that fine-tuning
re-initialises nothing. A shot's image keeps only the shot: other objects in it are blanked with grey, so that none is
taught as background, and so are novel objects in base images. Each batch is half base images, as many different ones as
the length allows. Bias learning rates do not start at .1, which a short fine-tuning does not survive with AdamW. Boxes
are picked by our own post-processing, several classes a place, where Ultralytics' predict keeps one.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import fsdet  # noqa: F401  (environment switches, before torch)

os.environ.setdefault("WANDB_MODE", "disabled")
import cv2
import numpy as np
import torch
import yaml
from grid import Point, append_run, best, key_of, passes, points, read_runs, results  # the file beside
from ultralytics import YOLO

from fsdet.boxes import xywh_to_xyxy
from fsdet.data import sources
from fsdet.data.collate import to_tensor
from fsdet.data.images import read_rgb
from fsdet.data.shots import Picks, draw_shots, load_picks
from fsdet.data.transforms import letterbox, resize_long
from fsdet.detect.postprocess import select, to_original
from fsdet.errors import DataError, FsdetError, UserError, explain
from fsdet.evaluation import summary
from fsdet.evaluation.scorer import Scorer, fp_per_image
from fsdet.tasks.validation import without_classes
from fsdet.types import Detections, ImageRecord

GREY, BATCH = 114, 16
FP_THRESHOLD = 0.25  # as in fsdet eval

Paint = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Picture:
    """A training image: what is taught of it, and the boxes [m, 4] xyxy px that are blanked."""

    record: ImageRecord
    hidden: np.ndarray | None = None


def write_yolo(pictures: Sequence[Picture], folder: Path, size: int) -> list[Path]:
    """Pictures as Ultralytics' images and labels; returns the image paths. A blanked one is written at `size` px."""
    images, labels = folder / "images", folder / "labels"
    for path in (images, labels):
        path.mkdir(parents=True, exist_ok=True)
    written = []
    for i, picture in enumerate(pictures):
        record = picture.record
        if picture.hidden is None or not len(picture.hidden):
            target = images / f"{i:06d}{record.path.suffix.lower()}"
            target.symlink_to(record.path.resolve())
        else:
            target = images / f"{i:06d}.png"
            blanked = blank(read_rgb(record.path), record.boxes, picture.hidden)
            cv2.imwrite(str(target), cv2.cvtColor(resize_long(blanked, size)[0], cv2.COLOR_RGB2BGR))
        h, w = record.size
        rows = [f"{c} {(x0 + x1) / 2 / w} {(y0 + y1) / 2 / h} {(x1 - x0) / w} {(y1 - y0) / h}"
                for c, (x0, y0, x1, y1) in zip(record.labels.tolist(), record.boxes.tolist(), strict=True)]  # fmt: skip
        (labels / f"{i:06d}.txt").write_text("\n".join(rows))
        written.append(target)
    return written


def blank(image: np.ndarray, kept: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Grey over the boxes `hidden`, but never over a box of `kept`; both [m, 4] xyxy px."""
    out = image.copy()
    for x0, y0, x1, y1 in hidden.astype(int):
        out[y0 : y1 + 1, x0 : x1 + 1] = GREY
    for x0, y0, x1, y1 in kept.astype(int):
        out[y0 : y1 + 1, x0 : x1 + 1] = image[y0 : y1 + 1, x0 : x1 + 1]
    return out


def data_yaml(folder: Path, train: Iterable[Path], val: Sequence[ImageRecord], names: Sequence[str]) -> Path:
    """Ultralytics' data file in `folder`; `train` may name an image more than once."""
    (folder / "train.txt").write_text("\n".join(map(str, train)))
    shown = write_yolo([Picture(r) for r in val], folder / "val", 0)
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({"path": str(folder), "train": "train.txt", "val": str(shown[0].parent),
                                    "names": dict(enumerate(names))}))  # fmt: skip
    return path


def train(model: YOLO, data: Path, args: argparse.Namespace, epochs: int, **extra: object) -> YOLO:
    """Ultralytics' trainer with what a short run needs: an update a batch, mosaic until the last tenth, no stopping."""
    model.add_callback("on_train_start", lambda _: torch.set_num_threads(args.threads))  # it sets cores - 1 itself
    options = {"data": str(data), "imgsz": args.size, "epochs": epochs, "batch": BATCH, "nbs": BATCH,
               "workers": args.workers, "device": args.device, "amp": False, "val": False, "plots": False,
               "verbose": False, "cache": "ram", "project": str(data.parent), "name": "run", "exist_ok": True,
               "seed": args.seed, "patience": 0, "close_mosaic": max(1, round(epochs / 10)),
               "warmup_epochs": min(1.0, epochs / 5)}  # fmt: skip
    model.train(**{**options, **extra})
    return YOLO(data.parent / "run" / "weights" / "last.pt")


@torch.inference_mode()
def detections(model: YOLO, records: Sequence[ImageRecord], args: argparse.Namespace) -> list[Detections]:
    """The model's detections on records, in px of the originals, letterboxed and picked as ours are."""
    network, out = model.model.to(args.device).eval(), []
    for record in records:
        image, factor, padding = letterbox(read_rgb(record.path), args.size)
        raw = network(to_tensor([image], args.size).to(args.device))
        raw = (raw[0] if isinstance(raw, tuple | list) else raw).float().transpose(1, 2)  # [1, A, 4 + classes]
        if raw.shape[-1] != 4 + len(model.names):
            raise UserError(explain(f"{4 + len(model.names)} columns: a box and a score a class", str(raw.shape[-1]),
                                    f"--backbone {args.backbone}", "use a yolov8 or yolo11 backbone"))  # fmt: skip
        labels = torch.arange(len(model.names), device=raw.device)
        [found] = select(xywh_to_xyxy(raw[..., :4]), raw[..., 4:], torch.zeros_like(labels, dtype=torch.uint8), labels,
                         company=False)  # fmt: skip
        out.append(to_original(found, factor, padding, record.size))
    return out


def base(args: argparse.Namespace, data: sources.DataSet) -> None:
    """Train on split train for --images images; AP on val into OUT/base.json. Not again with the same settings.

    Raises:
        UserError: OUT holds a base training with other settings, which fine-tunings there started from.
    """
    records = without_classes(data.split("train"), data.num_base)
    epochs, lr = max(1, round(args.images / len(records))), args.lrs[0] if args.lrs else 2e-2
    settings = {"what": "base", "backbone": args.backbone, "images": epochs * len(records), "epochs": epochs,
                "optimizer": args.optimizers[0], "lr": lr, "size": args.size, "seed": args.seed}  # fmt: skip
    if (args.out / "base.pt").is_file():
        return already(args.out / "base.json", settings)
    held = data.split("val") if data.has("val") else None
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as tmp:
        images = write_yolo([Picture(r) for r in records], Path(tmp) / "train", args.size)
        file = data_yaml(Path(tmp), images, (held or records)[:16], data.names)
        model = train(YOLO(f"{args.backbone}.yaml"), file, args, epochs, optimizer=args.optimizers[0], lr0=lr)
        model.save(args.out / "base.pt")
    row = {**settings, "seconds": round(time.monotonic() - began, 1), "threads": args.threads}
    if held:
        held = without_classes(held, data.num_base)
        scores = Scorer(held, len(data.names)).score(detections(model, held, args))
        row |= {"val_bAP50": scores.ap50(range(data.num_base)), "val_bAP": scores.ap(range(data.num_base))}
    summary.write_json(args.out / "base.json", row)
    print(json.dumps(row), flush=True)


def already(path: Path, settings: dict) -> None:
    """Say that the base training is there. Raises UserError when it was made with other settings."""
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    differing = [f"{key} {found.get(key)!r}" for key, value in settings.items() if found.get(key) != value]
    if differing:
        wanted = ", ".join(f"{key} {settings[key]!r}" for key in settings if found.get(key) != settings[key])
        raise UserError(explain(f"no base training yet, or one with {wanted}", ", ".join(differing), str(path.parent),
                                "name another OUT, or remove that folder"))  # fmt: skip
    print(f"{path.parent / 'base.pt'}: there already")


def shot_pictures(records: Sequence[ImageRecord], picks: Picks) -> list[Picture]:
    """One picture per image of the draw, the shots in it as its only boxes, every other object blanked."""
    boxes: dict[int, list[int]] = {}
    for i, j in (pick for found in picks.values() for pick in found):
        boxes.setdefault(i, []).append(j)
    return [Picture(records[i].kept(np.isin(np.arange(len(records[i].labels)), js)),
                    np.delete(records[i].boxes, js, 0)) for i, js in sorted(boxes.items())]  # fmt: skip


def replayed(data: sources.DataSet, count: int, seed: int) -> list[Picture]:
    """`count` images of split train in random order, again from the start when there are fewer; novel objects blanked,
    because a label of theirs is not to be used and their pixels are no background."""
    records = data.split("train")
    order = np.resize(np.random.default_rng(seed).permutation(len(records)), count)
    plain = without_classes([records[i] for i in order], data.num_base)
    return [Picture(r, records[i].boxes[records[i].labels >= data.num_base]) for i, r in zip(order, plain, strict=True)]


def fine_tuned(args: argparse.Namespace, data: sources.DataSet, shots: list[Picture], point: Point,
               seed: int) -> tuple[YOLO, dict]:  # fmt: skip
    """base.pt trained on the pictures of the shots and on base images; and what that took."""
    rounds, times = passes(point.epochs(len(shots), BATCH))
    replay = replayed(data, round(point.replay * times * len(shots)), seed)
    model = YOLO(args.out / "base.pt")
    head = len(model.model.model) - 1
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        images = write_yolo([*shots, *replay], folder / "train", args.size)
        listed = [*(times * images[: len(shots)]), *images[len(shots) :]]
        file = data_yaml(folder, listed, data.split("test")[:16], data.names)
        own = argparse.Namespace(**{**vars(args), "seed": seed})
        wall, cpu = time.monotonic(), time.process_time()
        model = train(model, file, own, rounds, optimizer=point.optimizer, lr0=point.lr, warmup_bias_lr=0.0,
                      freeze=head if args.head_only else None)  # fmt: skip
        model.model.float()  # read before the folder goes
    steps = rounds * -(-len(listed) // BATCH)
    return model, {"steps": steps, "seconds": round(time.monotonic() - wall, 1),
                   "cpu_seconds": round(time.process_time() - cpu, 1), "threads": args.threads}  # fmt: skip


class Bench:
    """Runs of one kind into OUT/runs.jsonl: what is there already is not run again."""

    def __init__(self, args: argparse.Namespace, data: sources.DataSet, what: str) -> None:
        self.args, self.data, self.what = args, data, what
        self.depth = "head" if args.head_only else "full"
        self.test = data.split("test")[: args.limit_images]
        self.scorer = Scorer(self.test, len(data.names))
        self.log = args.out / "runs.jsonl"
        if not (args.out / "base.pt").is_file():
            raise UserError(explain("a base training", "no base.pt", str(args.out), "run `rival.py base` first"))
        self.base = hashlib.sha256((args.out / "base.pt").read_bytes()).hexdigest()

    def rows(self, k: int | None = None) -> list[dict]:
        """The finished runs of this kind, depth, base checkpoint, size and test split."""
        own = {"what": self.what, "depth": self.depth, "base": self.base, "size": self.args.size,
               "test_images": len(self.test)} | ({} if k is None else {"k": k})  # fmt: skip
        return [r for r in read_runs(self.log) if all(r.get(key) == value for key, value in own.items())]

    def run(self, k: int, seed: int, shots: list[Picture], point: Point) -> None:
        """One fine-tuning and its figures, unless it is there.

        Raises:
            UserError: OUT holds runs of other shots under this K and seed; one table is not to mix them.
        """
        row = {"what": self.what, "depth": self.depth, "k": k, "seed": seed, "draw": digest(shots), "base": self.base,
               **vars(point), "size": self.args.size, "test_images": len(self.test)}  # fmt: skip
        found = self.rows(k)
        if any(r["seed"] == seed and r["draw"] != row["draw"] for r in found):
            raise UserError(explain(f"runs of the shots {row['draw']} for K = {k}, draw {seed}", "runs of other shots",
                                    str(self.log), "copy base.pt to another OUT for these shots"))  # fmt: skip
        if key_of(row) in {key_of(r) for r in found}:
            return
        model, cost = fine_tuned(self.args, self.data, shots, point, seed)
        began = time.perf_counter()
        found = detections(model, self.test, self.args)
        ms = 1000 * (time.perf_counter() - began) / len(self.test)
        base, novel = range(self.data.num_base), range(self.data.num_base, len(self.data.names))
        false = fp_per_image(self.test, found, list(novel), FP_THRESHOLD)
        figures = summary.figures(self.scorer.score(found), list(base), list(novel), false)
        row |= {name: value if np.isfinite(value) else None for name, value in figures.items()}
        row |= {**cost, "ms_per_image": round(ms, 2)}
        append_run(self.log, row)
        print(json.dumps(row), flush=True)
        self.write()

    def write(self) -> None:
        """OUT/finetune.json (finetune_head.json, bound.json, bound_head.json), as far as the runs reach."""
        found = results(self.rows(), f"Ultralytics, {self.depth}, {self.what}")
        if found is not None:
            summary.write_json(self.args.out / f"{self.what}{'_head' * self.args.head_only}.json", found)


def digest(shots: Sequence[Picture]) -> str:
    """Of what is taught: image names, boxes and labels."""
    told = [("/".join(p.record.path.parts[-2:]), p.record.boxes.round(1).tolist(), p.record.labels.tolist())
            for p in shots]  # fmt: skip
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def finetune(args: argparse.Namespace, data: sources.DataSet) -> None:
    """The grid on the first draws of each K, its best setting on all draws."""
    bench, support = Bench(args, data, "finetune"), data.split("support")
    grid = points(args.optimizers, args.lrs or [1e-2, 3e-3], args.epochs, args.steps, args.replay)
    novel = list(range(data.num_base, len(data.names)))
    for k in args.shots:
        draws = {seed: shot_pictures(support, draw_shots(support, novel, [k], seed, data.names)) for seed in args.seeds}
        if args.shot_file:
            draws = {args.seeds[0]: shot_pictures(support, load_picks(args.shot_file, data, k))}
        screened = list(draws)[: args.grid_seeds]
        for seed in screened:
            for point in grid:
                bench.run(k, seed, draws[seed], point)
        chosen = best(bench.rows(k), screened)
        if chosen is None:
            continue
        print(f"{k} shots: best of the grid on draws {screened} is {chosen[0]}, nAP50 {chosen[1]:.3f}", flush=True)
        for seed in draws:
            bench.run(k, seed, draws[seed], chosen[0])
    bench.write()


def bound(args: argparse.Namespace, data: sources.DataSet) -> None:
    """Fine-tuning on every label of split support; K in its file is the number of instances of the rarest class."""
    support = data.split("support")
    counts = np.bincount(np.concatenate([r.labels[~r.crowd] for r in support]), minlength=len(data.names))
    novel = {data.names[c]: int(counts[c]) for c in range(data.num_base, len(data.names))}
    thin = [f"{name} {count}" for name, count in novel.items() if count < args.instances]
    if thin:
        advice = f"draw or label a larger split support, or take what is there with --instances {min(novel.values())}"
        raise DataError(explain(f"{args.instances} instances of each novel class in split support", ", ".join(thin),
                                data.name, advice))  # fmt: skip
    bench, k = Bench(args, data, "bound"), min(novel.values())
    shown = [Picture(r.kept(~r.crowd)) for r in support if (r.labels >= data.num_base).any()]
    for point in points(args.optimizers, args.lrs or [1e-2], [], args.steps or [2000, 4000], args.replay):
        bench.run(k, args.seed, shown, point)
    bench.write()


def seeds(text: str) -> list[int]:
    """`10`: draws 0 to 9; `5-9`: those."""
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else list(range(int(text)))


def listed(kind: Callable) -> Callable[[str], list]:
    """A comma-separated list of `kind`; empty text is an empty list."""
    return lambda text: [kind(word) for word in text.split(",") if word]


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("base", "finetune", "bound"))
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", default="yolov8n")
    parser.add_argument("--size", type=int, default=192, help="px (192)")
    parser.add_argument("--images", type=int, default=28000, help="of the base training, counted each time (28000)")
    parser.add_argument("--optimizers", type=listed(str), default=["MuSGD"], help="base takes the first (MuSGD)")
    parser.add_argument("--lrs", type=listed(float), default=None, help="2e-2 (base); 1e-2,3e-3; 1e-2 (bound)")
    parser.add_argument("--epochs", type=listed(float), default=[30, 60, 120], help="times a shot is seen (30,60,120)")
    parser.add_argument("--steps", type=listed(int), default=[], help="lengths in batches of 16, beside --epochs")
    parser.add_argument("--replay", type=float, default=1.0, help="base images for each image of a shot (1)")
    parser.add_argument("--shots", type=listed(int), default=[1, 3, 5, 10])
    parser.add_argument("--seeds", type=seeds, default=[0], help="10: draws 0 to 9; 5-9: those")
    parser.add_argument("--grid-seeds", type=int, default=1, help="draws that the whole grid is run on (1)")
    parser.add_argument("--shot-file", type=Path, help="a shot file of split support in place of draws")
    parser.add_argument("--instances", type=int, default=200, help="of each novel class that `bound` asks for (200)")
    parser.add_argument("--limit-images", type=int, default=None, help="only the first N test images, and says so")
    parser.add_argument("--seed", type=int, default=0, help="of base and bound; a fine-tuning takes its draw's")
    parser.add_argument("--head-only", action="store_true", help="everything but the head frozen, BatchNorm included")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes that load images (1)")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    try:
        {"base": base, "finetune": finetune, "bound": bound}[args.what](args, sources.load(args.data))
    except FsdetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
