# SPDX-License-Identifier: AGPL-3.0-or-later
"""Several images on one sheet."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fsdet.errors import ShapeError
from fsdet.pictures.drawing import TRUTH, Colour, Picture, colour, font, readable_on, save_jpeg

PAPER: Colour = (250, 250, 248)
MAT: Colour = (226, 226, 222)
TEXT: Colour = (40, 42, 46)
GAP = 10
_LINE = 24  # px of height for a line of text
_SHOTS_SHOWN = 10  # a class


def contact_sheet(
    images: Sequence[np.ndarray], columns: int, *, cell: int = 320, titles: Sequence[str] = ()
) -> np.ndarray:
    """uint8 [H, W, 3] sheet of `images` (uint8 [h, w, 3] RGB), each fitted into a square of `cell` px, row by row.

    titles: one a picture, printed above it, or none.
    Raises:
        ShapeError: no images, fewer than one column, or another number of titles.
    """
    if not images or columns < 1:
        raise ShapeError(f"contact_sheet expects at least one image and column, got {len(images)} and {columns}")
    if len(titles) not in (0, len(images)):
        raise ShapeError(f"contact_sheet expects {len(images)} titles or none, got {len(titles)}")
    pictures = [Picture(image, title=titles[i] if titles else "") for i, image in enumerate(images)]
    return np.asarray(_grid(pictures, min(columns, len(images)), cell))


def episode_sheet(
    supports: Sequence[Picture], queries: Sequence[Picture], path: str | Path, *, title: str = "",
    support_cell: int = 136, query_cell: int = 420,
) -> Path:  # fmt: skip
    """One episode on one JPEG: on the left every class with its support boxes, on the right the queries.

    supports: title is the class name, and neighbours of one title make one class. queries: true boxes in dashed green,
    predicted ones in the colour of their class; at most as many columns as make the sheet about as wide as high.
    Raises:
        ShapeError: no queries.
    """
    if not queries:
        raise ShapeError("episode_sheet expects at least one query, got none")
    columns = max(1, round(len(queries) ** 0.5))
    right = _grid(queries, columns, query_cell)
    left = _support_column(supports, support_cell) if supports else Image.new("RGB", (0, 0), PAPER)
    head = GAP + _LINE
    sheet = Image.new("RGB", (left.width + right.width, head + max(left.height, right.height)), PAPER)
    sheet.paste(left, (0, head))
    sheet.paste(right, (left.width, head))
    boxed = any(len(query.truth) or len(query.boxes) for query in queries)
    _heading(ImageDraw.Draw(sheet), title, sheet.width, legend=boxed)
    return save_jpeg(path, sheet)


def _heading(pen: ImageDraw.ImageDraw, title: str, width: int, *, legend: bool) -> None:
    """The title on the left; with `legend` what colours of boxes mean on the right, where there is room."""
    told, letters = "dashed green: truth    solid: prediction", font(13, bold=False)
    pen.text((GAP, GAP), title, fill=TEXT, font=font(15))
    start = width - GAP - round(letters.getlength(told))
    if legend and start > GAP + font(15).getlength(title) + 4 * GAP:
        pen.rectangle((start - 20, GAP + 3, start - 8, GAP + 15), outline=TRUTH, width=3)
        pen.text((start, GAP + 1), told, fill=TEXT, font=letters)


def _support_column(supports: Sequence[Picture], cell: int) -> Image.Image:
    """A strip with the class name over its shots, five in a row, class below class."""
    blocks = []
    for index, (name, group) in enumerate(groupby(supports, key=lambda picture: picture.title)):
        shots = list(group)
        first = shots[0].colours[0] if len(shots[0].colours) else index
        shade = colour(first) if isinstance(first, int | np.integer) else tuple(first)
        more = f"  (+ {len(shots) - _SHOTS_SHOWN} more)" if len(shots) > _SHOTS_SHOWN else ""
        bare = [Picture(p.image, p.boxes, (), p.colours or [shade] * len(p.boxes)) for p in shots[:_SHOTS_SHOWN]]
        blocks.append((name + more, shade, _grid(bare, min(5, len(bare)), cell)))
    width = max(max(block.width for *_, block in blocks), 2 * cell)
    column = Image.new("RGB", (width, sum(_LINE + block.height for *_, block in blocks)), PAPER)
    pen, y = ImageDraw.Draw(column), 0
    for name, shade, block in blocks:
        column.paste(block, (0, y + _LINE))
        pen.rounded_rectangle((GAP, y + GAP // 2, width - GAP, y + GAP // 2 + _LINE - 2), radius=4, fill=shade)
        pen.text((GAP + 7, y + GAP // 2 + 3), name, fill=readable_on(shade), font=font(14))
        y += _LINE + block.height
    return column


def _grid(pictures: Sequence[Picture], columns: int, cell: int) -> Image.Image:
    """Pictures in cells of one size; a row's height is that of its highest picture."""
    drawn = [p.draw(cell / max(p.image.shape[:2])) for p in pictures]
    strip = _LINE if any(p.title for p in pictures) else 0
    rows = [range(i, min(i + columns, len(drawn))) for i in range(0, len(drawn), columns)]
    heights = [strip + max(drawn[i].height for i in row) for row in rows]
    sheet = Image.new("RGB", (GAP + columns * (cell + GAP), GAP + sum(heights) + GAP * len(rows)), PAPER)
    pen, y = ImageDraw.Draw(sheet), GAP
    for row, height in zip(rows, heights, strict=True):
        for column, i in enumerate(row):
            x = GAP + column * (cell + GAP)
            pen.rectangle((x, y + strip, x + cell - 1, y + height - 1), fill=MAT)
            pen.text((x, y), _shorten(pictures[i].title, cell), fill=TEXT, font=font(14, bold=False))
            sheet.paste(
                drawn[i], (x + (cell - drawn[i].width) // 2, y + strip + (height - strip - drawn[i].height) // 2)
            )
        y += height + GAP
    return sheet


def _shorten(text: str, width: int) -> str:
    """`text` cut so that it fits `width` px, with an ellipsis."""
    letters = font(14, bold=False)
    if letters.getlength(text) <= width:
        return text
    while text and letters.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
