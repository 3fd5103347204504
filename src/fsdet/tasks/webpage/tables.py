# SPDX-License-Identifier: AGPL-3.0-or-later
"""A run's results.json as sections of a page."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from fsdet.errors import counted
from fsdet.evaluation.summary import cells, per_class_cells
from fsdet.pictures.charts import Series, line_chart
from fsdet.pictures.page import Section, charts, figures, folded, table
from fsdet.tasks import judge

CURVES = (("nAP50", "novel AP50", "var(--line)"), ("bAP50", "base AP50", "var(--miss)"))


def sections(results: Mapping[str, Any], name: str, warning: str = "") -> list[Section]:
    """Figures, table, figures against K. results: of `fsdet eval`, of shots or of a split; empty for none."""
    if not results:
        return []
    shown = _of_a_split(results) if judge.is_of_a_split(results) else _of_shots(results, name)
    return [replace(shown, remark=f"{warning} {shown.remark}".strip())]


def _of_shots(results: Mapping[str, Any], name: str) -> Section:
    head, rows, told = cells([results], [name])
    classes = per_class_cells([results], [name]) if results.get("per_class") else ((), [])
    by_class = folded("AP50 by class and shots, in per cent", table(*classes, "AP50 by class and shots"))
    content = figures(_large(results["shots"])) + table(head, rows, "results by shots") + by_class + _against_k(results)
    return Section("Results", content, f"From results.json. {'; '.join(told)}.")


def _of_a_split(results: Mapping[str, Any]) -> Section:
    shown = [(_percent(value), key) for key, value in results["metrics"].items()]
    confusion = ""
    if "confusion" in results:
        rows = [[name, *map(str, row)] for name, row in zip(results["names"], results["confusion"], strict=True)]
        confusion = table(["taken for, of true:", *results["names"]], rows, "confusion matrix")
    of = f"{counted(results['images'], 'image')} of split {results['split']}"
    told = f"{results['task']}, {of}, per cent, from results.json."
    return Section("Results", figures(shown) + confusion, told)


def _large(shots: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(value, what it is) of the largest K."""
    k = max(shots, key=int)
    few = counted(int(k), "shot")
    wanted = (("nAP50", f"novel AP50, {few}"), ("nAP", f"novel AP, {few}"), ("bAP50", "base AP50"),
              ("HM50", "harmonic mean of the AP50s"), ("recall", f"novel recall, {few}"))  # fmt: skip
    pairs = [(_percent(shots[k].get(key, {}).get("mean")), text) for key, text in wanted]
    false = shots[k].get("fp_per_image", {}).get("mean")
    pairs += [(f"{false:.2f}", "false positives an image")] if false is not None else []
    return [pair for pair in pairs if pair[0] != "-"]


def _against_k(results: Mapping[str, Any]) -> str:
    """nAP50 and bAP50 over K with their 95 % bands; nothing for one K, which the table says."""
    lines = []
    for key, text, shade in CURVES:
        rows = [(int(k), shot[key]["mean"], shot[key]["ci95"]) for k, shot in results["shots"].items() if key in shot]
        known = np.array(sorted(r for r in rows if None not in r and all(map(math.isfinite, r)))).reshape(-1, 3)
        if len(known) > 1:
            k, mean, width = known.T
            lines.append(Series(text, k, 100 * mean, shade, True, 100 * (mean - width), 100 * (mean + width)))
    chart = line_chart(lines, x="labelled instances a novel class (K)", y="per cent", log_x=True, dots=True,
                       limits=(0.0, 100.0))  # fmt: skip
    return charts([(" and ".join(s.name for s in lines) + " against shots", chart)])


def _percent(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{100 * value:.1f}"
