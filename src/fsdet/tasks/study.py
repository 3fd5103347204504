# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet eval --study FILE`: methods x trainings x K x draws on one test split, resumable, one table and one figure.

A cell is one evaluation: a checkpoint under all K and draws where nothing is trained, one fine-tuning per checkpoint, K
and draw where something is. A cell that has its results.json, made from the same checkpoint and settings, is not made
again, but for more K or draws than it has; a fine-tuning that was interrupted is resumed.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from fsdet import config as configs
from fsdet import tasks, yaml_strict
from fsdet.config import Section
from fsdet.detect.scoring import Scoring
from fsdet.engine.checkpoint import candidates, is_finished
from fsdet.errors import ConfigError, counted, did_you_mean, explain
from fsdet.evaluation import summary
from fsdet.evaluation.results import refuse_mixture
from fsdet.files import is_json_with, refuse_foreign, write_durably
from fsdet.pictures import is_picture, plot_shots
from fsdet.tasks.protocol import evaluate_checkpoint, evaluate_scorings

log = logging.getLogger("fsdet")
SHARED = ("setting", "metric", "split")
TABLE, FIGURE = "table.md", "shots.png"


class Method(Section):
    """checkpoints: one per training of the detector. config: the stage-3 file that each is fine-tuned by, for every K
    and draw; without it classes are registered and nothing is trained. overrides: key=value words for that file.
    scoring: switches of detect/scoring.py for registered classes, such as {reduce: best}. results: finished
    results.json files instead, of a rival for example.
    """

    checkpoints: tuple[str, ...] = ()
    config: str | None = None
    overrides: tuple[str, ...] = ()
    scoring: dict[str, Any] = Field(default_factory=dict)
    results: tuple[str, ...] = ()


class Plan(Section):
    """A study file: what is compared, on what, how often."""

    data: str
    out: str
    shots: tuple[int, ...] = (1, 3, 5, 10)
    seeds: int = Field(default=10, ge=1)
    setting: Literal["gfsod", "fsod"] = "gfsod"
    metric: Literal["coco", "voc07"] = "coco"
    split: str = "test"
    methods: dict[str, Method]


@dataclass(frozen=True)
class Cell:
    """One evaluation: of `checkpoint`, registered under all K and draws, or fine-tuned for one of each."""

    folder: Path
    checkpoint: Path
    method: Method
    shots: tuple[int, ...]
    seed: int | None


def read_plan(path: Path) -> Plan:
    """A study file. Raises ConfigError with every problem, each with file and line."""
    document = yaml_strict.read(path)
    problems = list(document.problems)
    plan = None
    try:
        plan = None if problems and document.value is None else Plan.model_validate(document.value or {})
    except ValidationError as error:
        for item in error.errors(include_url=False, include_context=False):
            key = tuple(str(part) for part in item["loc"])
            unknown = key and item["type"] == "extra_forbidden"
            near = did_you_mean(key[-1], [*Plan.model_fields, *Method.model_fields]) if unknown else ""
            problems.append(f"{document.where(key)}: key '{'.'.join(key)}': {item['msg']}.{near}")
    for name, method in plan.methods.items() if plan else ():
        missing = [p for p in (*method.checkpoints, *method.results, method.config) if p and not Path(p).is_file()]
        where = document.where(("methods", name))
        problems += [f"{where}: method '{name}': expected a file, got nothing at '{p}'" for p in missing]
        if bool(method.checkpoints) == bool(method.results):
            problems.append(f"{where}: method '{name}': expected either checkpoints or results")
        if method.scoring and (method.config or method.results):
            problems.append(f"{where}: method '{name}': expected scoring where classes are registered, without config "
                            "or results")  # fmt: skip
        if method.overrides and not method.config:
            problems.append(f"{where}: method '{name}': expected overrides beside config, whose values they change")
        problems += _scoring_problem(f"{document.where(('methods', name, 'scoring'))}: method '{name}'", method)
    problems += _same_file(document, plan) if plan else []
    if problems or plan is None:
        raise ConfigError("\n  ".join([f"{counted(len(problems), 'problem')} in a study:", *problems]))
    return plan


