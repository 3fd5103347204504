# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet register` and `fsdet predict`: a trained detector, a support folder, pictures out."""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any

import numpy as np

from fsdet.bank import PrototypeBank
from fsdet.data import sources
from fsdet.data.images import is_image, read_rgb
from fsdet.data.video import is_video
from fsdet.detect.predictor import Predictor
from fsdet.detect.runtime import PortablePredictor, open_onnx
from fsdet.detect.support import VIEWS
from fsdet.engine.signals import Signals
from fsdet.errors import CheckpointError, DataError, Stopped, UserError, counted, explain, some
from fsdet.evaluation.summary import write_json
from fsdet.files import readable
from fsdet.models.build import model_sha256
from fsdet.pictures import draw_detections, jpeg
from fsdet.progress import track
from fsdet.registered import class_name
from fsdet.tasks.loading import load_trained
from fsdet.types import Detections
from fsdet.written import Journal, earlier, refuse_others, remove_unchanged

log = logging.getLogger("fsdet")
BRANCHES = ("standard", "prototype")
INDEX = "predictions.json"
SHORT = ("std", "proto")  # the branch, beside a box


def predictor_of(checkpoint: Path, bank: PrototypeBank | None = None, device: str = "cpu", *,
                 rescore: bool = False) -> Predictor:  # fmt: skip
    """The Predictor of a checkpoint, on cpu, cuda, cuda:N, mps or what `auto` finds."""
    trained = load_trained(checkpoint, device)
    spec = trained.spec
    if spec["stage"] == "base":
        log.warning("%s is of stage 1, which has seen no episode: registered classes will be found where they are not; "
                    "train stage 2", checkpoint)  # fmt: skip
    return Predictor(trained.model, trained.classes, trained.preprocessing, bank,
                     base=len(spec["base"]), mode=spec["mode"], rescore=rescore)  # fmt: skip


def registered(checkpoint: Path, support: Path, device: str = "cpu", into: Path | None = None, *,
               views: bool = True) -> PrototypeBank:  # fmt: skip
    """Every class of a support folder (support/<class>/*.jpg, boxes beside them or the whole image) as a bank.

    into: a bank whose classes and shots are kept beside. views: read each shot at three scales and mirrored.
    Raises:
        DataError: the folder has no class or no readable image. CheckpointError: the checkpoint, or `into`.
    """
    predictor = predictor_of(checkpoint, PrototypeBank.load(into) if into else None, device)
    predictor.views = VIEWS if views else VIEWS[:1]
    _register_folder(predictor, support)
    return predictor.bank


def _register_folder(predictor: Predictor, support: Path) -> None:
    names, records = sources.support_folder(support)
    for label, name in enumerate(names):
        tell_of_own(predictor, name)
        predictor.register(name, [r.kept(r.labels == label) for r in records if label in r.labels])
    for line in predictor.odd_shots():
        log.warning("%s", line)


def tell_of_own(predictor: Predictor, name: str) -> None:
    """Warn, before the first shot of class `name` is added, that the detector has a class of that name itself.

    Raises:
        UserError: the name is none.
    """
    name = class_name(name)
    if name in predictor.classes and name not in predictor.registered:
        log.warning("'%s' is a class of the detector itself: what is registered stands in its place", name)


def predict(checkpoint: Path | None, *, source: Path, out: Path, support: Path | None = None, bank: Path | None = None,
            conf: float | None = None, device: str = "cpu", onnx: Path | None = None, txt: bool = False,
            rescore: bool = False) -> str:  # fmt: skip
    """Annotated copies of images in `out`, and predictions.json; returns a summary.

    source: an image, a folder, or a pattern such as photos/*.jpg. txt: also out/labels/IMAGE.txt, rows of `yolo_rows`.

    conf: least score of every class; None takes each registered class's own threshold, and .25 for the others.
    onnx: run this file of fsdet export instead; a checkpoint beside it must be what it was made of.
    rescore: look at what was found a second time.

    Raises:
        DataError: nothing to look at, or an unreadable image. UserError: `out` is no folder, the source's, or holds
        files of others. Stopped: a signal came; what was found until then has been written.
    """
    paths = image_paths(source)
    copies = Copies(paths, out, txt)
    predictor = finder(checkpoint, support=support, bank=bank, device=device, onnx=onnx, rescore=rescore)
    with Signals() as signals:
        for i in track(range(len(paths)), "predict"):
            copies.take(i, predictor, conf)
            if signals.received:
                break
    told = copies.close(predictor, conf, whole=not signals.received)
    if signals.received:
        raise Stopped(f"stopped, and what was found is kept. {told}", signals.received)
    return told


