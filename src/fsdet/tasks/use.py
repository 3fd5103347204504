# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet register` and `fsdet predict`: a trained detector, a support folder, pictures out."""

import logging
from collections import Counter
from collections.abc import Sequence
from glob import glob
from pathlib import Path

import numpy as np

from fsdet.bank import PrototypeBank
from fsdet.data import sources
from fsdet.data.images import is_image, read_rgb
from fsdet.data.video import is_video
from fsdet.detect.predictor import Predictor
from fsdet.detect.runtime import PortablePredictor, open_onnx
from fsdet.detect.support import VIEWS
from fsdet.errors import CheckpointError, DataError, UserError, explain
from fsdet.evaluation.summary import write_json
from fsdet.files import is_json_with, refuse_foreign, write_durably
from fsdet.models.build import model_sha256
from fsdet.pictures import draw_detections, save_jpeg
from fsdet.progress import track
from fsdet.tasks.loading import load_trained
from fsdet.types import Detections

log = logging.getLogger("fsdet")
BRANCHES = ("standard", "prototype")
SHORT = ("std", "proto")  # the branch, beside a box


def predictor_of(checkpoint: Path, bank: PrototypeBank | None = None, device: str = "cpu") -> Predictor:
    """The Predictor of a checkpoint, on cpu, cuda, cuda:N, mps or what `auto` finds."""
    trained = load_trained(checkpoint, device)
    spec = trained.spec
    if spec["stage"] == "base":
        log.warning("%s is of stage 1, which has seen no episode: registered classes will be found where they are not; "
                    "train stage 2", checkpoint)  # fmt: skip
    return Predictor(trained.model, trained.classes, trained.preprocessing, bank,
                     base=len(spec["base"]), mode=spec["mode"])  # fmt: skip


def register(checkpoint: Path, support: Path, out: Path, device: str = "cpu", into: Path | None = None, *,
             views: bool = True) -> PrototypeBank:  # fmt: skip
    """Every class of a support folder (support/<class>/*.jpg, boxes beside them or the whole image) into a bank file.

    into: a bank whose classes and shots are kept beside. views: read each shot at three scales and mirrored.
    Raises:
        DataError: the folder has no class or no readable image. CheckpointError: the checkpoint, or `into`.
    """
    predictor = predictor_of(checkpoint, PrototypeBank.load(into) if into else None, device)
    predictor.views = VIEWS if views else VIEWS[:1]
    _register_folder(predictor, support)
    bank = predictor.bank
    bank.save(out)
    return bank


def _register_folder(predictor: Predictor, support: Path) -> None:
    names, records = sources.support_folder(support)
    for label, name in enumerate(names):
        if name in predictor.classes:
            log.warning("'%s' is a class of the detector itself: what is registered stands in its place", name)
        predictor.register(name, [r.kept(r.labels == label) for r in records if label in r.labels])
    for line in predictor.odd_shots():
        log.warning("%s", line)


def predict(checkpoint: Path | None, *, source: Path, out: Path, support: Path | None = None, bank: Path | None = None,
            conf: float | None = None, device: str = "cpu", onnx: Path | None = None,
            txt: bool = False) -> str:  # fmt: skip
    """Annotated copies of images in `out`, and predictions.json; returns a summary.

    source: an image, a folder, or a pattern such as photos/*.jpg. txt: also out/labels/IMAGE.txt, rows of `yolo_rows`.

    conf: least score of every class; None takes each registered class's own threshold, and .25 for the others.
    onnx: run this file of fsdet export instead; a checkpoint beside it must be what it was made of.

    Raises:
        DataError: nothing to look at, or an unreadable image. UserError: `out` is no folder, or the source's.
    """
    paths = image_paths(source)
    drawings = _drawings(paths, out)
    predictor = finder(checkpoint, support=support, bank=bank, device=device, onnx=onnx)
    out.mkdir(parents=True, exist_ok=True)
    rows, count, unread = [], Counter(dict.fromkeys(predictor.registered, 0)), []
    for path, drawing in track(list(zip(paths, drawings, strict=True)), "predict"):
        try:
            image = read_rgb(path)
        except DataError as error:
            if len(paths) == 1:
                raise
            unread.append(str(error))
            continue
        found = predictor.predict(image, threshold=conf)
        rows += coco_rows(found, path.name)
        count.update(predictor.names[i] for i in found.labels.tolist())
        save_jpeg(drawing, query_drawing(image, found, predictor.names))
        if txt:
            write_durably(out / "labels" / f"{drawing.stem}.txt", yolo_rows(found, image.shape[:2]).encode())
    write_json(out / "predictions.json", {"names": list(predictor.names), "predictions": rows})
    others = Counter({name: n for name, n in count.items() if name not in predictor.registered}).most_common(12)
    seen = [f"{n} {name}" for name, n in [*((name, count[name]) for name in predictor.registered), *others]]
    lines = [f"{len(paths) - len(unread)} images, {len(rows)} detections ({', '.join(seen) or 'none'}) -> {out}"]
    return "\n".join([*lines, *(f"left out: {text}" for text in unread)])


