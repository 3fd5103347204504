# SPDX-License-Identifier: AGPL-3.0-or-later
"""Ultralytics' own training as the rival: the same backbone, images, size and shots, scored by our scorer.

    python scripts/bench/rival.py base DATA OUT --images 30000            # base training and its AP on split val
    python scripts/bench/rival.py finetune DATA OUT --shots 1,5 --seeds 2 --optimizer AdamW --lr 1e-3
                                                          # from OUT/base.pt, nAP50 on split test

The head has columns for base and novel classes from the start, so that fine-tuning re-initialises nothing. A shot's
image keeps only the shot: other objects in it are blanked with grey, so that none is taught as background.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import fsdet  # noqa: F401  (environment switches, before torch)

os.environ.setdefault("WANDB_MODE", "disabled")
import cv2
import numpy as np
import torch
import yaml
from ultralytics import YOLO

from fsdet.data import sources
from fsdet.data.images import read_rgb
from fsdet.data.shots import draw_shots
from fsdet.detect.postprocess import NMS_IOU
from fsdet.errors import FsdetError
from fsdet.evaluation import summary
from fsdet.evaluation.scorer import Scorer, fp_per_image
from fsdet.tasks.validation import without_classes
from fsdet.types import Detections, ImageRecord

GREY = 114


def write_yolo(records, folder: Path, names, paint=None) -> Path:  # type: ignore[no-untyped-def]
    """Records as an Ultralytics folder; `paint(i, image)` may change pixels. Returns the images folder."""
    images, labels = folder / "images", folder / "labels"
    for path in (images, labels):
        path.mkdir(parents=True, exist_ok=True)
    for i, record in enumerate(records):
        target = images / f"{i:06d}{record.path.suffix.lower() if paint is None else '.png'}"
        if paint is None:
            target.symlink_to(record.path.resolve())
        else:
            cv2.imwrite(str(target), cv2.cvtColor(paint(i, read_rgb(record.path)), cv2.COLOR_RGB2BGR))
        h, w = record.size
        rows = [f"{c} {(x0 + x1) / 2 / w} {(y0 + y1) / 2 / h} {(x1 - x0) / w} {(y1 - y0) / h}"
                for c, (x0, y0, x1, y1) in zip(record.labels.tolist(), record.boxes.tolist(), strict=True)]  # fmt: skip
        (labels / f"{i:06d}.txt").write_text("\n".join(rows))
    return images


def data_yaml(folder: Path, train: Path, val: Path, names) -> Path:  # type: ignore[no-untyped-def]
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({"path": str(folder), "train": str(train), "val": str(val),
                                    "names": dict(enumerate(names))}))  # fmt: skip
    return path


def train(model: YOLO, data: Path, args: argparse.Namespace, epochs: float, **extra: object) -> YOLO:
    """Ultralytics' trainer with what a short run needs: an update a batch, warm-up, mosaic until the last tenth."""
    torch.set_num_threads(args.threads)
    options = {"data": str(data), "imgsz": args.size, "epochs": max(1, round(epochs)), "batch": 16, "nbs": 16,
               "workers": 1, "device": "cpu", "val": False, "plots": False, "verbose": False, "cache": "ram",
               "project": str(data.parent), "name": "run", "exist_ok": True, "seed": args.seed,
               "close_mosaic": max(1, round(epochs / 10)), "warmup_epochs": min(1.0, epochs / 5)}  # fmt: skip
    model.train(**{**options, **extra})
    return YOLO(data.parent / "run" / "weights" / "last.pt")


@torch.inference_mode()
def detections(model: YOLO, records: list[ImageRecord], size: int) -> list[Detections]:
    """The model's detections on records, in px of the originals."""
    out = []
    for record in records:
        image = cv2.cvtColor(read_rgb(record.path), cv2.COLOR_RGB2BGR)
        boxes = model.predict(image, imgsz=size, conf=0.001, iou=NMS_IOU, max_det=100, verbose=False, device="cpu")[
            0
        ].boxes
        labels = boxes.cls.long()
        out.append(Detections(boxes.xyxy.float().cpu(), boxes.conf.float().cpu(), labels.cpu(),
                              torch.zeros_like(labels, dtype=torch.uint8).cpu()))  # fmt: skip
    return out


