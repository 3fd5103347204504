# SPDX-License-Identifier: AGPL-3.0-or-later
"""results.json as a document: read, checked to the last number, and told which of several may stand in one table."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fsdet.errors import DataError, explain

FIGURES = ("nAP50", "nAP", "bAP50", "bAP", "AP50", "HM50", "fp_per_image", "recall")
AT_THRESHOLD = ("fp_per_image", "recall", "threshold")  # at the thresholds that registration proposes
RULES = ("setting", "metric", "tta")  # results that differ in one of these are not comparable; every file has them
KEYS = (*RULES, "checkpoint_sha256", "seeds", "standard", "shots")
KINDS = {"setting": str, "metric": str, "tta": bool, "checkpoint_sha256": str, "standard": Mapping, "shots": Mapping,
         "seeds": list, "scoring": Mapping, "data": Mapping, "per_class": Mapping, "draws": Mapping, "novel": list,
         "images": int, "split": str, "checkpoints_sha256": list}  # fmt: skip
OPTIONAL = ("split", "images", "novel")  # may be null, which says nothing
_AGAIN = "make the file with fsdet eval --json"


def read_results(path: str | Path) -> dict:
    """A results.json back as a dict. Raises DataError, with all that is wrong, when it is none or damaged."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(explain("a results.json", str(error), str(path), "make one with fsdet eval --json")) from error
    return checked(value, str(path))


def _no_number(text: str) -> float:
    raise ValueError(f"the value {text}, which is no number of JSON")


def checked(value: object, where: str) -> dict:
    """`value` if it has the form of results.json. Raises DataError with all that is missing or of another form."""
    if not isinstance(value, Mapping):
        raise DataError(explain("the keys of results.json", f"a {type(value).__name__}", where, _AGAIN))
    missing = [key for key in KEYS if key not in value]
    if missing and value.get("task"):
        raise DataError(explain("results by K and draw of the few-shot detector", f"results of the {value['task']}",
                                where, "see them with fsdet report RUN"))  # fmt: skip
    if missing:
        raise DataError(explain("the keys of results.json", f"nothing under {', '.join(missing)}", where, _AGAIN))
    wrong = list(_faults(value))
    if wrong:
        more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise DataError(explain("figures by K and draw", "; ".join(wrong[:4]) + more, where, _AGAIN))
    return value  # type: ignore[return-value]


def _faults(value: Mapping) -> Iterator[str]:
    """What is of another form than results.json, one phrase each."""
    off = [key for key, kind in KINDS.items() if key in value and not isinstance(value[key], kind)
           and not (value[key] is None and key in OPTIONAL)]  # fmt: skip
    yield from (f"{key} is {_short(value[key])}" for key in off)
    entries = {key: value[key] for key in ("standard", "seeds", "shots", "per_class", "draws")
               if key in value and key not in off}  # fmt: skip
    yield from (f"standard {k} is {_short(v)}" for k, v in entries.get("standard", {}).items() if not _figure(v))
    if not _figure(value.get("ms_per_image")):
        yield f"ms_per_image is {_short(value['ms_per_image'])}"
    wrong = (s for s in entries.get("seeds", ()) if not isinstance(s, int) or isinstance(s, bool))
    yield from (f"a seed is {_short(s)}" for s in wrong)
    if entries.get("shots") == {}:
        yield "shots is empty"
    for where in ("shots", "per_class"):
        for k, entry in entries.get(where, {}).items():
            yield from _faults_of_k(str(k), entry, where)
    for k, row in entries.get("draws", {}).items():
        if not isinstance(row, Mapping) or "unit" not in row or not isinstance(row.get("sha256"), Mapping):
            yield f"draws {k} is {_short(row)}"


def _faults_of_k(k: str, entry: object, where: str) -> Iterator[str]:
    if not (k.isascii() and k.isdigit() and len(k) < 10 and int(k) > 0):
        yield f"{where} has a K of '{k[:20]}', which is no number from 1 up"
    elif not isinstance(entry, Mapping):
        yield f"{where} {k} is {_short(entry)}"
    else:
        for name, figure in entry.items():
            if name == "at_threshold" and where == "shots" and isinstance(figure, Mapping):
                yield from (f"{where} {k} {name} {n} is {_short(f)}" for n, f in figure.items() if not _interval(f))
            elif not _interval(figure):
                yield f"{where} {k} {name} is {_short(figure)}"