def _same_file(document: yaml_strict.Document, plan: Plan) -> list[str]:
    """Methods that would write to each other's files; a file system may not tell letter case apart."""
    first: dict[str, str] = {}
    same = [(name, other) for name in plan.methods
            if (other := first.setdefault(_file_name(name).casefold(), name)) != name]  # fmt: skip
    return [f"{document.where(('methods', name))}: method '{name}': expected names that differ in letters, digits, "
            f"- or ., got one beside '{other}'" for name, other in same]  # fmt: skip


def _scoring_problem(where: str, method: Method) -> list[str]:
    try:
        Scoring.of(method.scoring)
    except ConfigError as error:
        return [f"{where}: {error}"]
    return []


def run(path: Path, device: str = "auto") -> str:
    """Make every cell that is missing; writes OUT/<method>.json, table.md and shots.png. Returns the table.

    Raises:
        ConfigError: the study file. UserError, DataError, CheckpointError: of a cell; what was made before it stays.
    """
    plan = read_plan(path)
    _refuse_others(plan)
    _register_together(plan, device)
    merged: dict[str, dict] = {}
    for name, method in plan.methods.items():
        found = [summary.read_results(p) for p in method.results]
        found += [_made(cell, plan, device) for cell in _cells(plan, name, method)]
        merged[name] = merge(found)
        summary.write_json(_merged(plan, name), merged[name])
    text = summary.table(list(merged.values()), list(merged))
    write_durably(Path(plan.out) / TABLE, (text + "\n").encode())
    plot_shots(list(merged.values()), Path(plan.out) / FIGURE, list(merged))
    return text


def _refuse_others(plan: Plan) -> None:
    """Raises UserError where a file that no study wrote has the name of one that is to be written."""
    for name in plan.methods:
        refuse_foreign(_merged(plan, name), "a results.json", is_json_with("setting", "shots"))
    refuse_foreign(Path(plan.out) / TABLE, "a table of fsdet", _is_table)
    refuse_foreign(Path(plan.out) / FIGURE, "a picture of fsdet", is_picture)


def _is_table(path: Path) -> bool:
    text = path.read_text("utf-8", errors="replace")
    return "nAP50" in text and "| -" in text


def _home(plan: Plan, name: str) -> Path:
    return Path(plan.out) / _file_name(name)


def _merged(plan: Plan, name: str) -> Path:
    """Where the results of a method's cells are written together."""
    return Path(plan.out) / f"{_file_name(name)}.json"


def _file_name(method: str) -> str:
    """A method's name as that of a file in OUT, neither hidden nor OUT's parent."""
    return "".join(c if c.isalnum() or c == "-" or (c == "." and at) else "_" for at, c in enumerate(method))


def _cells(plan: Plan, name: str, method: Method) -> Iterator[Cell]:
    for i, checkpoint in enumerate(method.checkpoints):
        folder = _home(plan, name) / f"training{i}"
        if method.config is None:
            yield Cell(folder, Path(checkpoint), method, plan.shots, None)
            continue
        for k in plan.shots:
            for seed in range(plan.seeds):
                yield Cell(folder / f"{k}shot_seed{seed}", Path(checkpoint), method, (k,), seed)


def _register_together(plan: Plan, device: str) -> None:
    """Make the missing cells that train nothing: those of one checkpoint by one look at the images."""
    missing: dict[Path, list[Cell]] = {}
    for name, method in plan.methods.items():
        for cell in _cells(plan, name, method):
            if cell.seed is None and _read(cell, plan) is None:
                missing.setdefault(cell.checkpoint, []).append(cell)
    for checkpoint, cells in missing.items():
        log.info("study: %s", ", ".join(str(cell.folder) for cell in cells))
        scorings = list(dict.fromkeys(Scoring.of(cell.method.scoring) for cell in cells))
        shared = {key: getattr(plan, key) for key in ("data", "shots", "seeds", *SHARED)}
        found = evaluate_scorings(checkpoint, scorings, device=device, **shared)
        by_scoring = dict(zip(scorings, found, strict=True))
        for cell in cells:
            results = by_scoring[Scoring.of(cell.method.scoring)]
            asked = {"shots": list(plan.shots), "seeds": plan.seeds}
            summary.write_json(cell.folder / "results.json", {**results, "study": _stamp(cell, plan), "asked": asked})