class Copies:
    """What is written of some images: copies, labels, and predictions.json, which lists them.

    Raises:
        UserError: see `predict`.
    """

    def __init__(self, paths: Sequence[Path], out: Path, txt: bool) -> None:
        same = Counter(readable(path.name) for path in paths)
        self._paths, self._out, self._txt = paths, out, txt
        self._names = [readable(path.name if same[readable(path.name)] == 1 else path.as_posix()) for path in paths]
        self._stems = _stems(paths)
        self._rows: list[dict] = []
        self._written: dict[str, str] = {}
        self._pictures: dict[str, str] = {}
        self._unread: list[str] = []
        self._journal = Journal(out / INDEX)
        if out.resolve() in {path.parent.resolve() for path in paths}:
            raise UserError(explain("a folder beside the images", "the images' own", str(out), "name another --out"))
        wanted = [out / name for stem in self._stems for name in self._files(stem)]
        refuse_others(out, INDEX, "what fsdet predict wrote", ("names", "predictions"), wanted)

    def _files(self, stem: str) -> list[str]:
        return [f"{stem}.jpg", *([f"labels/{stem}.txt"] if self._txt else [])]

    def take(self, i: int, predictor: Predictor | PortablePredictor, conf: float | None) -> None:
        """Look at image i; one that cannot be read is left out, unless it is the only one."""
        try:
            image = read_rgb(self._paths[i])
        except DataError as error:
            if len(self._paths) == 1:
                raise
            self._unread.append(str(error))
            return
        found = predictor.predict(image, threshold=conf)
        files = self._files(self._stems[i])
        contents = [jpeg(query_drawing(image, found, predictor.names)), yolo_rows(found, image.shape[:2]).encode()]
        self._written |= self._journal.write(self._out, dict(zip(files, contents, strict=False)))  # labels if wanted
        self._rows += coco_rows(found, self._names[i])
        self._pictures[self._names[i]] = files[0]

    def close(self, predictor: Predictor | PortablePredictor, conf: float | None, whole: bool = True) -> str:
        """Write predictions.json and, where every image could be looked at, remove what an earlier run wrote and this
        one did not; returns the summary."""
        self._out.mkdir(parents=True, exist_ok=True)
        index, names = self._out / INDEX, predictor.names
        content = {"names": list(names), "made_by": made_by(predictor, conf), "pictures": self._pictures,
                   "predictions": self._rows}  # fmt: skip
        cleared = write_index(index, content, self._written, clear=whole and not self._unread)
        self._journal.close()
        count = Counter(names[row["category_id"]] for row in self._rows)
        others = Counter({name: n for name, n in count.items() if name not in predictor.registered}).most_common(12)
        seen = [f"{n} {name}" for name, n in [*((name, count[name]) for name in predictor.registered), *others]]
        looked = f"{counted(len(self._pictures), 'image')}, {counted(len(self._rows), 'detection')}"
        lines = [f"{looked} ({', '.join(seen) or 'none'}) -> {self._out}"]
        return "\n".join([*lines, *(f"left out: {text}" for text in self._unread), *cleared])


def made_by(predictor: Predictor | PortablePredictor, conf: float | None) -> dict[str, Any]:
    """What predictions.json says of where they are from; conf: the least score, None for each class its own."""
    return {**predictor.made_by, "conf": conf}


def write_index(index: Path, content: Mapping[str, Any], written: Mapping[str, str], *, clear: bool) -> list[str]:
    """Write predictions.json with the files beside it; returns lines about those of earlier runs, which are no results
    of this one.

    Args:
        written: {name: sha256} of this run's files, "" for one that no later run shall remove.
        clear: remove files of earlier runs, those that are as they were written.
    """
    old = earlier(index, written)
    known = old | dict(written)

    def write(names: Iterable[str]) -> None:
        of_each = {name: known[name] for name in names if known.get(name)}
        write_json(index, {**content, "written": sorted(names), "sha256": of_each})

    write([*written, *old])
    stay = dict.fromkeys(old, "as this one did not look at everything")
    if clear:
        stay = remove_unchanged(index.parent, old)
    lines = []
    if removed := len(old) - len(stay):
        write([*written, *stay])
        lines.append(f"removed {counted(removed, 'file')} of an earlier predict that this one did not write again")
    for why in dict.fromkeys(stay.values()):
        names = [name for name, reason in stay.items() if reason == why]
        lines.append(f"still there: {counted(len(names), 'file')} of an earlier predict, {why} ({some(names)})")
    return lines


def finder(checkpoint: Path | None, *, support: Path | None = None, bank: Path | None = None, device: str = "cpu",
           onnx: Path | None = None, rescore: bool = False) -> Predictor | PortablePredictor:  # fmt: skip
    """What looks at pictures: a checkpoint with a bank or a support folder registered, twice with `rescore`, or an
    exported file, which looks once."""
    if onnx:
        return portable_predictor(onnx, bank, checkpoint)
    predictor = predictor_of(checkpoint, PrototypeBank.load(bank) if bank else None, device, rescore=rescore)
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
    """`source` itself, a folder's images by name, or those that a pattern fits; one may turn out to be none.

    Raises:
        DataError: there is none, or it is a video.
    """
    wanted = "an image or a folder of images"
    if not source.exists():
        fitting = sorted(Path(found) for found in glob(str(source), recursive=True))
        if paths := [path for path in fitting if is_image(path.name)]:
            return paths
        raise DataError(explain(wanted, "nothing there", str(source), "check --source; a pattern is photos/*.jpg"))
    if source.is_file():
        if is_video(source):
            raise DataError(explain(wanted, "a video", str(source), "write its frames into a folder and name that"))
        return [source]
    paths = sorted(p for p in source.iterdir() if is_image(p.name))
    if not paths:
        raise DataError(explain(wanted, "no image", str(source), "check --source"))
    return paths


def _stems(paths: Sequence[Path]) -> list[str]:
    """What each image's files are called: its stem, and with its old suffix where two stems are the same."""
    taken: set[str] = set()
    stems = []
    for path in paths:
        stem = name = readable(path.stem)
        while name.casefold() in taken:
            name = readable(path.name) if name == stem else f"{name}_"
        taken.add(name.casefold())
        stems.append(name)
    return stems


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