def _figure(value: object) -> bool:
    """A number, or None where there is nothing to measure."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _interval(value: object) -> bool:
    if not isinstance(value, Mapping) or not {"mean", "ci95", "values"} <= set(value):
        return False
    widths, draws = (value["mean"], value["ci95"], value.get("ci95_t")), value["values"]
    return all(map(_figure, widths)) and isinstance(draws, list | tuple) and bool(draws) and all(map(_figure, draws))


def _short(value: object) -> str:
    return repr(value)[:60]


def measured_on(result: Mapping) -> dict[str, str]:
    """{what: on which} of what a result was measured on, as far as it says so: split, images, classes, data."""
    data, novel, told = result.get("data", {}), result.get("novel"), {}
    if result.get("split") is not None:
        told["split"] = str(result["split"])
    if result.get("images") is not None:
        told["number of images"] = str(result["images"])
    if novel is not None:
        told["list of novel classes"] = f"{len(novel)}: {', '.join(map(str, novel))}"[:120]
    if "classes_sha256" in data:
        counts = f"{data.get('base')} base and {data.get('novel')} novel"
        told["list of classes"] = f"{counts}, sha256 {str(data['classes_sha256'])[:12]}"
    if "sha256" in data:
        told["data set"] = f"{data.get('name')}, sha256 {str(data['sha256'])[:12]}"
    return told


def refuse_mixture(results: Sequence[Mapping], labels: Sequence[str]) -> None:
    """Raises DataError when results differ in what they say of rules or of what they were measured on.

    The name of the data set is not compared, its content is: one data set may lie in two places.
    """
    told = [{**{rule: r[rule] for rule in RULES}, **measured_on(r)} for r in results]
    for what in dict.fromkeys(key for row in told for key in row):
        rows = [(row[what], _identity(what, row, r), label)
                for row, r, label in zip(told, results, labels, strict=True) if what in row]  # fmt: skip
        if len({identity for _, identity, _ in rows}) > 1:
            got = ", ".join(f"{shown} ({label})" for shown, _, label in rows)
            raise DataError(explain(f"one {what} in a table", got, "table",
                                    f"print one table per {what}; these figures cannot be compared"))  # fmt: skip


def _identity(what: str, row: Mapping, result: Mapping) -> str:
    data = result.get("data", {})
    if what == "list of novel classes":
        return json.dumps(result["novel"])
    return str({"data set": data.get("sha256"), "list of classes": data.get("classes_sha256")}.get(what, row[what]))


def measured_lines(results: Sequence[Mapping], labels: Sequence[str]) -> list[str]:
    """What a table's figures were measured on, once, and which files do not say so."""
    told = [measured_on(r) for r in results]
    known = {what: which for row in reversed(told) for what, which in row.items()}  # the first that says it counts
    data = next((r["data"] for r in results if "sha256" in r.get("data", {})), None)
    parts = [known["data set"]] if data else []
    parts += [f"split {known['split']}"] if "split" in known else []
    parts += [f"{known['number of images']} images"] if "number of images" in known else []
    if data:
        counted = data.get("novel_counted", data.get("novel"))
        less = "" if counted == data.get("novel") else f" ({counted} of them with ground truth, which alone count)"
        parts.append(f"{data.get('base')} base and {data.get('novel')} novel classes{less}")
    lines = [f"measured on {', '.join(parts)}"] if parts else []
    for row, label in zip(told, labels, strict=True):
        silent = [what for what in ("split", "number of images", "list of classes", "data set") if what not in row]
        if silent:
            lines.append(f"{label}: the file does not say its {', '.join(silent)}; taken as the same")
    return lines


def finite(value: float | None) -> bool:
    """Whether there is a figure to print."""
    return value is not None and math.isfinite(value)
