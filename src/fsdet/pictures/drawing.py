# SPDX-License-Identifier: AGPL-3.0-or-later
"""Boxes and their labels on one image."""

import colorsys
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fsdet.errors import ShapeError
from fsdet.files import refuse_foreign, write_durably

Colour = tuple[int, int, int]
TRUTH: Colour = (40, 220, 80)  # no class colour comes near it
INK: Colour = (24, 26, 30)
MARK = "fsdet"  # in every JPEG and PNG that is drawn here
OF_EVALUATION = ("confusion.png", "pr_novel.png", "shots.png")
_PALETTE: tuple[Colour, ...] = (
    (255, 82, 82), (64, 156, 255), (255, 193, 7), (186, 104, 255), (0, 200, 212), (255, 128, 44), (255, 105, 180),
    (121, 134, 255), (205, 130, 90), (230, 230, 90), (150, 200, 255), (255, 160, 160), (160, 120, 220), (240, 200, 150),
)  # fmt: skip


def colour(index: int) -> Colour:
    """The colour of class `index`: a palette first, then hues a golden angle apart; never near green."""
    if index < len(_PALETTE):
        return _PALETTE[index]
    hue = (0.44 + 0.78 * (index * 0.618034 % 1)) % 1  # from cyan round to yellow
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb(hue, 0.62, 0.96))  # type: ignore[return-value]


@dataclass(frozen=True, eq=False)
class Picture:
    """An image and what is to be drawn on it.

    image: uint8 [H, W, 3] RGB. boxes [n, 4], truth [m, 4]: xyxy px of the image. texts [n], truth_texts [m]: labels, or
    empty for none. colours [n]: class indices or RGB, or empty for the first colour. title: printed above on a sheet.
    """

    image: np.ndarray
    boxes: np.ndarray = field(default_factory=lambda: np.empty((0, 4)))
    texts: Sequence[str] = ()
    colours: Sequence[int | Colour] = ()
    truth: np.ndarray = field(default_factory=lambda: np.empty((0, 4)))
    truth_texts: Sequence[str] = ()
    title: str = ""

    def __post_init__(self) -> None:
        if self.image.ndim != 3 or self.image.shape[2] != 3 or self.image.dtype != np.uint8 or not self.image.size:
            raise ShapeError(f"Picture expects uint8 [H, W, 3], got {self.image.dtype} {list(self.image.shape)}")
        for name in ("boxes", "truth"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), np.float64).reshape(-1, 4))
        for name, boxes in (("texts", self.boxes), ("colours", self.boxes), ("truth_texts", self.truth)):
            if len(getattr(self, name)) not in (0, len(boxes)):
                raise ShapeError(f"Picture expects {len(boxes)} {name} or none, got {len(getattr(self, name))}")

    def draw(self, scale: float = 1.0) -> Image.Image:
        """The annotated image, `scale` times as large; lines and letters are drawn after the scaling and stay sharp."""
        h, w = (max(1, round(side * scale)) for side in self.image.shape[:2])
        canvas = Image.fromarray(self.image)
        if (w, h) != canvas.size:
            canvas = canvas.resize((w, h), Image.Resampling.LANCZOS)
        factor = np.array([w, h, w, h]) / np.array(self.image.shape[1::-1] * 2)
        shades = [colour(c) if isinstance(c, int | np.integer) else tuple(c) for c in self.colours]
        marks = _marks(self.boxes * factor, self.texts, shades or [colour(0)] * len(self.boxes), (w, h))
        truth = _marks(self.truth * factor, self.truth_texts, [TRUTH] * len(self.truth), (w, h))
        _draw(canvas, marks, truth)
        return canvas


def draw_detections(
    image: np.ndarray,
    boxes: np.ndarray,
    texts: Sequence[str] = (),
    colours: Sequence[int | Colour] = (),
    *,
    truth: np.ndarray | None = None,
    truth_texts: Sequence[str] = (),
    long_side: int = 0,
) -> np.ndarray:
    """A copy of uint8 [H, W, 3] RGB `image` with labelled boxes, true boxes in dashed green.

    The arguments are the fields of `Picture`. An image whose longer side is below `long_side` px is enlarged to it, so
    that labels can be read on small images; 0 keeps every image's size.
    Raises:
        ShapeError: image, texts, colours or truth_texts do not fit.
    """
    picture = Picture(image, boxes, texts, colours, np.empty((0, 4)) if truth is None else truth, truth_texts)
    return np.asarray(picture.draw(max(1.0, long_side / max(image.shape[:2]))))


def save_jpeg(path: str | Path, image: np.ndarray | Image.Image, quality: int = 90) -> Path:
    """Write uint8 [H, W, 3] RGB as JPEG, all at once; makes the folder."""
    return write_durably(Path(path), jpeg(image, quality))


def jpeg(image: np.ndarray | Image.Image, quality: int = 90) -> bytes:
    """A JPEG file of uint8 [H, W, 3] RGB that says who drew it."""
    picture, buffer = image if isinstance(image, Image.Image) else Image.fromarray(image), io.BytesIO()
    picture.save(buffer, format="JPEG", quality=quality, subsampling=0, comment=MARK.encode())
    return buffer.getvalue()


