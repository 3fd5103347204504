# SPDX-License-Identifier: AGPL-3.0-or-later
"""A page in one file: HTML without scripts, pictures inside, nothing fetched. Every text from data is escaped here."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from fsdet.pictures.style import STYLE

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
MADE_BY = '<meta name="generator" content="fsdet report">'
SIDE, QUALITY = 168, 80  # px of a picture's longer side, JPEG


@dataclass(frozen=True)
class Section:
    """A heading, a remark below it, and HTML; a section with neither remark nor HTML is left out of a page."""

    heading: str
    content: str = ""
    remark: str = ""


def page(title: str, subtitle: str, sections: Sequence[Section], footer: str) -> str:
    """A whole document."""
    shown = [(f"s{i}", s) for i, s in enumerate(sections) if s.content or s.remark]
    links = "".join(f'<a href="#{key}">{escape(s.heading)}</a>' for key, s in shown if s.heading)
    body = "".join(_section(key, s) for key, s in shown)
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{MADE_BY}'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
            f'<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p><nav aria-label="sections">{links}</nav>'
            f"</header>{body}<footer>{escape(footer)}</footer></main></body></html>\n")  # fmt: skip


def is_page(path: Path) -> bool:
    """Whether a file was made here, as a test for `refuse_foreign`."""
    with path.open("rb") as file:
        return MADE_BY.encode() in file.read(4096)


def _section(key: str, s: Section) -> str:
    head = f"<h2>{escape(s.heading)}</h2>" if s.heading else ""
    return f'<section id="{key}">{head}{f"<p>{escape(s.remark)}</p>" if s.remark else ""}{s.content}</section>'


def picture(image: np.ndarray | Image.Image, caption: str, kind: str = "", name: str = "", side: int = SIDE) -> str:
    """An RGB picture inside the page, at most `side` px wide and high.

    kind: hit, miss, false or nothing, for its frame. name: what it shows, for who cannot see it.
    """
    small = image.copy() if isinstance(image, Image.Image) else Image.fromarray(image)
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=QUALITY, optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (f'<figure{_class(kind)}><img decoding="async" width="{small.width}" height="{small.height}" '
            f'alt="{escape(name or caption, quote=True)}" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>")  # fmt: skip


def lane(label: str, pictures: Sequence[str], kind: str = "") -> str:
    """A labelled strip of pictures that scrolls by itself; nothing without pictures."""
    if not pictures:
        return ""
    return (f'<div class="lane"><span{_class(kind)}>{escape(label)}</span><div class="strip" tabindex="0" role="group" '
            f'aria-label="{escape(label, quote=True)}">{"".join(pictures)}</div></div>')  # fmt: skip


def class_card(name: str, facts: Sequence[str], lanes: Sequence[str], shade: str) -> str:
    """A class with what is known of it. shade: a CSS colour of our own."""
    told = "".join(f"<span>{escape(fact)}</span>" for fact in facts)
    return (f'<article class="card class" style="--shade:{escape(shade, quote=True)}"><div class="head">'
            f"<h3>{escape(name)}</h3>{told}</div>{''.join(lanes)}</article>")  # fmt: skip


def figures(pairs: Sequence[tuple[str, str]]) -> str:
    """Large figures: (value, what it is)."""
    cards = "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in pairs
    )
    return f'<div class="row">{cards}</div>' if pairs else ""


def charts(named: Sequence[tuple[str, str]]) -> str:
    """SVG charts, each under its name; empty ones are left out."""
    cards = "".join(f'<div class="card"><h3>{escape(name)}</h3>{svg}</div>' for name, svg in named if svg)
    return f'<div class="wide">{cards}</div>' if cards else ""


def keys(entries: Sequence[tuple[str, str]]) -> str:
    """A legend of (name, CSS colour)."""
    told = "".join(f'<span><i style="--shade:{escape(shade, quote=True)}"></i>{escape(name)}</span>'
                   for name, shade in entries)  # fmt: skip
    return f'<div class="keys">{told}</div>' if entries else ""


def card(content: str, kind: str = "") -> str:
    """HTML on a card; nothing without it."""
    return f'<div class="card{f" {escape(kind)}" if kind else ""}">{content}</div>' if content else ""


def tiles(pictures: Sequence[str], wide: bool = False) -> str:
    """Pictures in a grid."""
    return f'<div class="tiles{" large" if wide else ""}">{"".join(pictures)}</div>' if pictures else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], name: str) -> str:
    """A table that scrolls by itself on a narrow screen; nothing without rows."""
    if not rows:
        return ""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join(_row(row) for row in rows)
    return (f'<div class="card scroll" tabindex="0" role="group" aria-label="{escape(name, quote=True)}"><table>'
            f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>")  # fmt: skip


def _row(row: Sequence[str]) -> str:
    cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
    return f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>'


def folded(summary: str, content: str) -> str:
    """HTML that is closed until it is asked for."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>" if content else ""


def verbatim(text: str) -> str:
    """Text as it is written, line by line."""
    return f"<pre>{escape(text)}</pre>" if text else ""


def _class(kind: str) -> str:
    return f' class="{escape(kind, quote=True)}"' if kind else ""
