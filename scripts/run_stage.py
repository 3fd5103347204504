#!/usr/bin/env python3
# SPDX-License-Identifier: AGPL-3.0-or-later
"""One stage from nothing: data, the stage before, training, evaluation; what is there already is not made again.

    scripts/run_stage.py 2 [CONFIG] [key=value ... | the flags of scripts/train.py]

train_stage_2.sh, scripts/train_stage_1.sh and scripts/train_stage_3.sh call it.
"""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from runs import finished, same_or_refuse, stopped, timed  # the files beside
from train import DEMO, ROOT, Request, default_config, demo_missing, fsdet, guarded, translate

from fsdet import config as configs
from fsdet import yaml_strict
from fsdet.command import typed
from fsdet.config import Config
from fsdet.errors import ConfigError, DataError, UserError, explain

# what the stage before is told, too; not a W&B name, which is one run's
PASSED_ON = ("data.", "model.", "run.deterministic=", "run.device=", "run.precision=", "run.seed=", "run.threads=",
             "log.wandb.mode=", "log.wandb.project=", "log.wandb.entity=", "log.tensorboard=")  # fmt: skip
STAGES = {1: "base", 2: "episodic", 3: "finetune"}
times: dict[str, float] = {}


def call(part: str, *argv: object) -> None:
    """`fsdet argv...`, its time noted under `part`; a failure ends this script with the same exit code."""
    timed(fsdet, times, part, argv)


def run_stage(request: Request) -> Path:
    """Bring a stage to its end and evaluate it; returns the run folder."""
    source = request.config or default_config(request)
    if request.resume:
        request = replace(request, overrides=[*request.overrides, f"run.dir={_folder(request.resume)}"])
    config, named = configs.load(source, request.overrides), _names_init(request)
    request, config = _own_stage_before(request, source, config)
    folder, name = Path(config.run.dir), f"train stage {request.stage}"
    _check_stage(config, request.stage, source)
    lacking = _lacking(config) if request.stage > 1 else []
    if lacking:
        print(f"evaluation will be skipped: {config.data.path} has {', '.join(lacking)}", flush=True)
    shots = _possible_shots(config) if request.stage == 2 and not lacking else config.eval.shots
    if finished(folder) and not request.exist_ok:
        same_or_refuse(config, folder)
        print(f"{folder}: finished before, nothing to train")
    else:
        if demo_missing(config):
            call("demo data", "data", "demo", DEMO)
        resume = ["--resume"] if any(folder.glob("*.pt")) and not request.exist_ok else []
        if not resume:
            _stage_before(request, source, config, named)
        call(name, "train", _shown(source), *resume, *["--exist-ok"] * request.exist_ok, *request.overrides)
    if request.stage > 1 and not lacking and shots:
        _evaluate(config, shots, folder)
    return folder


def _folder(run: str) -> Path:
    path = Path(run)
    return path.parent if path.suffix == ".pt" else path


def _shown(path: Path) -> str:
    return os.path.relpath(path)


def _check_stage(config: Config, stage: int, source: Path) -> None:
    if config.stage.name != STAGES[stage]:
        raise ConfigError(
            explain(
                f"stage.name {STAGES[stage]}",
                config.stage.name,
                _shown(source),
                f"give a stage {stage} configuration, or use the script of that stage",
            )
        )


def _lacking(config: Config) -> list[str]:
    """What the data have not of what an evaluation needs; the demo set, drawn when it is missing, has it all.

    Raises:
        DataError: no data set, or not one that stage 3 can take its shots from.
    """
    if not config.data.path or demo_missing(config):
        return []
    from fsdet.data.report import Report
    from fsdet.data.sources import plan

    listed, finetune = plan(config.data.path, Report()), config.stage.name == "finetune"
    missing = ["no novel classes"] if not listed.novel else []
    if finetune and "support" not in listed.splits and not config.data.shots:
        missing.append("no split support")
    if finetune and missing:
        wanted, cure = "novel classes and shots of them", "list novel: and support: in the data YAML, or set data.shots"
        raise DataError(explain(wanted, ", ".join(missing), config.data.path, cure))
    wanted = [config.eval.split] if finetune else ["support", config.eval.split]
    return missing + [f"no split {split}" for split in dict.fromkeys(wanted) if split not in listed.splits]