def _made(cell: Cell, plan: Plan, device: str) -> dict:
    """The cell's results, read when they are there."""
    if (found := _read(cell, plan)) is not None:
        return found
    log.info("study: %s", cell.folder)
    checkpoint, out = _fine_tuned(cell, plan, device), cell.folder / "results.json"
    found = evaluate_checkpoint(checkpoint, data=plan.data, shots=cell.shots, seeds=plan.seeds, setting=plan.setting,
                                metric=plan.metric, split=plan.split, device=device)  # fmt: skip
    summary.write_json(out, {**found, "study": _stamp(cell, plan)})
    return summary.read_results(out)


def _read(cell: Cell, plan: Plan) -> dict | None:
    """The cell's results under the plan's K and draws; None where there are none yet, or fewer of either.

    Raises:
        ConfigError: they are of other settings than the plan's. DataError: the file is damaged.
    """
    out = cell.folder / "results.json"
    if not out.is_file():
        return None
    found = summary.read_results(out)
    shots, draws = _asked(found) if cell.seed is None else (cell.shots, plan.seeds)
    if found.get("study") != _stamp(cell, plan, shots, draws):
        raise ConfigError(explain("results of this study's settings", "of other ones", str(out),
                                  "name another `out`, or remove that folder"))  # fmt: skip
    if cell.seed is not None:
        return found
    if not set(cell.shots) <= set(shots) or plan.seeds > draws:
        log.info("study: %s has %s shots x %d draws; it is made again", out, ", ".join(map(str, shots)), draws)
        return None
    return found if found.get("stage") == "finetune" else _part(found, cell.shots, plan.seeds)


def _asked(found: Mapping[str, Any]) -> tuple[list[int], int]:
    """The K and the number of draws that a registration cell was made with, which its stamp holds."""
    asked = found.get("asked") or {"shots": sorted(map(int, found["shots"])), "seeds": len(found["seeds"])}
    return list(asked["shots"]), int(asked["seeds"])


def _part(found: Mapping[str, Any], shots: Sequence[int], draws: int) -> dict:
    """The results of the first `draws` draws of some K."""

    def cut(entry: Mapping) -> dict:
        if isinstance(entry.get("values"), list):
            return _joined([{"values": entry["values"][:draws]}])
        return {name: cut(figures) for name, figures in entry.items()}

    part = {key: {str(k): cut(found[key][str(k)]) for k in shots if str(k) in found[key]}
            for key in ("shots", "per_class") if key in found}  # fmt: skip
    if "draws" in found:
        seeds = set(map(str, found["seeds"][:draws]))
        part["draws"] = {k: {**row, "sha256": {s: h for s, h in row["sha256"].items() if s in seeds}}
                         for k, row in found["draws"].items() if int(k) in shots}  # fmt: skip
    return {**found, **part, "seeds": found["seeds"][:draws]}


def _stamp(cell: Cell, plan: Plan, shots: Sequence[int] | None = None, draws: int | None = None) -> str:
    """Hash of everything that shapes a cell, with the plan's K and number of draws unless others are given."""
    seeds = (plan.seeds if draws is None else draws) if cell.seed is None else [cell.seed]
    parts = [hashlib.sha256(cell.checkpoint.read_bytes()).hexdigest(), *(getattr(plan, key) for key in SHARED),
             plan.data, cell.shots if shots is None else shots, seeds, cell.method.overrides]  # fmt: skip
    if cell.method.config:
        parts.append(configs.dump(configs.load(cell.method.config)))
    if changed := Scoring.of(cell.method.scoring).changed():
        parts.append(changed)
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def _fine_tuned(cell: Cell, plan: Plan, device: str) -> Path:
    """best.pt of stage 3 on one draw: the same one that registration takes for that K and seed."""
    run = cell.folder / "run"
    own = [f"data.path={plan.data}", f"stage.init_from={cell.checkpoint}", f"run.dir={run}", f"run.device={device}",
           f"run.seed={cell.seed}", f"episode.shots={cell.shots[0]}", "log.wandb.mode=disabled"]  # fmt: skip
    config = configs.load(cell.method.config, [*own, *cell.method.overrides])
    if is_finished(run):
        return run / "best.pt"
    return tasks.build(config, resume=bool(candidates(run))).fit().best


