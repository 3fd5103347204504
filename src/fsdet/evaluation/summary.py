# SPDX-License-Identifier: AGPL-3.0-or-later
"""From figures per draw of shots to results.json and to the table of several of them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from fsdet.errors import DataError, ShapeError, explain
from fsdet.evaluation.results import (
    AT_THRESHOLD,
    FIGURES,
    checked,
    finite,
    measured_lines,
    read_results,  # noqa: F401, callers find everything of results.json here
    refuse_mixture,
)
from fsdet.evaluation.scorer import Scores
from fsdet.files import readable, write_durably

_COUNTED = {"fp_per_image"}  # printed as they are; the others are shares, printed in per cent
_T975 = (12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157)


def t975(freedom: int) -> float:
    """97.5 % quantile of Student's t, to 1e-5: a table below 10 degrees of freedom, else Abramowitz & Stegun 26.7.5."""
    if freedom < 1:
        return math.nan
    if freedom <= len(_T975):
        return _T975[freedom - 1]
    z = 1.959963984540054
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(g / freedom**k for k, g in enumerate(terms))


def interval(values: Iterable[float]) -> dict:
    """{"mean", "ci95", "ci95_t", "values"} of n figures, one a seed.

    ci95: half-width as papers publish it, 1.96 std(ddof 0) / sqrt(n). ci95_t: t(n - 1) std(ddof 1) / sqrt(n), the
    honest one at small n; nan at n = 1. A nan among the values makes all three nan; no values at all raise ShapeError.
    """
    array = np.array(list(values), np.float64)
    n = len(array)
    if n == 0:
        raise ShapeError("interval expects at least one value, got none")
    t_width = t975(n - 1) * array.std(ddof=1) / math.sqrt(n) if n > 1 else math.nan
    return {
        "mean": float(array.mean()),
        "ci95": float(1.96 * array.std() / math.sqrt(n)),
        "ci95_t": float(t_width),
        "values": array.tolist(),
    }


def harmonic_mean(b: float, n: float) -> float:
    """2 b n / (b + n), 0 when both are 0, nan when one is."""
    return 0.0 if b + n == 0 else 2 * b * n / (b + n)


def figures(scores: Scores, base: Sequence[int], novel: Sequence[int], fp_per_image: float) -> dict[str, float]:
    """One draw's row of results.json: the figures of FIGURES. nan where a group of classes has no ground truth.

    recall is that of the novel classes at IoU .5 among the 100 best detections of an image.
    """
    b, n = scores.ap50(base), scores.ap50(novel)
    return {
        "nAP50": n,
        "nAP": scores.ap(novel),
        "bAP50": b,
        "bAP": scores.ap(base),
        "AP50": scores.ap50((*base, *novel)),
        "HM50": harmonic_mean(b, n),
        "fp_per_image": float(fp_per_image),
        "recall": scores.recall(novel),
    }


def per_class(draws: Sequence[Scores], names: Sequence[str]) -> dict[str, dict]:
    """{class name: interval of its AP50 over the draws}."""
    return {name: interval(s.class_ap50[c] for s in draws) for c, name in enumerate(names)}


def results_json(
    *,
    setting: str,
    metric: str,
    checkpoint_sha256: str,
    seeds: Sequence[int],
    standard: Mapping[str, float],
    shots: Mapping[int, Sequence[Mapping[str, float]]],
    ms_per_image: float,
    **extra: object,
) -> dict:
    """The dict of results.json.

    standard: {"bAP50", "bAP"} of the standard head alone. shots: {K: one row of `figures` per seed}, which may hold
    {"at_threshold": the figures of AT_THRESHOLD}. `extra` keys are added as they are; TTA is off and said so.
    Raises:
        ShapeError: a K has another number of rows than there are seeds.
    """
    for k, rows in shots.items():
        if len(rows) != len(seeds):
            raise ShapeError(f"results_json expects {len(seeds)} rows, one a seed, for K = {k}, got {len(rows)}")
    return {
        "setting": setting,
        "metric": metric,
        "checkpoint_sha256": checkpoint_sha256,
        "seeds": list(seeds),
        "tta": False,
        "standard": {key: float(standard[key]) for key in ("bAP50", "bAP")},
        "shots": {str(k): _of_draws(rows) for k, rows in sorted(shots.items())},
        "ms_per_image": float(ms_per_image),
        **extra,
    }


def _of_draws(rows: Sequence[Mapping]) -> dict:
    """{figure: interval over the draws}, with those at the proposed thresholds where every draw has them."""
    out = {key: interval(row[key] for row in rows) for key in FIGURES}
    at = [row["at_threshold"] for row in rows if "at_threshold" in row]
    if len(at) == len(rows):
        out["at_threshold"] = {key: interval(row[key] for row in at) for key in AT_THRESHOLD}
    return out


