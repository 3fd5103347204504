# SPDX-License-Identifier: AGPL-3.0-or-later
"""Single frames of videos, as if each were a picture: FILM.mp4/000012.png stands for frame 12 (from 0) of FILM.mp4.

Whoever asks in order has each frame decoded once; a bounded number of bytes of what was passed on the way is kept.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from fsdet.data.video import Video, is_video
from fsdet.errors import DataError, explain

CACHE_BYTES = 128 << 20  # of decoded frames, in each process
NEAR = 48  # frames ahead that are walked to; beyond them seeking is faster
OPEN = 4  # videos


def frame_path(video: Path, number: int) -> Path:
    """What stands for a frame wherever a picture's path is asked for."""
    return video / f"{number:06d}.png"


def frame_of(path: str | Path) -> tuple[Path, int] | None:
    """(video, number) of such a path; None for every other."""
    path = Path(path)
    if is_video(path.parent) and path.suffix == ".png" and path.stem.isdecimal() and path.parent.is_file():
        return path.parent, int(path.stem)
    return None


def video_size(video: Path) -> tuple[int, int, int]:
    """(frames as its header says, height px, width px); 0 frames: it does not say.

    Raises:
        DataError: nothing there, or nothing can be decoded.
    """
    try:
        state = video.stat()
    except OSError:
        state = None
    return _video_size(video, *((state.st_mtime_ns, state.st_size) if state else (0, 0)))


@lru_cache(maxsize=4096)
def _video_size(video: Path, changed: int, content: int) -> tuple[int, int, int]:
    with Video(video) as opened:
        _, frame = next(opened.frames())
        return opened.announced, *frame.shape[:2]


class _Reader:
    """A video that is open at some frame."""

    def __init__(self, path: Path) -> None:
        self.path, self.at = path, -1
        self.video = Video(path)
        self.frames = self.video.frames()

    def towards(self, number: int) -> Iterator[tuple[int, np.ndarray]]:
        """Frames up to `number`, from where the video stands or, where that is too far or past it, from there alone."""
        if not self.at < number <= self.at + NEAR:
            sought = self.video.seek(number)
            if not sought:
                self.close()
                self.video = Video(self.path)
            self.at, self.frames = (number - 1 if sought else -1), self.video.frames()
        while self.at < number:
            found = next(self.frames, None)
            if found is None:
                return
            self.at = found[0]
            yield found

    def close(self) -> None:
        self.video.__exit__(None, None, None)


class FrameCache:
    """Frames by video and number; safe among threads.

    Args:
        budget: bytes of decoded frames that are kept, the longest unused of them leaving first.
    """

    def __init__(self, budget: int = CACHE_BYTES) -> None:
        self.budget, self.decoded = budget, 0
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._readers: OrderedDict[str, _Reader] = OrderedDict()

    @property
    def held(self) -> int:
        """Bytes of the frames that are kept."""
        return sum(frame.nbytes for frame in self._kept.values())

    def read(self, video: Path, number: int) -> np.ndarray:
        """uint8 [H, W, 3] RGB, a copy.

        Raises:
            DataError: no such video or frame, or one that cannot be decoded.
        """
        key = str(video)
        with self._lock:
            if (key, number) not in self._kept:
                frame = self._decoded(key, video, number)
            else:
                self._kept.move_to_end((key, number))
                frame = self._kept[key, number]
        return frame.copy()

    def _decoded(self, key: str, video: Path, number: int) -> np.ndarray:
        if key not in self._readers:
            self._readers[key] = _Reader(video)
            while len(self._readers) > OPEN:
                self._readers.popitem(last=False)[1].close()
        self._readers.move_to_end(key)
        wanted = None
        for at, frame in self._readers[key].towards(number):
            self.decoded += 1
            self._keep((key, at), frame)
            wanted = frame if at == number else None
        if wanted is None:
            raise DataError(explain("a frame that can be decoded", f"none of number {number}", key,
                                    "look at the video, or leave that frame's boxes out"))  # fmt: skip
        return wanted

    def _keep(self, key: tuple[str, int], frame: np.ndarray) -> None:
        self._kept[key] = frame
        self._kept.move_to_end(key)
        held = self.held
        while held > self.budget:
            held -= self._kept.popitem(last=False)[1].nbytes


_abandoned: list[FrameCache] = []  # of the parent: closing its files in a forked child would wait for its threads


def _anew() -> None:
    global _cache
    _abandoned.append(_cache)
    _cache = FrameCache()


_cache = FrameCache()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_anew)


def read_frame(video: Path, number: int) -> np.ndarray:
    """uint8 [H, W, 3] RGB of a frame, through this process's cache; errors are those of `FrameCache.read`."""
    return _cache.read(video, number)
