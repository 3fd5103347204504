# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet predict` on a video file or a camera: every frame detected, its objects followed, the frames written anew."""

import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from fsdet.data.video import Video, VideoFile
from fsdet.detect.predictor import Predictor
from fsdet.detect.runtime import PortablePredictor
from fsdet.detect.tracks import Tracked, Tracker
from fsdet.engine.signals import Signals
from fsdet.errors import Stopped, UserError, counted, explain
from fsdet.files import readable, sha256_of
from fsdet.pictures import draw_detections
from fsdet.progress import Progress
from fsdet.tasks.use import INDEX, SHORT, coco_rows, finder, made_by, write_index, yolo_rows
from fsdet.written import Journal, refuse_others

log = logging.getLogger("fsdet")
LONG_SIDE = 640  # px: smaller frames are enlarged, so that labels can be read
HELD = 2.0  # s of a camera's frames that tell how fast they come, before a file needs a rate
PACES = (1.0, 60.0)  # frames/s of a camera's copy


@dataclass(frozen=True)
class Wanted:
    """What to write of a video. frames: at most so many; film: the annotated copy; txt: a label file a frame."""

    conf: float | None = None
    frames: int | None = None
    film: bool = True
    txt: bool = False


def predict(checkpoint: Path | None, *, source: Path | int, out: Path, support: Path | None = None,
            bank: Path | None = None, device: str = "cpu", onnx: Path | None = None, rescore: bool = False,
            wanted: Wanted = Wanted()) -> str:  # fmt: skip
    """OUT/STEM.mp4, OUT/predictions.json and, where wanted, OUT/labels/STEM_000000.txt; returns a summary.

    source: a video file, or the index of a camera. A signal ends a camera's video; one of a file raises Stopped after
    what was found has been written. Other arguments are those of `use.predict`.

    Raises:
        DataError: no such camera or file, or nothing can be decoded of it. UserError: `out` is the video's own folder
        or holds files of others. Stopped: see above.
    """
    with Video(source) as video:
        name = readable(source.name) if isinstance(source, Path) else f"camera{source}"
        copy = Copy(out, Path(name).stem, name, wanted)
        _refuse(copy, source)
        predictor = finder(checkpoint, support=support, bank=bank, device=device, onnx=onnx, rescore=rescore)
        with Signals() as signals:
            began = time.monotonic()
            cleared = copy.fill(predictor, video, signals)
            rate = video.read / max(time.monotonic() - began, 1e-9)
        told = copy.summary(predictor, rate)
        whole = not signals.received and video.read != wanted.frames
        told = "\n".join([told, *([video.told()] if whole and video.told() else []), *cleared])
        if signals.received and isinstance(source, Path):
            raise Stopped(f"stopped after {counted(video.read, 'frame')}, and what was found is kept. {told}",
                          signals.received)  # fmt: skip
        return told


def follow(predictor: Predictor | PortablePredictor, video: Video,
           conf: float | None = None) -> Iterator[tuple[int, np.ndarray, Tracked]]:  # fmt: skip
    """(number, uint8 [H, W, 3] RGB, the objects in sight) of each frame; a track keeps its number through the video."""
    limits = predictor.frozen()[1] if isinstance(predictor, Predictor) else predictor.limits
    tracker = Tracker(limits if conf is None else torch.full_like(limits, conf), video.rate)
    for number, frame in video.frames():
        found = predictor.predict(frame, threshold=tracker.least)
        yield number, frame, tracker.update(number, found, frame.shape[:2])


def frame_drawing(image: np.ndarray, found: Tracked, names: tuple[str, ...]) -> np.ndarray:
    """uint8 RGB copy of a frame with class, score, track and branch of each object, in a colour of its track."""
    columns = zip(*(getattr(found, f).tolist() for f in ("labels", "scores", "track", "branch")), strict=True)
    texts = [f"{names[i]} {score:.2f} #{track} {SHORT[branch]}" for i, score, track, branch in columns]
    colours = [track - 1 for track in found.track.tolist()]
    return draw_detections(image, found.boxes.numpy(), texts, colours, long_side=LONG_SIDE)


def track_rows(found: Tracked, name: str, frame: int) -> list[dict]:
    """COCO results of a frame, with `frame` (from 0) and `track` (from 1)."""
    rows = coco_rows(found, name)
    return [{**row, "frame": frame, "track": track} for row, track in zip(rows, found.track.tolist(), strict=True)]


