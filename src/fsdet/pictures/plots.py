# SPDX-License-Identifier: AGPL-3.0-or-later
"""Curves and counts as PNG files. matplotlib is imported when the first one is drawn, without pyplot or a window."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fsdet.errors import DataError, ShapeError, explain
from fsdet.files import write_durably
from fsdet.pictures.drawing import MARK, colour

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from fsdet.types import ImageRecord  # at run time it would import torch

_AXES = ("epoch", "step")  # columns of results.csv that are the horizontal axis, best first
_COUNTERS = (*_AXES, "batch", "time")  # columns without a panel
_RATES = "lr/"  # columns that share a panel
_LOG_FROM = 10.0  # ratio of two learning rates of one row from which their panel is logarithmic
_NAMES_A_ROW, _NAME = 40, 24  # class names under an axis, characters of one
_LINE = "#2f6fb3"
_SOFT = "#e8833a"


def plot_results(csv_path: str | Path, out: str | Path) -> Path:
    """results.png of a run: a panel for every column of results.csv, as measured and smoothed; one for all lr/ columns.

    Raises:
        DataError: the file is missing or has no row with a number.
    """
    columns = _read_columns(Path(csv_path))
    axis = next((name for name in _AXES if name in columns), None)
    series = {k: v for k, v in columns.items() if k not in _COUNTERS and np.isfinite(v).any()}
    if not series:
        raise DataError(explain("rows of numbers", "none", str(csv_path), "train for at least one epoch"))
    x = columns[axis] if axis else np.arange(1, len(next(iter(series.values()))) + 1)
    rates = {k: series.pop(k) for k in list(series) if k.startswith(_RATES)}
    count = len(series) + bool(rates)
    wide = min(5, count)
    figure, panels = _figure(wide, math.ceil(count / wide), (3.0, 2.5))
    for panel, (name, y) in zip(panels, series.items(), strict=False):
        _curve(panel, x, y, name)
    if series:
        panels[0].legend(fontsize=7, frameon=False)
    if rates:
        _rates(panels[len(series)], x, rates)
    for panel in panels[:count]:
        panel.xaxis.get_major_locator().set_params(integer=True)
        if np.nanmax(x) > np.nanmin(x):
            panel.set_xlim(_widened(x))
    for panel in panels[count - wide : count]:
        panel.set_xlabel(axis or "row", fontsize=8)
    return _save(figure, out)


def _curve(panel: "Axes", x: np.ndarray, y: np.ndarray, name: str) -> None:
    """One column, as measured and smoothed; of a validation from 0 to 1, or to 100 if it is in per cent."""
    here = np.isfinite(y) & np.isfinite(x)
    panel.plot(x[here], y[here], marker="o", markersize=3, linewidth=1.4, color=_LINE, label="measured")
    if here.sum() > 4:
        panel.plot(x[here], _smooth(y[here]), linestyle=":", linewidth=2, color=_SOFT, label="smoothed")
    panel.set_title(name, fontsize=9)
    if name.startswith("val/") and 0 <= y[here].min(initial=0) and y[here].max(initial=0) <= 100:
        panel.set_ylim(0, 1 if y[here].max(initial=0) <= 1 else 100)


def _rates(panel: "Axes", x: np.ndarray, rates: Mapping[str, np.ndarray]) -> None:
    """The learning rate of every group; equal ones lie on one another, the first being the widest."""
    for i, (name, y) in enumerate(rates.items()):
        here = np.isfinite(y) & np.isfinite(x)
        width = 1.2 + 0.5 * (len(rates) - 1 - i)
        panel.plot(x[here], y[here], linewidth=width, color=_hex(i), label=name.removeprefix(_RATES))
    values = np.stack(list(rates.values()))
    known = np.where(values > 0, values, np.nan)
    known = known[:, np.isfinite(known).any(0)]
    if known.size and (np.nanmax(known, 0) >= _LOG_FROM * np.nanmin(known, 0)).any():
        panel.set_yscale("log", nonpositive="mask")
    panel.set_title(_RATES.rstrip("/"), fontsize=9)
    panel.legend(fontsize=6, frameon=False)


def _widened(x: np.ndarray, share: float = 0.05) -> tuple[float, float]:
    low, high = float(np.nanmin(x)), float(np.nanmax(x))
    return low - share * (high - low), high + share * (high - low)


def plot_labels(records: "Sequence[ImageRecord]", names: Sequence[str], out: str | Path) -> Path:
    """What the annotations are like: boxes a class, outlines about one centre, where centres lie, how large boxes are.

    Raises:
        DataError: there is no box.
    """
    kept = [r for r in records if len(r.labels)]
    if not kept:
        raise DataError(explain("at least one box", "none", "plot_labels", "check the annotations of the split"))
    labels = np.concatenate([r.labels for r in kept])
    size = np.concatenate([np.tile(r.size[::-1], (len(r.labels), 2)) for r in kept])
    boxes = np.concatenate([r.boxes for r in kept]) / size
    centre, extent = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    figure, panels = _figure(2, 2, (4.2, 4.0))
    _bars(panels[0], np.bincount(labels, minlength=len(names)), names)
    _outlines(panels[1], extent, labels)
    for panel, values, title in ((panels[2], centre, "box centres"), (panels[3], extent, "box sizes")):
        counts, *_, cells = panel.hist2d(*values.T, bins=40, range=((0, 1), (0, 1)), cmap="Blues", cmin=1)
        most = np.nanmax(counts, initial=1)
        cells.set_clim(-0.5 * most, most)  # a single box is to be seen, too
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(("x" if values is centre else "width") + " / image", fontsize=8)
        panel.set_ylabel(("y" if values is centre else "height") + " / image", fontsize=8)
        panel.set_aspect("equal")
    panels[2].invert_yaxis()
    return _save(figure, out)


def plot_confusion(matrix: np.ndarray, names: Sequence[str], out: str | Path, *, normalise: bool = True,
                   of: str = "", background: bool = True) -> Path:  # fmt: skip
    """A confusion matrix [C + 1, C + 1] (row predicted, column true, background last); shares of a column, or counts.

    of: what was counted, for the title. background: False for whole images, whose matrix is [C, C].

    Raises:
        ShapeError: unless the matrix is [C + 1, C + 1] for C names.
    """
    n = len(names) + background
    if matrix.shape != (n, n):
        raise ShapeError(f"plot_confusion expects a matrix [{n}, {n}] for {len(names)} names, got {list(matrix.shape)}")
    total = matrix.sum(0, keepdims=True)
    shown = np.divide(matrix, total, out=np.zeros(matrix.shape), where=total > 0) if normalise else matrix
    side = min(14.0, max(4.5, 2.2 + 0.42 * n))
    figure, (panel,) = _figure(1, 1, (side + 0.9, side))
    drawn = panel.imshow(np.where(matrix > 0, shown, np.nan), cmap="Blues", vmin=0, vmax=1 if normalise else None)
    panel.grid(False)
    if n <= 31:
        _cell_texts(panel, shown, matrix > 0, "{:.2f}" if normalise else "{:.0f}", 8 if n <= 16 else 6)
    ticks = [*names, "background"][:n]
    panel.set_xticks(range(n), ticks, rotation=90, fontsize=8)
    panel.set_yticks(range(n), ticks, fontsize=8)
    panel.set_xlabel("true")
    panel.set_ylabel("predicted")
    title = "confusion matrix, " + ("share of each true class" if normalise else "counts")
    panel.set_title(", ".join(filter(None, (title, of))), fontsize=10)
    figure.colorbar(drawn, ax=panel, shrink=0.8)
    return _save(figure, out)


def plot_pr(precision: np.ndarray, names: Sequence[str], out: str | Path, *, mean: str = "all classes",
            of: str = "") -> Path:  # fmt: skip
    """Precision over recall at IoU .5: [C, R] at R even recalls, nan rows left out; their mean in bold, called `mean`.

    of: what was measured, for the title.

    Raises:
        ShapeError: unless there is one row per name.
    """
    if precision.ndim != 2 or len(precision) != len(names):
        raise ShapeError(f"plot_pr expects precision [{len(names)}, R], got {list(precision.shape)}")
    recall = np.linspace(0, 1, precision.shape[1])
    figure, (panel,) = _figure(1, 1, (7.5, 5.0))
    known = [i for i in range(len(names)) if np.isfinite(precision[i]).all()]
    for i in known:
        label = f"{names[i]} {precision[i].mean():.3f}" if len(known) <= 20 else None
        panel.plot(recall, precision[i], linewidth=1.2, color=_hex(i), label=label)
    if known:
        middle = precision[known].mean(0)
        panel.plot(recall, middle, linewidth=2.8, color="#20242c", label=f"{mean} {middle.mean():.3f}")
        panel.legend(fontsize=8, frameon=False, bbox_to_anchor=(1.02, 1), loc="upper left", title="AP50")
    panel.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision")
    panel.set_title("precision and recall at IoU .5" + (f", {of}" if of else ""), fontsize=10)
    return _save(figure, out)


def plot_shots(results: Sequence[Mapping], out: str | Path, labels: Sequence[str] = ()) -> Path:
    """nAP50 over K of one or more results.json dicts, with bands of 1.96 std / sqrt(draws); bAP50 dashed, hollow.

    Raises:
        ShapeError: no results, or another number of labels.
    """
    if not results or len(labels) not in (0, len(results)):
        raise ShapeError(f"plot_shots expects results and a label each or none, got {len(results)} and {len(labels)}")
    figure, (panel,) = _figure(1, 1, (6.4, 4.4))
    ks: set[int] = set()
    for i, result in enumerate(results):
        shots = sorted((int(k), v) for k, v in result["shots"].items())
        name = labels[i] if labels else str(result["checkpoint_sha256"])[:12]
        for key, style in (("nAP50", "-o"), ("bAP50", "--s")):
            _band(panel, shots, key, style, f"{name}: {key}", _hex(i + 1))
        ks |= {k for k, _ in shots}
    panel.set_xscale("log")
    panel.set_xticks(sorted(ks), [str(k) for k in sorted(ks)])
    panel.minorticks_off()
    panel.set(xlabel="labelled instances a novel class (K)", ylabel="AP50, per cent")
    panel.set_ylim(0, 1.05 * max(panel.dataLim.y1, 1))  # a lone point at 100 is no half of one
    panel.set_title(f"{results[0]['setting']}, {results[0]['metric']}; mean and 95 % interval over draws", fontsize=10)
    panel.legend(fontsize=8, frameon=False)
    return _save(figure, out)


def _band(panel: "Axes", shots: Sequence[tuple[int, Mapping]], key: str, style: str, label: str, shade: str) -> None:
    rows = [(k, v[key]["mean"], v[key]["ci95"]) for k, v in shots if key in v]
    rows = [row for row in rows if None not in row and np.isfinite(row).all()]
    if not rows:
        return
    k, mean, width = np.array(rows, np.float64).T
    fill = "full" if style == "-o" else "none"  # told apart where there is one K and no line
    panel.plot(k, 100 * mean, style, fillstyle=fill, markersize=5, linewidth=1.8, color=shade, label=label)
    panel.fill_between(k, 100 * (mean - width), 100 * (mean + width), color=shade, alpha=0.18, linewidth=0)


def _read_columns(path: Path) -> dict[str, np.ndarray]:
    """{name: [rows] float64}; what is no number is nan."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except OSError as error:
        raise DataError(explain("a results.csv", str(error), str(path), "name the run's folder")) from error
    names = [n for n in (rows[0] if rows else ()) if n is not None]
    return {name.strip(): np.array([_float(row[name]) for row in rows]) for name in names}