def finder(checkpoint: Path | None, *, support: Path | None = None, bank: Path | None = None, device: str = "cpu",
           onnx: Path | None = None) -> Predictor | PortablePredictor:  # fmt: skip
    """What looks at pictures: a checkpoint with a bank or a support folder registered, or an exported file."""
    if onnx:
        return portable_predictor(onnx, bank, checkpoint)
    predictor = predictor_of(checkpoint, PrototypeBank.load(bank) if bank else None, device)
    if support:
        _register_folder(predictor, support)
    return predictor


def portable_predictor(onnx: Path, bank: Path | None = None, checkpoint: Path | None = None) -> PortablePredictor:
    """The predictor of an ONNX file, with a bank where prototypes are its input.

    Raises:
        CheckpointError: not such a file, or, where a checkpoint is named too, one of other weights.
    """
    predictor = PortablePredictor(open_onnx(onnx), PrototypeBank.load(bank) if bank else None, str(onnx))
    theirs = model_sha256(load_trained(checkpoint).model) if checkpoint else predictor.card.model_sha256
    if theirs != predictor.card.model_sha256:
        raise CheckpointError(explain(f"an export of {checkpoint} ({theirs[:12]})",
                                      f"one of other weights ({predictor.card.model_sha256[:12]})", str(onnx),
                                      "export it again, or leave the checkpoint out"))  # fmt: skip
    return predictor


def query_drawing(image: np.ndarray, found: Detections, names: Sequence[str]) -> np.ndarray:
    """uint8 RGB copy of `image` with each detection's class, score and branch."""
    labels = found.labels.tolist()
    columns = zip(labels, found.scores.tolist(), found.branch.tolist(), strict=True)
    texts = [f"{names[i]} {score:.2f} {SHORT[branch]}" for i, score, branch in columns]
    return draw_detections(image, found.boxes.cpu().numpy(), texts, labels, long_side=640)


def image_paths(source: Path) -> list[Path]:
    """`source` itself, a folder's images by name, or those that a pattern fits.

    Raises:
        DataError: there is none, or it is a video.
    """
    wanted = "an image or a folder of images"
    if not source.exists():
        fitting = sorted(Path(found) for found in glob(str(source), recursive=True))
        if paths := [path for path in fitting if is_image(path.name) and path.is_file()]:
            return paths
        raise DataError(explain(wanted, "nothing there", str(source), "check --source; a pattern is photos/*.jpg"))
    if source.is_file():
        if is_video(source):
            raise DataError(explain(wanted, "a video", str(source), "write its frames into a folder and name that"))
        return [source]
    paths = sorted(p for p in source.iterdir() if is_image(p.name) and p.is_file())
    if not paths:
        raise DataError(explain(wanted, "no image", str(source), "check --source"))
    return paths


def _drawings(paths: Sequence[Path], out: Path) -> list[Path]:
    """Where each image's annotated copy goes: STEM.jpg, and with its old suffix where two stems are the same.

    Raises:
        UserError: `out` is a file, or the folder that the images are in.
    """
    if out.exists() and not out.is_dir():
        raise UserError(explain("a folder", "a file", str(out), "name another --out"))
    refuse_foreign(out / "predictions.json", "what fsdet predict wrote", is_json_with("names", "predictions"))
    if out.resolve() in {path.parent.resolve() for path in paths}:
        raise UserError(explain("a folder beside the images", "the images' own", str(out), "name another --out"))
    taken: set[str] = set()
    drawings = []
    for path in paths:
        name = path.stem
        while name.casefold() in taken:
            name = path.name if name == path.stem else f"{name}_"
        taken.add(name.casefold())
        drawings.append(out / f"{name}.jpg")
    taken_by_others = [d for d in drawings if d.exists()] if not (out / "predictions.json").exists() else []
    if taken_by_others:
        raise UserError(explain("a folder without these files", f"{taken_by_others[0].name} and "
                                f"{len(taken_by_others) - 1} more", str(out), "name another --out"))  # fmt: skip
    return drawings


def yolo_rows(found: Detections, size: tuple[int, int]) -> str:
    """A line a detection: label, centre x, centre y, width, height as shares of an image of (height, width), score."""
    h, w = size
    boxes = found.boxes.double().cpu().numpy() / [w, h, w, h]
    low, high = boxes[:, :2], boxes[:, 2:]
    rows = np.concatenate(((low + high) / 2, high - low), 1).tolist()
    columns = zip(found.labels.tolist(), rows, found.scores.tolist(), strict=True)
    return "".join(f"{label} {' '.join(f'{v:.6f}' for v in row)} {score:.5f}\n" for label, row, score in columns)


def coco_rows(found: Detections, name: str | int) -> list[dict]:
    """COCO results of an image: bbox xywh px, category_id the label, and the branch."""
    boxes = found.boxes.clone()
    boxes[:, 2:] -= boxes[:, :2]
    columns = zip(boxes.tolist(), found.scores.tolist(), found.labels.tolist(), found.branch.tolist(), strict=True)
    return [{"image": name, "bbox": [round(v, 2) for v in box], "score": round(score, 5), "category_id": label,
             "branch": BRANCHES[branch]} for box, score, label, branch in columns]  # fmt: skip
