# SPDX-License-Identifier: AGPL-3.0-or-later
"""Charts as SVG text for a page: no script, colours from the page's own, every text escaped."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from fsdet.pictures.drawing import colour

WIDTH, HEIGHT, MAP = 360, 220, 480  # px of the drawing, which the page scales
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 16, 32
POINTS = 400  # of a line; more are thinned out
LOG_FROM = 30.0  # ratio of the largest to the smallest value from which `log_y=None` is logarithmic
NAMED = 24  # classes whose names a map has room for
KINDS = ("query", "shot", "prototype")  # of points on a map, as they lie over one another


@dataclass(frozen=True, eq=False)
class Series:
    """x, y [n]; points that are not finite are left out. low, high [n]: a band. shade: a CSS colour."""

    name: str
    x: np.ndarray
    y: np.ndarray
    shade: str = "var(--line)"
    bold: bool = False
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Axis:
    """From values between low and high to px between `start` and `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        share = min(1.0, max(0.0, (value - low) / (high - low or 1.0)))
        return self.start + share * (self.end - self.start)

    def ticks(self, most: int = 5) -> list[float]:
        """Round numbers within."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            found = [10.0**p for p in powers][:: max(1, math.ceil(len(powers) / most))]
            return found if len(found) > 1 else [self.low, self.high]
        rough = (self.high - self.low) / most or 1.0
        unit = 10 ** math.floor(math.log10(rough))
        step = next(s * unit for s in (1, 2, 5, 10) if s * unit >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def shade_of(index: int) -> str:
    """The colour of class `index` as CSS; a little darker than on pictures, to be seen on white and on black."""
    return "#{:02x}{:02x}{:02x}".format(*(round(0.86 * v) for v in colour(index)))


def line_chart(series: Sequence[Series], *, x: str, y: str, limits: tuple[float, float] | None = None,
               log_x: bool = False, log_y: bool | None = False, dots: bool = False,
               events: Sequence[float] = ()) -> str:  # fmt: skip
    """Lines over one pair of axes; an empty text when no series has a point.

    limits: of y. log_y: None takes a logarithmic one where values are far apart. dots: each point too. events: places
    on the x axis marked by a vertical line.
    """
    clean = [s for s in map(_finite, series) if len(s.x)]
    if not clean:
        return ""
    every, values = np.concatenate([s.x for s in clean]), np.concatenate([s.y for s in clean])
    across = Axis(float(every.min()), float(every.max()), LEFT, WIDTH - RIGHT, log_x and every.min() > 0)
    far = values.min() > 0 and values.max() > LOG_FROM * values.min()
    up = _upright(values, limits, bool(values.min() > 0 and log_y) or (log_y is None and bool(far)))
    known = sorted(set(every.tolist())) if log_x and len(set(every.tolist())) <= 8 else across.ticks()
    parts = [*_labels(x, y), *_rows(up), *_columns(across, known)]
    parts += [f'<line x1="{across.at(e):.1f}" x2="{across.at(e):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="event"/>'
              for e in events if across.low <= e <= across.high]  # fmt: skip
    for s in sorted(clean, key=lambda one: one.bold):
        parts += _line(s, across, up, dots)
    return _svg(parts, _told(x, y, clean))


def _line(s: Series, across: Axis, up: Axis, dots: bool) -> list[str]:
    parts, at = [], [(across.at(a), up.at(b)) for a, b in zip(s.x, s.y, strict=True)]
    if s.low is not None and s.high is not None:
        edge = [(across.at(a), up.at(b)) for a, b in (*zip(s.x, s.high, strict=True),
                                                      *zip(s.x[::-1], s.low[::-1], strict=True))]  # fmt: skip
        parts.append(f'<polygon points="{_points(edge)}" fill="{s.shade}" opacity=".18"/>')
    wide = 2.6 if s.bold else 1.4
    parts.append(f'<polyline points="{_points(at)}" fill="none" stroke="{s.shade}" stroke-width="{wide}" '
                 f'stroke-linejoin="round"><title>{escape(s.name)}</title></polyline>')  # fmt: skip
    if dots or len(at) == 1:
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{s.shade}"><title>{escape(s.name)}: '
                  f"{number(v)}</title></circle>" for (a, b), v in zip(at, s.y, strict=True)]  # fmt: skip
    return parts


def scatter(points: np.ndarray, classes: Sequence[int], names: Sequence[str], kinds: Sequence[str], title: str) -> str:
    """[n, 2] places; class of each by colour and name, kind (of KINDS) by form; empty without points.

    names: [n] of the classes; they are written beside prototypes as long as there are at most NAMED.
    """
    if not len(points):
        return ""
    low, high = points.min(0), points.max(0)
    places = 24 + (MAP - 48) * (0.5 + (points - (low + high) / 2) / max(float((high - low).max()), 1e-9))
    parts = [f'<rect x=".5" y=".5" width="{MAP - 1}" height="{MAP - 1}" rx="8" class="plain"/>']
    for i in sorted(range(len(points)), key=lambda i: KINDS.index(kinds[i])):
        parts.append(_mark(places[i][0], MAP - places[i][1], shade_of(classes[i]), kinds[i], names[i]))
    middle = [i for i in range(len(points)) if kinds[i] == "prototype"]
    for i in middle if len(middle) <= NAMED else ():
        a, b = places[i][0], MAP - places[i][1]
        side = ("end", -9) if a > 0.75 * MAP else ("start", 9)
        parts.append(f'<text x="{a + side[1]:.1f}" y="{b + 4:.1f}" text-anchor="{side[0]}" class="name">'
                     f"{escape(shortened(names[i]))}</text>")  # fmt: skip
    return _svg(parts, title, MAP, MAP)


def _mark(a: float, b: float, shade: str, kind: str, name: str) -> str:
    title = f"<title>{escape(name)}, {kind}</title>"
    if kind == "query":
        return f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.4" fill="{shade}" opacity=".6">{title}</circle>'
    if kind == "shot":
        return (f'<rect x="{a - 3.5:.1f}" y="{b - 3.5:.1f}" width="7" height="7" fill="none" stroke="{shade}" '
                f'stroke-width="2">{title}</rect>')  # fmt: skip
    return f'<circle cx="{a:.1f}" cy="{b:.1f}" r="6.5" fill="{shade}" class="halo">{title}</circle>'


def shortened(text: str, most: int = 18) -> str:
    """`text` with an ellipsis where it is longer."""
    return text if len(text) <= most else text[: most - 1] + "…"


def number(value: float) -> str:
    """Three digits, thousands as k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:.3g}k"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _finite(s: Series) -> Series:
    rows = np.flatnonzero(np.isfinite(s.x) & np.isfinite(s.y))
    rows = rows[np.unique(np.linspace(0, max(0, len(rows) - 1), min(POINTS, len(rows))).round().astype(int))]
    bands = [None if band is None else np.where(np.isfinite(band), band, s.y)[rows] for band in (s.low, s.high)]
    return Series(s.name, s.x[rows], s.y[rows], s.shade, s.bold, *bands)


def _upright(values: np.ndarray, limits: tuple[float, float] | None, log: bool) -> Axis:
    low, high = limits or (float(values.min()), float(values.max()))
    if limits is None and not log:
        room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.1
        low, high = low - room if low < 0 or low > 0.5 * high else 0.0, high + room
    elif high <= low:
        low, high = (low / 2, low * 2) if log else (low, low + 1)
    return Axis(low, high, HEIGHT - BOTTOM, TOP, log)


def _points(at: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in at)


def _labels(x: str, y: str) -> tuple[str, str]:
    return (f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x)}</text>',
            f'<text x="{LEFT}" y="10">{escape(y)}</text>')  # fmt: skip


def _rows(up: Axis) -> list[str]:
    return [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up.at(v):.1f}" y2="{up.at(v):.1f}" class="grid"/>'
            f'<text x="{LEFT - 6}" y="{up.at(v) + 3.5:.1f}" text-anchor="end">{number(v)}</text>'
            for v in up.ticks()]  # fmt: skip


def _columns(across: Axis, values: Sequence[float]) -> list[str]:
    return [f'<text x="{across.at(v):.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="middle">{number(v)}</text>'
            for v in values]  # fmt: skip


def _told(x: str, y: str, series: Sequence[Series]) -> str:
    """What a chart shows, for who cannot see it."""
    ends = [f"{s.name} from {number(s.y[0])} to {number(s.y[-1])}" for s in series[:8]]
    return f"{y} over {x}: {'; '.join(ends)}{f'; and {len(series) - 8} more lines' if len(series) > 8 else ''}"


def _svg(parts: Sequence[str], title: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    return (f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, quote=True)}">'
            f"{''.join(parts)}</svg>")  # fmt: skip
