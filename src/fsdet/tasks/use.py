# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet register` and `fsdet predict`: a trained detector, a support folder, pictures out."""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fsdet.bank import PrototypeBank
from fsdet.data import sources
from fsdet.data.images import read_rgb
from fsdet.detect.predictor import Predictor
from fsdet.errors import DataError, explain
from fsdet.evaluation.summary import write_json
from fsdet.pictures import draw_detections, save_jpeg
from fsdet.progress import track
from fsdet.tasks.loading import load_trained
from fsdet.types import Detections, ImageRecord

log = logging.getLogger("fsdet")
IMAGES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
BRANCHES = ("standard", "prototype")


def predictor_of(checkpoint: Path, bank: PrototypeBank | None = None) -> Predictor:
    """The Predictor of a checkpoint."""
    trained = load_trained(checkpoint)
    spec = trained.spec
    return Predictor(trained.model, trained.classes, spec["image_size"], spec["support_size"], bank,
                     base=len(spec["base"]), mode=spec["mode"])  # fmt: skip


def register(checkpoint: Path, support: Path, out: Path) -> PrototypeBank:
    """Every class of a support folder (support/<class>/*.jpg, boxes beside them or the whole image) into a bank file.

    Raises:
        DataError: the folder has no class or no readable image. CheckpointError: the checkpoint.
    """
    predictor = predictor_of(checkpoint)
    _register_folder(predictor, support)
    predictor.bank.save(out)
    return predictor.bank


def _register_folder(predictor: Predictor, support: Path) -> None:
    names, records = sources.support_folder(support)
    for label, name in enumerate(names):
        predictor.register(name, [_only(r, label) for r in records if (r.labels == label).any()])


def _only(record: ImageRecord, label: int) -> ImageRecord:
    """`record` with the boxes of one class."""
    keep = record.labels == label
    return replace(record, boxes=record.boxes[keep], labels=record.labels[keep], crowd=record.crowd[keep])


def predict(checkpoint: Path, *, source: Path, out: Path, support: Path | None = None, bank: Path | None = None,
            conf: float = 0.25) -> str:  # fmt: skip
    """Annotated copies of an image or a folder's images in `out`, and predictions.json; returns a summary.

    Raises:
        DataError: nothing to look at, or an unreadable image.
    """
    predictor = predictor_of(checkpoint, PrototypeBank.load(bank) if bank else None)
    if support:
        _register_folder(predictor, support)
    paths = image_paths(source)
    out.mkdir(parents=True, exist_ok=True)
    rows, count = [], Counter()
    for path in track(paths, "predict"):
        image = read_rgb(path)
        found = predictor.predict(image, threshold=conf)
        rows += _coco_rows(found, path.name)
        count.update(predictor.names[i] for i in found.labels.tolist())
        save_jpeg(out / f"{path.stem}.jpg", query_drawing(image, found, predictor.names))
    write_json(out / "predictions.json", {"names": list(predictor.names), "predictions": rows})
    seen = ", ".join(f"{n} {name}" for name, n in count.most_common(12)) or "nothing above the threshold"
    return f"{len(paths)} images, {len(rows)} detections ({seen}) -> {out}"


def query_drawing(image: np.ndarray, found: Detections, names: Sequence[str]) -> np.ndarray:
    """uint8 RGB copy of `image` with each detection's class, score and branch."""
    labels = found.labels.tolist()
    columns = zip(labels, found.scores.tolist(), found.branch.tolist(), strict=True)
    texts = [f"{names[i]} {score:.2f} {BRANCHES[branch][0]}" for i, score, branch in columns]
    return draw_detections(image, found.boxes.cpu().numpy(), texts, labels, long_side=640)


def image_paths(source: Path) -> list[Path]:
    """`source` itself, or a folder's images by name. Raises DataError when there is none."""
    paths = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.suffix.lower() in IMAGES)
    if not paths:
        raise DataError(explain("an image or a folder of images", "no image", str(source), "check --source"))
    return paths


def _coco_rows(found: Detections, name: str) -> Sequence[dict]:
    boxes = found.boxes.clone()
    boxes[:, 2:] -= boxes[:, :2]
    columns = zip(boxes.tolist(), found.scores.tolist(), found.labels.tolist(), found.branch.tolist(), strict=True)
    return [{"image": name, "bbox": [round(v, 2) for v in box], "score": round(score, 5), "category_id": label,
             "branch": BRANCHES[branch]} for box, score, label, branch in columns]  # fmt: skip