def _possible_shots(config: Config) -> Sequence[int]:
    """Those of eval.shots that the data have instances for; what is left out is told before anything is trained."""
    kept, why = _possible(config, config.eval.shots)
    if why:
        print(f"{why} ({config.data.path})", flush=True)
    return kept


def _possible(config: Config, ks: Sequence[int]) -> tuple[Sequence[int], str]:
    """Those of `ks` that split support has instances for, and why not the rest; all of them where it cannot be read."""
    if not config.data.path or demo_missing(config):
        return ks, ""
    from fsdet.data.shots import possible
    from fsdet.data.sources import load

    try:
        data = load(config.data.path, splits=["support"])
        support = data.split("support")
    except DataError:  # the training reads all of it, and tells all that is wrong
        return ks, ""
    return possible(support, range(data.num_base, len(data.names)), ks, data.names)


def _own_stage_before(request: Request, source: Path, config: Config) -> tuple[Request, Config]:
    """Other data than those of the checkpoint that the configuration starts from: a stage before of their own.

    Its run folder is the run's with `-stage1` (or 2); a checkpoint that the user names is taken as it is.
    """
    init = _start(config)
    if init is None or _names_init(request) or not init.is_file() or _same_data(init, config):
        return request, config
    own = f"{config.run.dir}-stage{request.stage - 1}/best.pt"
    print(f"{init} was trained on other data: this run starts from {own}")
    request = replace(request, overrides=[*request.overrides, f"stage.init_from={own}"])
    return request, configs.load(source, request.overrides)


def _start(config: Config) -> Path | None:
    """The checkpoint that a run starts from; a run folder that is there stands for its best.pt."""
    from fsdet.engine.checkpoint import in_run

    return in_run(config.stage.init_from) if config.stage.init_from else None


def _same_data(checkpoint: Path, config: Config) -> bool:
    beside = checkpoint.with_name("config.yaml")
    run = yaml_strict.read(beside).value if beside.is_file() else None
    before = (run.get("data") or {}).get("path") if isinstance(run, dict) else None
    return not before or Path(before).resolve() == Path(config.data.path).resolve()


def _stage_before(request: Request, source: Path, config: Config, named: bool) -> None:
    """Bring the stage that stage.init_from names to its end, if its configuration is known.

    A checkpoint that is there is taken as it is when the user has `named` it, or when no run that was stopped left it.
    """
    init = _start(config)
    if init is None:
        return
    there = init.exists()
    if there and (named or not stopped(init.parent)):
        return
    before = source.with_name(f"stage_{request.stage - 1}.yaml")
    passed = [text for text in request.overrides if text.startswith(PASSED_ON)]
    own = f"{config.run.dir}-stage{request.stage - 1}"
    passed += [f"run.dir={own}"] if init in (Path(own), Path(own, "best.pt")) else []
    known = before.is_file() and configs.load(before, passed).run.dir
    if known and init in (Path(known), Path(known, "best.pt")):
        why = f"{known} was stopped before its end" if there else f"{init} is missing"
        print(f"{why}: training stage {request.stage - 1} first")
        run_stage(Request(request.stage - 1, before, passed))
    elif not there:
        raise UserError(
            explain("a checkpoint", "no such file", f"stage.init_from={init}", "train that stage first, or correct it")
        )


def _names_init(request: Request) -> bool:
    """Whether the user says where to start from; what a configuration says is no more than usual."""
    return any(text.startswith("stage.init_from=") for text in request.overrides)


