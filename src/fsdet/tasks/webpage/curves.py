# SPDX-License-Identifier: AGPL-3.0-or-later
"""A run's records as sections of a page: how training went, with what, on what."""

from collections.abc import Sequence

import numpy as np

from fsdet.engine.history import History, Row
from fsdet.errors import counted
from fsdet.files import read_json
from fsdet.pictures.charts import Series, line_chart, shade_of
from fsdet.pictures.page import Section, charts, folded, keys, table, verbatim

SMOOTH = 40  # parts of a run over which a line is averaged
LISTED = 20  # red flags


def training(history: History) -> Section:
    """Losses, gradient norm, rates and validation over steps; rejected steps as vertical lines."""
    rows, bad = history.committed, [float(row["step"]) for row in history.rejected]
    losses = sorted({name for row in rows for name in row.get("raw") or ()})
    rates = sorted({name for row in rows for name in row.get("lr") or ()})
    drawn = [("total loss", _measured(rows, "total", bad))]
    drawn += [(f"{name} loss", _measured(rows, name, bad, "raw")) for name in losses]
    drawn.append(("gradient norm before clipping", _measured(rows, "grad_l2_preclip", bad)))
    drawn.append(("learning rates", _rates(rows, rates)))
    drawn += _validation(history.rows.get("val", []))
    told = f"{counted(history.last_step, 'step')}, {len(bad) or 'none'} rejected"
    told += f", {counted(len(history.rewinds), 'return')} to a checkpoint" if history.rewinds else ""
    told += f"; ended: {history.ending}" if history.ending else ""
    told += ". Thin: as logged; thick: averaged; dashed verticals: rejected steps." if rows else "."
    flags = table(["red flag", "step", "what it means"],
                  [[row["flag"], str(row["step"]), row["message"]] for row in history.rows.get("flag", [])[:LISTED]],
                  "red flags")  # fmt: skip
    return Section("Training", charts(drawn) + flags, told)


def setting(history: History) -> Section:
    """config.yaml and environment.json as they lie in the run folder."""
    config, place = history.folder / "config.yaml", read_json(history.folder / "environment.json")
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    rows = [[str(key), ", ".join(f"{k} {v}" for k, v in value.items() if v) if isinstance(value, dict) else
             " ".join(map(str, value)) if isinstance(value, list) else str(value)]
            for key, value in place.items() if value is not None]  # fmt: skip
    told = folded("configuration (config.yaml)", verbatim(text))
    return Section("Configuration and environment", table(["environment", ""], rows, "environment") + told)


def _column(rows: Sequence[Row], key: str, group: str | None) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of a key; nan where a row has none."""
    values = [(row.get(group) or {}).get(key) if group else row.get(key) for row in rows]
    return (np.array([row["step"] for row in rows], np.float64),
            np.array([np.nan if v is None else v for v in values], np.float64))  # fmt: skip


def _measured(rows: Sequence[Row], key: str, bad: Sequence[float], group: str | None = None) -> str:
    x, y = _column(rows, key, group)
    lines = [Series(key, x, y)]
    if np.isfinite(y).sum() > 2 * SMOOTH:
        lines[0] = Series(f"{key} as logged", x, y, "var(--soft)")
        lines.append(Series(f"{key} averaged", *_averaged(x, y), bold=True))
    return line_chart(lines, x="step", y="", log_y=None, events=bad)


def _averaged(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Medians of SMOOTH equal parts."""
    here = np.isfinite(y)
    parts = np.array_split(np.flatnonzero(here), SMOOTH)
    return np.array([x[p].mean() for p in parts]), np.array([np.median(y[p]) for p in parts])


def _rates(rows: Sequence[Row], names: Sequence[str]) -> str:
    lines = [Series(name, *_column(rows, name, "lr"), shade_of(i)) for i, name in enumerate(names)]
    drawn = line_chart(lines, x="step", y="")
    return drawn + keys([(name, shade_of(i)) for i, name in enumerate(names)]) if drawn else ""


def _validation(rows: Sequence[Row]) -> list[tuple[str, str]]:
    names = sorted({key for row in rows for key in row if key.startswith("val/")})
    out = []
    for name in names:
        x, y = _column(rows, name, None)
        known = y[np.isfinite(y)]
        inside = len(known) > 0 and known.min() >= 0 and known.max() <= 1
        out.append((name, line_chart([Series(name, x, y, bold=True)], x="step", y="", dots=True,
                                     limits=(0.0, 1.0) if inside else None)))  # fmt: skip
    return out
