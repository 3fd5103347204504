# SPDX-License-Identifier: AGPL-3.0-or-later
"""Image files: size from the header, pixels from a full decode, both after EXIF rotation; damage is an error.

cv2.imread fills the missing part of a truncated file with grey and says nothing; Pillow's decoder raises.
"""

import os
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from fsdet.data.frames import frame_of, read_frame, video_size
from fsdet.errors import DataError, UserError, explain

Picture = str | os.PathLike[str] | np.ndarray | Image.Image

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"})
MAX_PIXELS = 80_000_000
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "PPM")  # JPEG includes MPO; none runs another program
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_ORIENTATION = 274  # EXIF tag
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def is_image(name: str) -> bool:
    """Whether a file name ends like a picture; .JPG counts, and so does ._x.jpg not."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def image_size(path: str | Path) -> tuple[int, int]:
    """(height, width) px after EXIF rotation, from the header alone. A frame of a video is an image, too (frames.py).

    Raises:
        DataError: no file, no image, or more than MAX_PIXELS.
    """
    if frame := frame_of(path):
        return video_size(frame[0])[1:]
    with _open(path) as image:
        width, height = image.size
        return (width, height) if _orientation(image) >= 5 else (height, width)


def image_sizes(paths: Sequence[str | Path]) -> list[tuple[int, int] | DataError]:
    """image_size of many files in a few threads; a file's DataError stands in its place."""

    def one(path: str | Path) -> tuple[int, int] | DataError:
        try:
            return image_size(path)
        except DataError as error:
            return error

    if len(paths) < 32:
        return [one(path) for path in paths]
    with ThreadPoolExecutor(min(8, 2 * (os.cpu_count() or 1))) as pool:
        return list(pool.map(one, paths))


def read_rgb(path: str | Path) -> np.ndarray:
    """uint8 [H, W, 3] RGB, fully decoded, EXIF applied; or a frame of a video (frames.py).

    Grey and 16-bit images are spread to 8-bit RGB (high byte), CMYK is converted, transparency is laid on white.

    Raises:
        DataError: no file, no image, truncated, floating-point pixels, or more than MAX_PIXELS.
    """
    if frame := frame_of(path):
        return read_frame(*frame)
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # a global that other libraries set; grey rows must never be data
    with _open(path) as image:
        return _decoded(image, path)


def rgb_of(picture: Picture, order: str = "rgb") -> np.ndarray:
    """uint8 [H, W, 3] RGB of a path, an array (its channels in `order`) or a PIL image, read as its file would be.

    Raises:
        UserError: it is none of these. DataError: see read_rgb and as_rgb.
    """
    if isinstance(picture, np.ndarray):
        return as_rgb(picture, order)
    if isinstance(picture, str | os.PathLike):
        return read_rgb(os.fspath(picture))
    if not isinstance(picture, Image.Image):
        got = "None" if picture is None else f"{type(picture).__module__}.{type(picture).__name__}"
        raise UserError(explain("a path, an array [H, W, 3] or a PIL image", got.removeprefix("builtins."), "image",
                                "give the image as one of these; a tensor as uint8 .numpy()"))  # fmt: skip
    if not 0 < picture.width * picture.height <= MAX_PIXELS:
        raise DataError(explain(f"1 to {MAX_PIXELS:,} pixels", f"{picture.width} x {picture.height}", "PIL image",
                                "cut it into tiles or scale it down"))  # fmt: skip
    return _decoded(picture, "PIL image")