def _evaluate(config: Config, shots: Sequence[int], folder: Path) -> None:
    results, best = folder / "results.json", folder / "best.pt"
    if results.exists() and results.stat().st_mtime_ns >= best.stat().st_mtime_ns and _asked(config, shots, results):
        call("table", "eval", "--table", results)
        return
    call(
        f"evaluation of {folder.name}",
        *("eval", best, "--shots", ",".join(map(str, shots)), "--seeds", config.eval.seeds, "--json", results),
        *("--setting", config.eval.setting, "--metric", config.eval.metric, "--split", config.eval.split),
        *("--device", config.run.device),
    )


def _asked(config: Config, shots: Sequence[int], path: Path) -> bool:
    """Whether a results.json answers what eval.* asks, at the K that can be had.

    A fine-tuned detector has one K and one draw, its own.
    """
    from fsdet.evaluation.summary import read_results

    found, asked = read_results(path), config.eval
    if (found["setting"], found["metric"], found.get("split")) != (asked.setting, asked.metric, asked.split):
        return False
    draws = [int(k) for k in found["shots"]], len(found["seeds"])
    return config.stage.name == "finetune" or draws == (sorted(shots), asked.seeds)


def next_stage(request: Request, folder: Path) -> str:
    """The command of the stage after: the configuration beside, what this one was told of data and model, its result.

    A run in a folder of its own is followed by one beside it. Empty after stage 3.
    """
    stage = request.stage + 1
    script = {2: "./train_stage_2.sh", 3: "./scripts/train_stage_3.sh"}.get(stage)
    if script is None:
        return ""
    usual = default_config(replace(request, stage=stage))
    beside = (request.config or usual).with_name(usual.name)
    source = beside if beside.is_file() else usual
    words = [] if source == usual else [_shown(source)]
    passed = [text for text in request.overrides if text.startswith(PASSED_ON)]
    best, following = folder / "best.pt", configs.load(source, passed)
    if Path(following.stage.init_from or "") not in (best, folder):
        passed += [f"stage.init_from={best}", f"run.dir={folder}-stage{stage}"]
    if stage == 3 and isinstance(wanted := following.episode.shots, int) and not following.data.shots:
        kept, _ = _possible(following, range(1, wanted + 1))
        passed += [f"episode.shots={max(kept)}"] if kept and max(kept) < wanted else []
    return " ".join([script, *map(shlex.quote, [*words, *passed])])


def closing(request: Request, folder: Path) -> str:
    """Times, pictures and the exact next commands."""
    stage = request.stage
    lines = ["", *(f"{part:<28}{seconds:8.1f} s" for part, seconds in times.items() if part != "table")]
    pictures = sorted([*folder.glob("*.png"), *folder.glob("*.jpg")]) + sorted(folder.glob("episodes/*.jpg"))[-1:]
    if pictures:
        lines += ["", "pictures:", *(f"  {picture}" for picture in pictures)]
    following = next_stage(request, folder)
    lines += ["", f"next, in {ROOT}:" if os.environ.get("FSDET_STOOD") else "next:"]
    lines += [f"  {following}"] if following else []
    if stage > 1:
        predict = typed("fsdet predict {} --support support/ --source photos/ --out predictions", folder / "best.pt")
        lines.append(f"  {predict}   # support/<class>/*.jpg: your classes")
    if (folder / "wandb").is_dir():
        lines.append("  ./scripts/dashboard.sh   # the run in a terminal")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """`STAGE [CONFIG] [flags] [key=value ...]`."""
    stage = int(argv[0])
    request = translate(argv[1:], stage, prog=f"stage {stage}")
    if request.stage != stage:
        raise UserError(explain(f"--stage {stage} or none", str(request.stage), "flags", "use that stage's script"))
    for note in request.notes:
        print(f"note: {note}")
    folder = run_stage(request)
    print(closing(request, folder))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