def is_picture(path: Path) -> bool:
    """Whether a JPEG or PNG says that it was drawn here, as a test for `refuse_foreign`."""
    try:
        with Image.open(path) as picture:
            told = picture.info.get("comment" if picture.format == "JPEG" else "Software", "")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False
    return (told.decode("latin-1") if isinstance(told, bytes) else told) == MARK


def refuse_other_pictures(folder: Path) -> None:
    """Let the pictures of an evaluation be drawn into a folder.

    Raises:
        UserError: one of their names is taken by a picture that was not drawn here.
    """
    for path in (*(folder / name for name in OF_EVALUATION), *sorted(folder.glob("episodes/eval_*.jpg"))):
        refuse_foreign(path, "a picture of fsdet", is_picture)


@lru_cache(maxsize=16)
def font(size: int, bold: bool = True) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib (not imported for it) and knows Latin, Greek and Cyrillic."""
    spec = find_spec("matplotlib")
    folder = Path(next(iter(spec.submodule_search_locations or ()))) if spec else Path()
    file = folder / "mpl-data/fonts/ttf" / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf")
    return ImageFont.truetype(str(file), size) if file.is_file() else ImageFont.load_default(size)


@dataclass(frozen=True)
class _Mark:
    """One box on the canvas: whole pixels (left, top, right, bottom), all inside it."""

    box: tuple[int, int, int, int]
    text: str
    shade: Colour


def _marks(boxes: np.ndarray, texts: Sequence[str], shades: Sequence[Colour], size: tuple[int, int]) -> list[_Mark]:
    """Boxes clipped to the canvas; those with nothing left on it are dropped."""
    texts = texts or [""] * len(boxes)
    limit = np.array(size * 2) - 1
    whole = np.stack([np.floor(boxes[:, :2]), np.ceil(boxes[:, 2:]) - 1], 1).reshape(-1, 4)
    seen = (boxes[:, 2:] > 0).all(1) & (boxes[:, :2] < np.array(size)).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
    return [_Mark(tuple(int(v) for v in np.clip(box, 0, limit)), str(text), shade)
            for box, text, shade, keep in zip(whole, texts, shades, seen, strict=True) if keep]  # fmt: skip


def _draw(canvas: Image.Image, marks: list[_Mark], truth: list[_Mark]) -> None:
    """All boxes first, then all labels, so that no line crosses a label."""
    pen, side = ImageDraw.Draw(canvas), max(canvas.size)
    width, letters = max(2, round(side / 240)), font(max(11, round(side / 42)))
    for mark in marks:
        pen.rectangle(mark.box, outline=mark.shade, width=width)
    for mark in truth:
        _dashed(pen, mark.box, mark.shade, max(2, round(width * 0.8)))
    taken: list[tuple[int, int, int, int]] = []
    for mark in (*truth, *marks):
        if mark.text:
            taken.append(_label(pen, mark, letters, canvas.size, taken))


def _dashed(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], shade: Colour, width: int) -> None:
    """Dashes that start at every corner, on a thin dark line that keeps them visible on grass."""
    left, top, right, bottom = box
    dash = 4 * width
    pen.rectangle(box, outline=INK, width=1)
    for x in range(left, right + 1, 2 * dash):
        end = min(x + dash, right)
        pen.rectangle((x, top, end, min(top + width - 1, bottom)), fill=shade)
        pen.rectangle((x, max(bottom - width + 1, top), end, bottom), fill=shade)
    for y in range(top, bottom + 1, 2 * dash):
        end = min(y + dash, bottom)
        pen.rectangle((left, y, min(left + width - 1, right), end), fill=shade)
        pen.rectangle((max(right - width + 1, left), y, right, end), fill=shade)


def _label(pen: ImageDraw.ImageDraw, mark: _Mark, letters: ImageFont.FreeTypeFont, size: tuple[int, int],
           taken: list[tuple[int, int, int, int]]) -> tuple[int, int, int, int]:  # fmt: skip
    """Text on a filled strip: above the box, or wherever near it no other label is; returns the strip."""
    ascent, descent = letters.getmetrics()
    pad = max(2, ascent // 5)
    w, h = round(letters.getlength(mark.text)) + 2 * pad, ascent + descent + pad
    left, top, right, bottom = mark.box
    places = ((left, top - h), (left, bottom + 1), (right - w + 1, top - h), (right - w + 1, bottom + 1),
              (left, top), (left, bottom - h))  # fmt: skip
    strips = [_inside((x, y, x + w, y + h), size) for x, y in places if 0 <= y <= size[1] - h]
    strip = next((s for s in strips if not any(_overlap(s, t) for t in taken)), None)
    strip = strip or (strips[0] if strips else _inside((left, top, left + w, top + h), size))
    pen.rectangle((strip[0], strip[1], strip[2] - 1, strip[3] - 1), fill=mark.shade)
    pen.text((strip[0] + pad, strip[1] + pad // 2), mark.text, fill=readable_on(mark.shade), font=letters)
    return strip


def readable_on(shade: Colour) -> Colour:
    """Dark ink or white, whichever stands out from `shade` (ITU-R 601 luma)."""
    return INK if 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2] > 120 else (255, 255, 255)


def _inside(strip: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The strip moved into the canvas; its left and top edges win when it is too large."""
    x0, y0, x1, y1 = strip
    dx, dy = max(-x0, min(0, size[0] - x1)), max(-y0, min(0, size[1] - y1))
    return x0 + dx, y0 + dy, x1 + dx, y1 + dy


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
