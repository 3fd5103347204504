# SPDX-License-Identifier: AGPL-3.0-or-later
"""Pixels are what Pillow shows after exif_transpose; damage is an error; the header's size is the decoded size."""

import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from fsdet.data.images import image_size, image_sizes, is_image, read_rgb
from fsdet.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif", "x.ppm", "x.webp"])
def test_lossless_formats_come_back_as_rgb(tmp_path, name):
    Image.fromarray(PIXELS).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    assert (read_rgb(tmp_path / name) == PIXELS).all()
    assert image_size(tmp_path / name) == (20, 30)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.tif", "x.webp"])
def test_exif_rotation_is_applied_to_pixels_and_size(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(PIXELS).save(tmp_path / name, exif=exif, **({"lossless": True} if name == "x.webp" else {}))
    with Image.open(tmp_path / name) as image:
        want = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    got = read_rgb(tmp_path / name)
    assert got.shape == want.shape and (got == want).all()
    assert image_size(tmp_path / name) == got.shape[:2]
    assert got.shape[:2] == ((30, 20) if orientation >= 5 else (20, 30))


@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp"])
@pytest.mark.parametrize("flag", [False, True])
def test_truncated_file_is_an_error_even_if_a_library_asked_for_grey_rows(tmp_path, monkeypatch, name, flag):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", flag)
    big = np.random.default_rng(1).integers(0, 256, (200, 200, 3), np.uint8)
    Image.fromarray(big).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(DataError, match=name):
        read_rgb(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "empty file"), (b"<!DOCTYPE html><html>404</html>", "DOCTYPE html"), (b"\xff\xd8\xff", "starts with")],
)
def test_what_is_no_image_is_named(tmp_path, content, told):
    (tmp_path / "x.jpg").write_bytes(content)
    for read in (read_rgb, image_size):
        with pytest.raises(DataError, match=told):
            read(tmp_path / "x.jpg")


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(DataError, match="nothing"):
        read_rgb(tmp_path / "none.jpg")
    with pytest.raises(DataError, match="IsADirectory"):
        image_size(tmp_path)


def test_sixteen_bit_grey_keeps_the_high_byte(tmp_path):
    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(deep).save(tmp_path / "x.png")
    assert (read_rgb(tmp_path / "x.png") == (deep >> 8).astype(np.uint8)[..., None]).all()


def test_grey_cmyk_and_palette_become_three_channels(tmp_path):
    for mode, name in (("L", "l.jpg"), ("CMYK", "c.jpg"), ("P", "p.png"), ("1", "b.png")):
        Image.fromarray(PIXELS).convert(mode).save(tmp_path / name)
        image = read_rgb(tmp_path / name)
        assert image.shape == (20, 30, 3) and image.dtype == np.uint8, mode
    solid = Image.new("RGB", (8, 8), (200, 30, 60))
    solid.convert("CMYK").save(tmp_path / "solid.jpg", quality=100)
    assert np.abs(read_rgb(tmp_path / "solid.jpg").astype(int) - (200, 30, 60)).max() <= 4


def test_transparent_pixels_show_white_not_what_is_hidden_under_them(tmp_path):
    rgba = np.zeros((4, 4, 4), np.uint8)
    rgba[:2] = (10, 20, 30, 255)
    Image.fromarray(rgba).save(tmp_path / "x.png")
    image = read_rgb(tmp_path / "x.png")
    assert (image[:2] == (10, 20, 30)).all() and (image[2:] == 255).all()


def test_floating_point_pixels_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match="8-bit"):
        read_rgb(tmp_path / "x.tif")


@pytest.mark.parametrize("side", [9_000, 12_000, 60_000])
def test_a_bomb_is_refused_by_its_header(tmp_path, side):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    (tmp_path / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    for read in (read_rgb, image_size):
        with pytest.raises(DataError, match="pixels"):
            read(tmp_path / "x.png")


def test_sizes_of_many_keep_their_order_and_errors_stand_in_place(tmp_path):
    paths = []
    for number in range(1, 41):
        paths.append(tmp_path / f"{number}.png")
        Image.new("RGB", (number, 2 * number)).save(paths[-1])
    paths[7].write_bytes(b"")
    sizes = image_sizes(paths)
    assert isinstance(sizes[7], DataError)
    assert [size for i, size in enumerate(sizes) if i != 7] == [(2 * n, n) for n in range(1, 41) if n != 8]


def test_file_names():
    assert [name for name in ("a.JPG", "a.jpeg", "a.txt", "._a.jpg", "jpg", "a.tiff") if is_image(name)] == [
        "a.JPG", "a.jpeg", "a.tiff"]  # fmt: skip


@pytest.mark.parametrize("before", [True, False])
def test_an_opener_that_a_library_put_in_the_place_of_pillows_is_not_called(tmp_path, before):
    """As ultralytics does, whose own tries to install a package; before and after this module is imported."""
    (tmp_path / "x.jpg").write_bytes(b"<html>")
    Image.fromarray(PIXELS).save(tmp_path / "y.png")
    code = f"""
import os, sys
from PIL import Image
os.chdir({str(tmp_path)!r})
def foreign(*args, **kwargs):
    sys.exit("the library's opener was called")
if {before}:
    Image.open = foreign
from fsdet.data.images import image_size, read_rgb
from fsdet.errors import DataError
Image.open = foreign
assert image_size("y.png") == (20, 30) and read_rgb("y.png").shape == (20, 30, 3)
try:
    read_rgb("x.jpg")
except DataError as error:
    assert "starts with" in str(error)
else:
    sys.exit("no error")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
