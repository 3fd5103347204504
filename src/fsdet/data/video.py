# SPDX-License-Identifier: AGPL-3.0-or-later
"""Frames of a video file or camera one by one, and a file that frames are written to. Nothing holds a whole video."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from fsdet.errors import DataError, UserError, counted, explain

EXTENSIONS = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"})
USUAL_RATE = 25.0  # frames/s, where a file or camera does not say
RATES = (1.0, 1000.0)  # what else a header says is damage
SKIPS = 90  # reads in a row that may fail before the rest counts as lost
CODEC = "mp4v"  # every OpenCV wheel writes it


def _quiet() -> None:
    """What is wrong with a file is told by Video, in one sentence, not by OpenCV and ffmpeg in several."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel  # OpenCV 5 moved it
    level(0)


def is_video(path: Path) -> bool:
    """Whether a file name ends like a video."""
    return path.suffix.lower() in EXTENSIONS


def _opened(path: Path) -> str | bytes:
    """A path as OpenCV takes it: where its name is no UTF-8 as bytes, as a text would end the process."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return str(path)


class Video:
    """A video to be read once, as a context.

    Args:
        source: a file, or the index of a camera.
    Attributes:
        rate: frames/s. announced: how many frames the header says there are; 0 unknown. read: frames decoded so far.
    Raises:
        DataError: no such file or camera, or one that nothing can be decoded of.
    """

    def __init__(self, source: Path | int) -> None:
        self.source, self.read, self._last = source, 0, -1
        if isinstance(source, Path) and not source.is_file():
            got = "a folder" if source.is_dir() else "nothing there"
            raise DataError(explain("a video file", got, str(source), "check the path"))
        _quiet()
        self._capture = cv2.VideoCapture(source if isinstance(source, int) else _opened(source))
        self._first = self._grab() if self._capture.isOpened() else None
        if self._first is None:
            self._capture.release()
            raise DataError(self._unusable())
        rate, announced = (self._capture.get(p) for p in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
        self._start = float(self._capture.get(cv2.CAP_PROP_POS_MSEC))
        self.rate = rate if RATES[0] <= rate <= RATES[1] else USUAL_RATE
        self.announced = int(announced) if isinstance(source, Path) and 0 < announced < 1e9 else 0

    def _unusable(self) -> str:
        if isinstance(self.source, int):
            return explain("a camera", "none that gives pictures", f"camera {self.source}",
                           "connect it, or name another index or a file")  # fmt: skip
        got = "an empty file (0 bytes)" if not self.source.stat().st_size else "a file that no frame can be read of"
        return explain("a video", got, str(self.source), "it may be cut off or no video: copy or convert it again")

    def _grab(self) -> np.ndarray | None:
        """The next frame, [H, W, 3] BGR."""
        good, frame = self._capture.read()
        return frame if good and frame is not None and frame.size else None

    def frames(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number from 0, uint8 [H, W, 3] RGB, turned as the file says) of each frame that can be decoded.

        After frames that cannot, numbers go on by the time stamp, so that those of the others stay right.
        """
        frame, self._first, failed, before = self._first, None, 0, 0.0
        while failed <= SKIPS:
            if frame is None:
                failed += 1
                if not self.announced or self._last + 1 >= self.announced:  # the end, as it was said or as nobody says
                    return
            else:
                now = float(self._capture.get(cv2.CAP_PROP_POS_MSEC))
                lost = round((now - before) / 1000 * self.rate) - 1 if failed else 0
                self._last += 1 + max(lost, 0)
                self.read, failed, before = self.read + 1, 0, now
                yield self._last, np.ascontiguousarray(frame[..., ::-1])
            frame = self._grab()

    def seek(self, number: int) -> bool:
        """Let `frames` begin anew at frame `number`; False where time stamps do not say that it is that one.

        After False nothing can be told of where the video stands: open it again.
        """
        self._capture.set(cv2.CAP_PROP_POS_FRAMES, number)
        self._first = self._grab()
        since = float(self._capture.get(cv2.CAP_PROP_POS_MSEC)) - self._start
        self._last = number - 1
        return self._first is not None and abs(since * self.rate / 1000 - number) < 0.1

    def told(self) -> str:
        """A sentence when the file held fewer frames than its header says, after all were read; else nothing."""
        if self.read >= self.announced:
            return ""
        lost = self.announced - self.read
        gone = f"{lost} of {counted(self.announced, 'frame')}"
        return (f"{self.source}: {gone} could not be read; the file is damaged or cut off, and the other {self.read} "
                f"{'was' if self.read == 1 else 'were'} used")  # fmt: skip

    def __enter__(self) -> "Video":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        self._capture.release()


class VideoFile:
    """Frames into an mp4 that appears at `path` when the context ends without an error; until then it is hidden.

    ready: called with the hidden file when it is whole, before it takes the place of what is at `path`.
    Raises:
        UserError: OpenCV cannot write such a video here.
    """

    def __init__(self, path: Path, rate: float, ready: Callable[[Path], None] | None = None) -> None:
        self.path, self.rate, self._ready = path, rate, ready
        self._draft = path.with_name(f".{path.stem}.{os.getpid()}.mp4")
        self._writer: cv2.VideoWriter | None = None
        self._size = (0, 0)

    def write(self, frame: np.ndarray) -> None:
        """Add uint8 [H, W, 3] RGB; frames of another size than the first are scaled to it."""
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._size = (frame.shape[1], frame.shape[0])
            _quiet()
            self._writer = cv2.VideoWriter(_opened(self._draft), cv2.VideoWriter.fourcc(*CODEC), self.rate, self._size)
            if not self._writer.isOpened():
                size = f"{self._size[0]} x {self._size[1]} px"
                raise UserError(explain(f"to write an mp4 ({CODEC}) of {size}", "a refusal of OpenCV", str(self.path),
                                        "name another --out, or leave the video out: --no-video"))  # fmt: skip
        if (frame.shape[1], frame.shape[0]) != self._size:
            frame = cv2.resize(frame, self._size, interpolation=cv2.INTER_AREA)
        self._writer.write(np.ascontiguousarray(frame[..., ::-1]))

    def __enter__(self) -> "VideoFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:  # fmt: skip
        if self._writer is not None:
            self._writer.release()
        if kind is None and self._draft.exists():
            if self._ready:
                self._ready(self._draft)
            os.replace(self._draft, self.path)
        self._draft.unlink(missing_ok=True)