def as_rgb(pixels: np.ndarray, order: str = "rgb") -> np.ndarray:
    """uint8 [H, W, 3] RGB of an array: grey, 16-bit (high byte) and transparent ones (on white) as read_rgb has them.

    Args:
        pixels: uint8 or uint16 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]. order: "rgb" or "bgr".
    Raises:
        DataError: another shape or kind of number, no pixel, or more than MAX_PIXELS.
    """
    shape, kind = pixels.shape, pixels.dtype
    fits = len(shape) == 2 or (len(shape) == 3 and shape[2] in (1, 3, 4))
    if not fits or kind not in (np.uint8, np.uint16) or not 0 < shape[0] * shape[1] <= MAX_PIXELS:
        raise DataError(explain("uint8 or uint16 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]", f"{kind} {list(shape)}",
                                "image array", "convert it; values in 0..1 times 255, as uint8"))  # fmt: skip
    image = (pixels >> 8).astype(np.uint8) if kind == np.uint16 else pixels
    image = image[..., None] if image.ndim == 2 else image
    alpha, image = (image[..., 3:].astype(np.float32) / 255, image[..., :3]) if image.shape[2] == 4 else (None, image)
    image = np.repeat(image, 3, 2) if image.shape[2] == 1 else image[..., ::-1] if order == "bgr" else image
    if alpha is not None:
        image = (image * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return np.ascontiguousarray(image)


def _open(path: str | Path) -> Image.Image:
    """The file with its header read and its size judged; the pixels are still on disk."""
    try:
        image = _identified(path)
    except _BOMB as error:
        raise DataError(_too_large(path, str(error))) from error
    except FileNotFoundError as error:
        raise DataError(explain("an image file", "nothing", str(path), "restore the file or its annotation")) from error
    except _BROKEN as error:
        raise DataError(_broken(path, _looks_like(path, error))) from error
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} x {image.height}"
        image.close()
        raise DataError(_too_large(path, size))
    return image


def _identified(path: str | Path) -> Image.Image:
    """The file as the first of our formats that knows its first bytes; Pillow's own table says which.

    Image.open does the same, but ultralytics replaces it on import by one that installs packages for what it does not
    know; which of the two is in place depends on what was imported before.
    Raises:
        OSError: no such file, or none of our formats.
    """
    Image.init()
    with open(path, "rb") as file:
        head = file.read(16)
    for name in _FORMATS:
        factory, accept = Image.OPEN[name]
        verdict = accept is None or accept(head)
        if verdict and not isinstance(verdict, str):  # text says that this Pillow was built without the format
            try:
                return factory(os.fspath(path), None)
            except (SyntaxError, IndexError, TypeError, struct.error):  # as Image.open: not of this format after all
                continue
    raise UnidentifiedImageError("no known image format")


def _decoded(image: Image.Image, where: str | Path) -> np.ndarray:
    """All pixels of an image as uint8 [H, W, 3] RGB, turned as its EXIF says. Raises DataError with `where`."""
    orientation = _orientation(image)
    try:
        image.load()
        pixels = _to_rgb(image)
    except _BROKEN as error:
        raise DataError(_broken(where, f"{type(error).__name__}: {error}")) from error
    if orientation in _TURN:
        pixels = pixels.transpose(_TURN[orientation])
    return np.array(pixels, np.uint8)


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8 as far as the header tells it; Pillow has turned TIFF files already."""
    if image.format == "TIFF":
        return 1
    if image.format == "PNG" and "exif" not in image.info:  # getexif would decode the whole file to look behind it
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except _BROKEN:
        return 1  # damaged EXIF turns nothing; the pixels are judged by their own decoder
    return value if value in _TURN else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # I;16, I;16B, I
        grey = (np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save it as 8-bit")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        top = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", top.size, "white"), top).convert("RGB")
    return image.convert("RGB")


def _looks_like(path: str | Path, error: Exception) -> str:
    """What is known of a file without a readable header."""
    try:
        with open(path, "rb") as file:
            head = file.read(32)
    except OSError as unreadable:
        return f"{type(unreadable).__name__}: {unreadable.strerror}"
    if not head:
        return "an empty file (0 bytes)"
    return f"a file that starts with {head!r} ({type(error).__name__})"


def _broken(path: str | Path, got: str) -> str:
    return explain(
        "a complete JPEG, PNG, WebP, BMP, TIFF, GIF or PPM image", got, str(path), "replace or remove the file"
    )


def _too_large(path: str | Path, got: str) -> str:
    return explain(f"at most {MAX_PIXELS:,} pixels", got, str(path), "cut it into tiles or scale it down")
