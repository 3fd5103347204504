# SPDX-License-Identifier: AGPL-3.0-or-later
"""`from fsdet import Predictor`: a checkpoint in somebody's own program. Register a few pictures, find it in others.

from fsdet import Predictor
detector = Predictor("checkpoints/stage2/best.pt")
detector.register("mug", ["one.jpg", "two.jpg"])
found = detector.predict("photo.jpg")
found.plot("found.jpg")
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import IOBase
from pathlib import Path

import numpy as np

from fsdet.bank import PrototypeBank
from fsdet.data.images import Picture, rgb_of
from fsdet.detect.postprocess import NMS_IOU
from fsdet.detect.support import VIEWS
from fsdet.errors import DataError, UserError, did_you_mean, explain
from fsdet.files import refuse_foreign
from fsdet.pictures import is_picture, save_jpeg
from fsdet.tasks.use import BRANCHES, coco_rows, predictor_of, query_drawing, tell_of_own, yolo_rows
from fsdet.types import Detections

BOTH = "dual"
JPEG = (".jpg", ".jpeg")


@dataclass(frozen=True, eq=False)
class Found(Detections):
    """Detections of one image, best first, with what it takes to tell of them.

    names: by label. pixels: uint8 [H, W, 3] RGB, the image. source: its path, or "array 1", "image 2".
    """

    names: tuple[str, ...]
    pixels: np.ndarray
    source: str

    def to_coco(self, image: str | int | None = None) -> list[dict]:
        """COCO results: image (its path by default), bbox xywh px, score, category_id, which is the label, branch."""
        return coco_rows(self, self.source if image is None else image)

    def to_yolo(self) -> str:
        """A line a detection: label, centre x, centre y, width, height as shares of the image, score."""
        return yolo_rows(self, self.pixels.shape[:2])

    def plot(self, path: str | Path | None = None) -> np.ndarray:
        """uint8 RGB copy of the image with boxes, classes, scores and branches; also written to `path` as JPEG.

        Raises:
            UserError: `path` does not end as a JPEG does, or a file lies there that was not drawn here.
        """
        if path is not None:
            if Path(path).suffix.lower() not in JPEG:
                raise UserError(explain(f"a name that ends in {' or '.join(JPEG)}", Path(path).name, "plot",
                                        "name a JPEG file; save the returned array for another kind"))  # fmt: skip
            refuse_foreign(Path(path), "a picture of fsdet", is_picture)
        drawn = query_drawing(self.pixels, self, self.names)
        if path is not None:
            save_jpeg(path, drawn)
        return drawn


class Predictor:
    """A trained detector that learns new classes from a few pictures, without training.

    Args:
        checkpoint: best.pt of stage 2 or 3. bank: classes registered before, by the same weights.
        device: auto, cpu, mps, cuda or cuda:N. order: what arrays are, "rgb" or "bgr" (OpenCV's); files are RGB.
        views: whether each shot is read at three scales and mirrored: six times the work, .05 nAP50 at 1 shot.
        rescore: whether what was found is looked at a second time: surer scores for some 2.5 times the time.
    Raises:
        CheckpointError: the checkpoint or the bank. ConfigError: no such device. UserError: another order.
    """

    def __init__(self, checkpoint: str | Path, bank: str | Path | None = None, *, device: str = "auto",
                 order: str = "rgb", views: bool = True, rescore: bool = False) -> None:  # fmt: skip
        if order not in ("rgb", "bgr"):
            raise UserError(explain("rgb or bgr", repr(order), "Predictor order", "name the order of your arrays"))
        loaded = PrototypeBank.load(Path(bank)) if bank else None
        self._own = predictor_of(Path(checkpoint), loaded, device, rescore=rescore)
        self._own.views = VIEWS if views else VIEWS[:1]
        self._order, self._arrays = order, 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names by label: the detector's own classes, then the registered ones."""
        return self._own.names

    @property
    def bank(self) -> PrototypeBank:
        """The registered classes; `.save(path)` keeps them for `fsdet predict --bank`."""
        return self._own.bank

    def register(self, name: str, images: Picture | Iterable[Picture],
                 boxes: Sequence | np.ndarray | None = None) -> None:  # fmt: skip
        """Add shots of class `name`, which stand in the place of a class of that name that the detector has itself.

        Args:
            images: a path, an array or a PIL image (see `predict`), or a list of them.
            boxes: for each image [4] or [m, 4] xyxy px, each box a shot; for one image its boxes. None: the object
                fills its image.
        Raises:
            DataError: an image cannot be read, or a box is empty, not finite or outside of its image. UserError: what
                is no image, not boxes for each image, or a name that is none.
        """
        pictures = list(images) if _are_several(images) else [images]
        given = [None] * len(pictures) if boxes is None else [boxes] if len(pictures) == 1 else list(boxes)
        if len(given) != len(pictures):
            raise UserError(explain(f"boxes for each of {len(pictures)} images", f"for {len(given)}", f"'{name}'",
                                    "give a list with an entry for each image"))  # fmt: skip
        shots = []
        for picture, own in zip(pictures, given, strict=True):
            pixels, source = self._read(picture)
            shots.append((source, pixels, _boxes(own, pixels.shape[:2], source)))
        tell_of_own(self._own, name)
        self._own.add(name, shots)

    def predict(self, images: Picture | Iterable[Picture], threshold: float | None = None, *, branch: str = BOTH,
                iou: float = NMS_IOU) -> Found | list[Found]:  # fmt: skip
        """Detections of an image, or of each of a list.

        Args:
            images: a path; an array, uint8 or uint16 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (transparency is
                laid on white); a PIL image, which is read as its file would be; or a list of them.
            threshold: least score; None takes the one that each registered class proposed, and .25 for the others.
            branch: standard, prototype or dual; one alone has its scores of dual. iou: overlap above which a
                class's weaker box goes.
        Raises:
            DataError: an image cannot be read or an array is no image. UserError: something else than an image, or no
                such branch.
        """
        if branch not in (*BRANCHES, BOTH):
            hint = did_you_mean(branch, (*BRANCHES, BOTH))
            raise UserError(explain(f"one of {', '.join((*BRANCHES, BOTH))}", f"{branch!r}.{hint}", "predict branch",
                                    "correct it"))  # fmt: skip
        only = None if branch == BOTH else BRANCHES.index(branch)
        if _are_several(images):
            return [self._found(image, threshold, iou, only) for image in images]
        return self._found(images, threshold, iou, only)

    def _found(self, picture: Picture, threshold: float | None, iou: float, branch: int | None) -> Found:
        pixels, source = self._read(picture)
        found = self._own.predict(pixels, threshold, iou, branch)
        return Found(found.boxes, found.scores, found.labels, found.branch, self.names, pixels, source)

    def _read(self, picture: Picture) -> tuple[np.ndarray, str]:
        """uint8 RGB pixels, and a name."""
        pixels = rgb_of(picture, self._order)
        if isinstance(picture, str | os.PathLike):
            return pixels, str(picture)
        self._arrays += 1
        return pixels, f"{'array' if isinstance(picture, np.ndarray) else 'image'} {self._arrays}"


def _are_several(images: Picture | Iterable[Picture]) -> bool:
    """Whether it is a list of images rather than one, or than something that is none."""
    one = isinstance(images, str | bytes | os.PathLike | Mapping | IOBase) or hasattr(images, "__array__")
    return isinstance(images, Iterable) and not one


def _boxes(given: Sequence | np.ndarray | None, size: tuple[int, int], where: str) -> np.ndarray:
    """[m, 4] float32 xyxy px inside an image of (height, width); None is all of it. Raises DataError."""
    h, w = size
    if given is None:
        return np.array([[0, 0, w, h]], np.float32)
    boxes = np.atleast_2d(np.asarray(given, np.float32))
    if boxes.ndim == 3 and len(boxes) == 1:
        boxes = boxes[0]
    shaped = boxes.ndim == 2 and boxes.shape[1] == 4
    if not shaped or not np.isfinite(boxes).all():
        got = str(boxes[~np.isfinite(boxes).all(1)][0].tolist()) if shaped else f"shape {list(boxes.shape)}"
        raise DataError(explain("boxes [m, 4] of x1, y1, x2, y2 px", got, where,
                                "give four finite numbers for each box"))  # fmt: skip
    cut = np.clip(boxes, 0, [w, h, w, h])
    empty = ((cut[:, 2:] - cut[:, :2]) < 1).any(1)
    if empty.any():
        raise DataError(explain(f"boxes of at least a px inside {w} x {h} px", str(boxes[empty][0].tolist()), where,
                                "correct the box; corners are x1, y1, x2, y2"))  # fmt: skip
    return cut
