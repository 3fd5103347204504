# SPDX-License-Identifier: AGPL-3.0-or-later
"""A drawn RefDet set: flights over a patchwork of fields in which an object is to be found, and photographs of it.

    OUT/samples/flight_0/{drone_video.mp4, object_images/000000.jpg ...}  annotations/annotations.json  data.yaml

The objects are novel classes of the demo set, the rest of a landscape base classes: what was trained on that set can be
tried on it. A frame lists the object's box while half of it is in sight.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from fsdet.data.datayaml import write
from fsdet.data.demoset import publish
from fsdet.data.drawing.catalogue import BASE, KINDS, NOVEL
from fsdet.data.drawing.scenes import draw_scene
from fsdet.data.refdet import ANNOTATIONS, CORNERS, PHOTOGRAPHS, SAMPLES, VIDEO
from fsdet.data.synthetic import generator_sha256
from fsdet.data.video import VideoFile
from fsdet.errors import DataError, explain

SIZES: Mapping[str, int] = {"flights": 4}
FRAMES, RATE = 60, 12.0  # of a flight; frames/s
PICTURES = 3  # photographs
FIELD = 128  # px, side of a field
ROWS, COLUMNS = 2, 5  # fields of a landscape
WINDOW = (192, 192)  # height, width px of a frame
IN_SIGHT = 0.5  # share of the object's box
MARGIN = 0.12  # of the object's longer side, around it on a photograph


@dataclass(frozen=True, eq=False)
class Flight:
    """photographs: uint8 [h, w, 3] RGB each. landscape: RGB. corners: [FRAMES, 2] left, top of each frame in it.

    target: [4] xyxy px of the object in the landscape. name: its class.
    """

    photographs: list[np.ndarray]
    landscape: np.ndarray
    corners: np.ndarray
    target: np.ndarray
    name: str

    def frames(self) -> Iterator[np.ndarray]:
        for left, top in self.corners.tolist():
            yield self.landscape[top : top + WINDOW[0], left : left + WINDOW[1]]

    def truth(self) -> dict[int, list[float]]:
        """{frame: xyxy px of what is in sight of the object}, where that is at least IN_SIGHT of it."""
        found = {}
        for number, corner in enumerate(self.corners):
            box = self.target - np.tile(corner, 2)
            seen = np.clip(box, 0, [WINDOW[1], WINDOW[0]] * 2)
            sides = np.maximum(seen[2:] - seen[:2], 0)
            if sides.prod() >= IN_SIGHT * (box[2:] - box[:2]).prod():
                found[number] = seen.tolist()
        return found


def draw_flights(out: Path, seed: int = 0, sizes: Mapping[str, int] | None = None,
                 progress: Callable[[int, int], None] | None = None) -> Path:  # fmt: skip
    """Draw the set into `out` and return the path of its data.yaml; arguments and errors are those of `draw_demo`."""
    out, sizes = Path(out), dict(SIZES if sizes is None else sizes)
    if set(sizes) != set(SIZES):
        raise DataError(explain("a number of flights", ", ".join(sizes), "draw_flights sizes", "name flights"))
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    identity = {"flights_sha256": own, "generator_sha256": generator_sha256(), "opencv": cv2.__version__,
                "seed": seed, "sizes": sizes}  # fmt: skip

    def draw(draft: Path) -> None:
        rows = []
        for index in range(sizes["flights"]):
            rows.append(_write(draft, flight(seed, index), f"flight_{index}"))
            if progress:
                progress(index + 1, sizes["flights"])
        (draft / ANNOTATIONS).parent.mkdir()
        (draft / ANNOTATIONS).write_text(json.dumps(rows), encoding="utf-8")
        write(draft / "data.yaml", {"path": ".", "train": ".", "support": "."})

    return publish(out, identity, (SAMPLES, ANNOTATIONS.parent.name), draw)


def flight(seed: int, index: int) -> Flight:
    """Flight `index`, a pure function of its arguments."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(9, index)))
    label = len(BASE) + (seed + 5 * index) % len(NOVEL)
    landscape = np.zeros((ROWS * FIELD, COLUMNS * FIELD, 3), np.uint8)
    home, target = (int(rng.integers(ROWS)), int(rng.integers(1, COLUMNS - 1))), np.zeros(4)
    for row in range(ROWS):
        for column in range(COLUMNS):
            others = rng.integers(len(BASE), size=int(rng.integers(3))).tolist()
            wanted = [*others, label] if (row, column) == home else others  # the last lies on top
            drawn = draw_scene(rng, wanted, FIELD)
            top, left = row * FIELD, column * FIELD
            landscape[top : top + FIELD, left : left + FIELD] = drawn.image
            if (row, column) == home and label in drawn.labels:
                target = drawn.boxes[drawn.labels.tolist().index(label)] + np.array([left, top, left, top])
    share = np.linspace(0, 1, FRAMES)
    left = share * (landscape.shape[1] - WINDOW[1])
    top = (0.5 + 0.5 * np.sin(2 * np.pi * (share + rng.random()))) * (landscape.shape[0] - WINDOW[0])
    corners = np.stack((left, top), 1).round().astype(np.int64)
    return Flight([_photograph(rng, label) for _ in range(PICTURES)], landscape, corners, target, KINDS[label].name)


def _photograph(rng: np.random.Generator, label: int) -> np.ndarray:
    """The object by itself, nearly filling the picture."""
    while True:
        drawn = draw_scene(rng, [label], FIELD)
        if len(drawn.boxes):
            break
    x0, y0, x1, y1 = drawn.boxes[0].tolist()
    edge = MARGIN * max(x1 - x0, y1 - y0)
    top, left = max(0, round(y0 - edge)), max(0, round(x0 - edge))
    cut = drawn.image[top : round(y1 + edge), left : round(x1 + edge)]
    return cv2.resize(cut, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)


def _write(draft: Path, made: Flight, name: str) -> dict:
    """Files of one sample; its entry in the annotations."""
    place = draft / SAMPLES / name
    (place / PHOTOGRAPHS).mkdir(parents=True)
    for i, picture in enumerate(made.photographs):
        jpeg = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 92])[1]
        (place / PHOTOGRAPHS / f"{i:06d}.jpg").write_bytes(jpeg.tobytes())
    with VideoFile(place / f"{VIDEO}.mp4", RATE) as film:
        for frame in made.frames():
            film.write(frame)
    boxes = [{"frame": frame, **dict(zip(CORNERS, box, strict=True))} for frame, box in made.truth().items()]
    return {"video_id": name, "annotations": [{"bboxes": boxes}]}