def _float(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _smooth(y: np.ndarray) -> np.ndarray:
    """Gaussian mean over neighbours, continued beyond both ends by point reflection: it starts and ends at the data."""
    sigma = min(2.0, len(y) / 10)  # rows
    reach = min(math.ceil(3 * sigma), len(y) - 1)
    before, after = 2 * y[0] - y[reach:0:-1], 2 * y[-1] - y[-2 : -reach - 2 : -1]
    weight = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    return np.convolve(np.concatenate([before, y, after]), weight / weight.sum(), "valid")


def _bars(panel: "Axes", counts: np.ndarray, names: Sequence[str]) -> None:
    panel.bar(range(len(counts)), counts, color=[_hex(i) for i in range(len(counts))])
    panel.set_title("boxes a class", fontsize=10)
    shown = range(0, len(counts), math.ceil(len(counts) / _NAMES_A_ROW))
    texts = [name if len(name) <= _NAME else name[: _NAME - 1] + "…" for name in (names[i] for i in shown)]
    panel.set_xticks(shown, texts, rotation=90, fontsize=7 if len(shown) <= 30 else 6)
    panel.grid(axis="x", visible=False)
    panel.margins(x=0.02)


def _outlines(panel: "Axes", extent: np.ndarray, labels: np.ndarray, limit: int = 600) -> None:
    """At most `limit` boxes, evenly taken, as rectangles about one centre."""
    from matplotlib.collections import PolyCollection

    rows = np.linspace(0, len(extent) - 1, min(limit, len(extent))).astype(int)
    corner = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    shapes = 0.5 + corner[None] * extent[rows, None]
    panel.add_collection(
        PolyCollection(shapes, facecolors="none", edgecolors=[_hex(c) for c in labels[rows]], alpha=0.5)
    )
    panel.set(xlim=(0, 1), ylim=(0, 1), xticks=(), yticks=(), aspect="equal")
    panel.set_title("box outlines", fontsize=10)


def _cell_texts(panel: "Axes", shown: np.ndarray, wanted: np.ndarray, pattern: str, size: int) -> None:
    top = shown.max(initial=0)
    for row, column in np.argwhere(wanted):
        value = shown[row, column]
        ink = "white" if value > 0.55 * top else "#20242c"
        panel.text(column, row, pattern.format(value), ha="center", va="center", fontsize=size, color=ink)


def _hex(index: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*(round(0.86 * v) for v in colour(index)))


def _figure(columns: int, rows: int, panel: tuple[float, float]) -> tuple["Figure", list["Axes"]]:
    """A figure apart from pyplot's global state, so that threads may draw; panels row by row, unused ones hidden."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(columns * panel[0], rows * panel[1]), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in panels:
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _save(figure: "Figure", out: str | Path) -> Path:
    out = Path(out)
    for axes in figure.axes:
        if not axes.has_data():
            axes.set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": MARK})
    return write_durably(out, buffer.getvalue())