def merge(results: Sequence[Mapping[str, Any]]) -> dict:
    """Several results.json dicts as one: each K's values one after another, so that an interval spans them all.

    `seeds` are the draws that any of them has; a K's number of values is that of its own values.
    Raises:
        ConfigError: they differ in setting, metric or split. DataError: in images, classes or data.
    """
    first = results[0]
    for key in SHARED:
        if len({str(r.get(key)) for r in results if r.get(key) is not None}) > 1:
            got = ", ".join(sorted({str(r.get(key)) for r in results}))
            raise ConfigError(explain(f"results of one {key}", got, "study", "compare like with like"))
    refuse_mixture(results, [str(r["checkpoint_sha256"])[:12] for r in results])
    ks = sorted({int(k) for r in results for k in r["shots"]})
    shots = {str(k): _merged_shots([r["shots"][str(k)] for r in results if str(k) in r["shots"]]) for k in ks}
    standard = {key: _mean([r["standard"].get(key) for r in results]) for key in ("bAP50", "bAP")}
    hashes = [str(h) for r in results for h in r.get("checkpoints_sha256", [r["checkpoint_sha256"]])]
    kept = {key: next(r[key] for r in results if r.get(key) is not None)
            for key in ("split", "images", "data", "novel", "scoring")
            if any(r.get(key) is not None for r in results)}  # fmt: skip
    return {**{k: first[k] for k in ("setting", "metric", "tta")}, "standard": standard, "shots": shots,
            "seeds": sorted({s for r in results for s in r["seeds"]}),
            "checkpoint_sha256": hashes[0], "checkpoints_sha256": list(dict.fromkeys(hashes)),
            "ms_per_image": _mean([r.get("ms_per_image") for r in results]), **_merged_classes(results, ks),
            **_merged_draws(results), **kept}  # fmt: skip


def _merged_draws(results: Sequence[Mapping]) -> dict:
    """{"draws": ...} of all that say which shots they are from; trainings under the same draws say the same."""
    out: dict[str, dict] = {}
    for k, row in ((k, row) for r in results for k, row in r.get("draws", {}).items()):
        out.setdefault(k, {"unit": row["unit"], "sha256": {}})["sha256"].update(row["sha256"])
    return {"draws": out} if out else {}


def _merged_shots(shots: Sequence[Mapping]) -> dict:
    """One K of several results: intervals over the values of all, of the figures that all have."""
    out = {name: _joined([s[name] for s in shots]) for name in summary.FIGURES if all(name in s for s in shots)}
    if all("at_threshold" in s for s in shots):
        out["at_threshold"] = {n: _joined([s["at_threshold"][n] for s in shots]) for n in summary.AT_THRESHOLD}
    return out


def _merged_classes(results: Sequence[Mapping], ks: Sequence[int]) -> dict:
    """{"per_class": {K: {class: interval}}} where every result has it, else nothing."""
    if not all("per_class" in r for r in results):
        return {}
    out = {}
    for k in map(str, ks):
        found = [r["per_class"][k] for r in results if k in r["per_class"]]
        out[k] = {name: _joined([f[name] for f in found if name in f]) for name in found[0]}
    return {"per_class": out}


def _joined(intervals: Sequence[Mapping]) -> dict:
    """The interval over all values of several."""
    return summary.interval(float("nan") if v is None else v for i in intervals for v in i["values"])


def _mean(values: Sequence[float | None]) -> float:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else float("nan")