def write_json(path: str | Path, value: object) -> Path:
    """Write `value` durably and all at once, as every JSON reader knows it: nan and inf as null, names `readable`."""
    text = json.dumps(_plain(value), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    return write_durably(Path(path), text.encode())


def table(results: Sequence[Mapping], labels: Sequence[str]) -> str:
    """Markdown that also reads well as plain text: one row per result and K, mean ± ci95 (t ci95_t), in per cent.

    n is the number of values of a row's K, which merged results may have more of at one K than at another.
    Raises:
        DataError: nothing to print, not results.json, or results of different rules, split, images, classes or data.
        ShapeError: not one label per result.
    """
    head, rows, told = cells(results, labels)
    split = len(told) - len(labels)
    return "\n".join((*told[:split], "", *_markdown(head, rows), "", *told[split:]))


def cells(results: Sequence[Mapping], labels: Sequence[str]) -> tuple[Sequence[str], list[list[str]], list[str]]:
    """(head, rows, lines that say what the figures are, at the end one of each result's checkpoints) of `table`."""
    if len(results) != len(labels):
        raise ShapeError(f"table expects {len(results)} labels, got {len(labels)}")
    if not results:
        raise DataError(explain("at least one results.json", "none", "table", "name the files"))
    for result, label in zip(results, labels, strict=True):
        checked(result, label)
    refuse_mixture(results, labels)
    thresholds = any("at_threshold" in shot for result in results for shot in result["shots"].values())
    head = ("", "K", "n", "nAP50", "nAP", "bAP50", "bAP", "AP50", "HM50", "FP/image", "recall",
            *(("FP/image at threshold", "recall at threshold") if thresholds else ()), "ms/image")  # fmt: skip
    rows = [row for result, label in zip(results, labels, strict=True) for row in _rows(result, label, thresholds)]
    first = results[0]
    title = (
        f"setting {first['setting']}, metric {first['metric']}, TTA {'on' if first['tta'] else 'off'}; "
        "mean ± 1.96 std / sqrt(n) (t: by Student's t), n draws or trainings, per cent except FP/image and ms/image; "
        "'-': no such ground truth"
        + ("; threshold: the one that registration proposes for each class" if thresholds else "")
    )
    stamps = [
        f"{label}: checkpoint {_hashes(r)}, seeds {', '.join(map(str, r['seeds']))}"
        + "".join(f", {switch} {value}" for switch, value in r.get("scoring", {}).items())
        for r, label in zip(results, labels, strict=True)
    ]
    return head, rows, [title, *measured_lines(results, labels), *stamps]


def _hashes(result: Mapping) -> str:
    """Every checkpoint of a result, short."""
    return ", ".join(str(h)[:12] for h in result.get("checkpoints_sha256") or [result["checkpoint_sha256"]])


def per_class_table(results: Sequence[Mapping], labels: Sequence[str]) -> str:
    """Markdown: AP50 of each novel class in per cent, a column per result and K, mean ± ci95 over the draws.

    A file that does not say which classes are novel shows all of its classes.
    Raises:
        DataError: results that do not belong in one table, or none of them has figures by class.
        ShapeError: not one label per result.
    """
    head, rows = per_class_cells(results, labels)
    return "\n".join(_markdown(head, rows))


def per_class_cells(results: Sequence[Mapping], labels: Sequence[str]) -> tuple[Sequence[str], list[list[str]]]:
    """(head, rows) of `per_class_table`."""
    if len(results) != len(labels):
        raise ShapeError(f"per_class_table expects {len(results)} labels, got {len(labels)}")
    refuse_mixture(results, labels)
    columns = [(f"{label}, K = {k}", found, result.get("novel"))
               for result, label in zip(results, labels, strict=True)
               for k, found in sorted(result.get("per_class", {}).items(), key=lambda item: int(item[0]))]  # fmt: skip
    if not columns:
        raise DataError(explain("AP50 by class", "none", ", ".join(labels), "make the files again: fsdet eval --json"))
    names = list(dict.fromkeys(name for _, found, novel in columns for name in (found if novel is None else novel)))
    rows = [[name, *(_cell(found, name) for _, found, _ in columns)] for name in names]
    return ("AP50", *(head for head, _, _ in columns)), rows


def _plain(value: object) -> object:
    """JSON's own types: mappings with text keys, lists, finite numbers, null."""
    if isinstance(value, Mapping):
        return {readable(k): _plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, str):
        return readable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rows(result: Mapping, label: str, thresholds: bool) -> list[list[str]]:
    """A result's rows; the standard head alone comes first, where it has base classes to find and figures of them."""
    standard, ms = result["standard"], _number(result.get("ms_per_image"), 1)
    at = AT_THRESHOLD[:2] if thresholds else ()
    rows = [
        [
            label,
            str(k),
            str(_count(shot)),
            *(_cell(shot, key) for key in FIGURES),
            *(_cell(shot.get("at_threshold", {}), key) for key in at),
            ms,
        ]
        for k, shot in sorted(result["shots"].items(), key=lambda item: int(item[0]))
    ]
    if result["setting"] == "fsod" or not any(finite(standard.get(key)) for key in ("bAP50", "bAP")):
        return rows
    base = [_number(standard.get(key), 1, 100) for key in ("bAP50", "bAP")]
    return [[f"{label}, standard head", "-", "-", "-", "-", *base, "-", "-", "-", "-", *("-" for _ in at), ms], *rows]


def _count(shot: Mapping) -> int:
    """The number of values of a K."""
    return max((len(shot[key]["values"]) for key in FIGURES if key in shot), default=0)


def _cell(shot: Mapping, key: str) -> str:
    """`57.8 ± 0.9 (t 1.3)`; the mean alone of one value, which has no interval."""
    digits, scale = (2, 1) if key in _COUNTED else (1, 100)
    entry = shot.get(key) or {}
    mean, width, t_width = (_number(entry.get(x), digits, scale) for x in ("mean", "ci95", "ci95_t"))
    if mean == "-" or len(entry["values"]) == 1:
        return mean
    return f"{mean} ± {width}" + ("" if t_width == "-" else f" (t {t_width})")


def _number(value: float | None, digits: int, scale: float = 1) -> str:
    return f"{scale * value:.{digits}f}" if finite(value) else "-"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    wide = [max(3, *map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = [":" + "-" * (wide[0] - 1), *("-" * (w - 1) + ":" for w in wide[1:])]
    justify = [
        [row[0].ljust(wide[0]), *(x.rjust(w) for x, w in zip(row[1:], wide[1:], strict=True))] for row in (head, *rows)
    ]
    return ["| " + " | ".join(cells) + " |" for cells in (justify[0], rule, *justify[1:])]