@dataclass
class Copy:
    """What is written of one video. stem: of its files; name: the `image` of its rows; tracks: {number: label}."""

    out: Path
    stem: str
    name: str
    wanted: Wanted
    rows: list[dict] = field(default_factory=list)
    tracks: dict[int, int] = field(default_factory=dict)
    frames: int = 0

    def __post_init__(self) -> None:
        self._journal = Journal(self.out / INDEX, removable=False)  # what a camera saw cannot be had again

    @property
    def film(self) -> Path:
        return self.out / f"{self.stem}.mp4"

    def label(self, frame: int) -> Path:
        return self.out / "labels" / f"{self.stem}_{frame:06d}.txt"

    def labels(self) -> list[Path]:
        """Label files of frames that are there already."""
        fitting = re.compile(re.escape(self.stem) + r"_\d{6}\.txt")
        return sorted(p for p in (self.out / "labels").glob("*.txt") if fitting.fullmatch(p.name))

    def fill(self, predictor: Predictor | PortablePredictor, video: Video, signals: Signals) -> list[str]:
        """All frames, or until a signal comes; predictions.json is written last. Returns what `write_index` tells."""
        total = video.announced or None
        if self.wanted.frames:
            total = min(total or self.wanted.frames, self.wanted.frames)
        for old in self.labels():
            old.unlink()
        self.out.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            bar = stack.enter_context(Progress(total, "predict", unit="frame"))
            film = stack.enter_context(_Paced(self.film, video, self._note)) if self.wanted.film else None
            for number, frame, found in follow(predictor, video, self.wanted.conf):
                self._take(number, frame, found)
                if film:
                    film.write(frame_drawing(frame, found, predictor.names))
                bar.update(tracks=len(self.tracks))
                if signals.received or self.frames == self.wanted.frames:
                    break
        about = {"file": self.name, "rate": video.rate, "frames": self.frames}
        files = [*([self.film] if self.wanted.film else []), *self.labels()]
        written = dict.fromkeys((path.relative_to(self.out).as_posix() for path in files), "")  # not to be removed
        content = {"names": list(predictor.names), "made_by": made_by(predictor, self.wanted.conf), "video": about,
                   "predictions": self.rows}  # fmt: skip
        clear = not signals.received or not isinstance(video.source, Path)
        cleared = write_index(self.out / INDEX, content, written, clear=clear)
        self._journal.close()
        return cleared

    def _note(self, draft: Path) -> None:
        self._journal.note({self.film.name: sha256_of(draft)})

    def _take(self, number: int, frame: np.ndarray, found: Tracked) -> None:
        self.frames += 1
        self.rows += track_rows(found, self.name, number)
        self.tracks.update(zip(found.track.tolist(), found.labels.tolist(), strict=True))
        if self.wanted.txt and len(found):
            text = yolo_rows(found, frame.shape[:2])
            self._journal.write(self.out, {self.label(number).relative_to(self.out).as_posix(): text.encode()})

    def summary(self, predictor: Predictor | PortablePredictor, rate: float) -> str:
        """How many objects were followed: registered classes first."""
        count = Counter(predictor.names[label] for label in self.tracks.values())
        others = Counter({name: n for name, n in count.items() if name not in predictor.registered}).most_common(12)
        seen = [f"{n} {name}" for name, n in [*((name, count[name]) for name in predictor.registered), *others]]
        return (f"{self.name}: {counted(self.frames, 'frame')} ({rate:.1f}/s), {counted(len(self.tracks), 'object')} "
                f"({', '.join(seen) or 'none'}) in {counted(len(self.rows), 'box', 'es')} -> {self.out}")  # fmt: skip


class _Paced:
    """A VideoFile at the pace of its source: a file's own, or that at which a camera's first frames came."""

    def __init__(self, path: Path, video: Video, ready: Callable[[Path], None]) -> None:
        self._file = VideoFile(path, video.rate, ready)
        self._held: list[np.ndarray] | None = None if isinstance(video.source, Path) else []
        self._began = time.monotonic()

    def write(self, frame: np.ndarray) -> None:
        if self._held is None:
            self._file.write(frame)
            return
        self._held.append(frame)
        if time.monotonic() - self._began >= HELD:
            self._let_go()

    def _let_go(self) -> None:
        held, self._held = self._held or [], None
        if held:
            pace = len(held) / max(time.monotonic() - self._began, 1e-9)
            self._file.rate = min(max(round(pace, 1), PACES[0]), PACES[1])
        for frame in held:
            self._file.write(frame)

    def __enter__(self) -> "_Paced":
        self._file.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._let_go()
        finally:
            self._file.__exit__(kind, None, None)


def _refuse(copy: Copy, source: Path | int) -> None:
    """Before anything is written: another --out than a file, the video's own folder, or one with files of others.

    Raises:
        UserError: it is one of these.
    """
    if isinstance(source, Path) and copy.out.resolve() == source.parent.resolve():
        raise UserError(explain("a folder beside the video", "the video's own", str(copy.out), "name another --out"))
    labels = {*copy.labels(), *([copy.label(0)] if copy.wanted.txt else [])}
    refuse_others(copy.out, INDEX, "what fsdet predict wrote", ("names", "predictions"), (copy.film, *sorted(labels)))