def base(args: argparse.Namespace, data: sources.DataSet) -> dict:
    """Train on split train for --images images; AP on val."""
    records = without_classes(data.split("train"), data.num_base)
    epochs = args.images / len(records)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        images = write_yolo(records, folder / "train", data.names)
        val = write_yolo(data.split("val")[:16], folder / "val", data.names)
        model = train(YOLO(f"{args.backbone}.yaml"), data_yaml(folder, images, val, data.names), args, epochs,
                      optimizer=args.optimizer, lr0=args.lr)  # fmt: skip
        args.out.mkdir(parents=True, exist_ok=True)
        model.save(args.out / "base.pt")
    ids = range(data.num_base)
    held = without_classes(data.split("val"), data.num_base)
    scores = Scorer(held, len(data.names)).score(detections(model, held, args.size))
    return {
        "what": "base",
        "images": round(epochs) * len(records),
        "val_bAP50": scores.ap50(ids),
        "val_bAP": scores.ap(ids),
    }


def shot_records(data: sources.DataSet, k: int, seed: int) -> list[ImageRecord]:
    """One record per image of the draw, with the shots in it as its only boxes."""
    support = data.split("support")
    picks = draw_shots(support, list(range(data.num_base, len(data.names))), [k], seed, data.names)
    boxes: dict[int, list[int]] = {}
    for i, j in (p for found in picks.values() for p in found):
        boxes.setdefault(i, []).append(j)
    return [ImageRecord(support[i].path, support[i].size, support[i].boxes[js], support[i].labels[js])
            for i, js in sorted(boxes.items())]  # fmt: skip


def finetune(args: argparse.Namespace, data: sources.DataSet) -> dict:
    """Fine-tune base.pt on K shots of each novel class and as many base images; figures on split test."""
    everything = {tuple([str(r.path)]): r for r in data.split("support")}
    test = data.split("test")
    scorer, base_ids = Scorer(test, len(data.names)), list(range(data.num_base))
    novel_ids = list(range(data.num_base, len(data.names)))
    rows: dict[int, list[dict]] = {}
    for k in args.shots:
        for seed in range(args.seeds):
            shots = shot_records(data, k, seed)
            chosen = np.random.default_rng(seed).choice(len(data.split("train")), len(shots), replace=False)
            replay = without_classes([data.split("train")[i] for i in chosen], data.num_base)

            def paint(i: int, image: np.ndarray, shots: list[ImageRecord] = shots) -> np.ndarray:
                if i < len(shots):
                    hide_others(image, shots[i], everything[(str(shots[i].path),)])
                return image

            with tempfile.TemporaryDirectory() as tmp:
                folder = Path(tmp)
                images = write_yolo([*shots, *replay], folder / "train", data.names, paint)
                val = write_yolo(test[:16], folder / "val", data.names)
                freeze = 22 if args.head_only else None
                epochs = args.steps * 16 / len([*shots, *replay])
                model = train(YOLO(args.out / "base.pt"), data_yaml(folder, images, val, data.names), args, epochs,
                              optimizer=args.optimizer, lr0=args.lr, freeze=freeze)  # fmt: skip
                found = detections(model, test, args.size)
            false = fp_per_image(test, found, novel_ids, 0.25)
            rows.setdefault(k, []).append(summary.figures(scorer.score(found), base_ids, novel_ids, false))
            print(json.dumps({"k": k, "seed": seed, **rows[k][-1]}), flush=True)
    return summary.results_json(setting="gfsod", metric="coco", checkpoint_sha256="", seeds=list(range(args.seeds)),
                                standard={"bAP50": float("nan"), "bAP": float("nan")}, shots=rows, ms_per_image=0.0,
                                rival="head only" if args.head_only else "full")  # fmt: skip


def hide_others(image: np.ndarray, shots: ImageRecord, full: ImageRecord) -> None:
    """Grey over every box that is no shot, but never over a shot."""
    kept = [(box, image[int(box[1]) : int(box[3]) + 1, int(box[0]) : int(box[2]) + 1].copy()) for box in shots.boxes]
    for x0, y0, x1, y1 in full.boxes.astype(int):
        image[y0 : y1 + 1, x0 : x1 + 1] = GREY
    for box, patch in kept:
        image[int(box[1]) : int(box[3]) + 1, int(box[0]) : int(box[2]) + 1] = patch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("base", "finetune"))
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--backbone", default="yolov8n")
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--images", type=int, default=28000)
    parser.add_argument("--steps", type=int, default=600, help="batches of 16 in a fine-tuning")
    parser.add_argument("--optimizer", default="MuSGD", help="AdamW with --lr 1e-3 to fine-tune")
    parser.add_argument("--lr", type=float, default=2e-2)
    parser.add_argument("--shots", type=lambda s: [int(v) for v in s.split(",")], default=[1, 5])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--head-only", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        data = sources.load(args.data)
        result = {"base": base, "finetune": finetune}[args.what](args, data)
    except FsdetError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    name = args.what + ("_head" if args.head_only else "") + ".json"
    summary.write_json(args.out / name, result)
    print(json.dumps({k: v for k, v in result.items() if k != "shots"}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
