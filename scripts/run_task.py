#!/usr/bin/env python3
# SPDX-License-Identifier: AGPL-3.0-or-later
"""A task beside few-shot detection from nothing: its demo data, training, evaluation; what is there is not made again.

    scripts/run_task.py maskrcnn|classifier [CONFIG] [key=value ... | the flags of scripts/train.py]

scripts/train_maskrcnn.sh and scripts/train_classifier.sh call it.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from runs import begun, finished, same_or_refuse, timed  # the files beside
from train import ROOT, Request, fsdet, guarded, translate

from fsdet import config as configs
from fsdet.command import typed
from fsdet.config import Config
from fsdet.errors import ConfigError, explain

DEFAULT = {"maskrcnn": "configs/demo/maskrcnn.yaml", "classifier": "configs/demo/docuforge.yaml"}
DEMO = {"maskrcnn": Path("datasets/instances"), "classifier": Path("datasets/documents")}
HEADS = {"maskrcnn": ("rpn", "box_head", "mask_head"), "classifier": ("classifier",)}  # what --head-lr-multiplier means
HEAD_KEY = "optim.lr_scale.head="
SEEN = ", whose images the training has seen"


def requested(task: str, argv: Sequence[str]) -> Request:
    """Flags and `key=value` words as a Request whose config is set; a head's rate is that of each of its parts."""
    request = translate(argv, 1, prog=task)
    if request.config is None:
        request = translate(["--config", str(ROOT / DEFAULT[task]), *argv], 1, prog=task)
    parts = [text.removeprefix(HEAD_KEY) for text in request.overrides if text.startswith(HEAD_KEY)]
    rest = [text for text in request.overrides if not text.startswith(HEAD_KEY)]
    request.overrides = [f"optim.lr_scale.{part}={value}" for value in parts for part in HEADS[task]] + rest
    return request


def run_task(task: str, request: Request, times: dict[str, float]) -> Path:
    """Bring a training to its end and judge it on `eval.split`, or on what there is; returns the run folder."""
    if request.resume:
        run = Path(request.resume)
        request.overrides.append(f"run.dir={run.parent if run.suffix == '.pt' else run}")
    config = configs.load(request.config, request.overrides)
    if config.task != task:
        raise ConfigError(explain(f"task: {task}", config.task, str(request.config), "use the script of that task"))
    folder = Path(config.run.dir)
    if finished(folder) and not request.exist_ok:
        same_or_refuse(config, folder)
        print(f"{folder}: finished before, nothing to train; over it with --exist-ok")
    else:
        if _demo_missing(task, config):
            timed(fsdet, times, "demo data", ["data", "demo", DEMO[task], "--task", task])
        resume = ["--resume"] if begun(folder) and not request.exist_ok else []
        words = [*resume, *["--exist-ok"] * request.exist_ok, *request.overrides]
        timed(fsdet, times, "train", ["train", os.path.relpath(request.config), *words])
    split = _split(task, config)
    timed(fsdet, times, "evaluation", ["eval", folder / "best.pt", "--split", split, "--device", config.run.device,
                                       "--json", folder / "results.json"])  # fmt: skip
    return folder


def _demo_missing(task: str, config: Config) -> bool:
    path = Path(config.data.path)
    return DEMO[task] in (path, path.parent) and not path.exists()


def _split(task: str, config: Config) -> str:
    """`eval.split` where the data have it, else val, else train; a classifier's val is held out of train by itself."""
    from fsdet.data.report import Report
    from fsdet.data.sources import plan

    there = {*plan(config.data.path, Report()).splits, *(["val"] if task == "classifier" else [])}
    split = next((s for s in (config.eval.split, "val") if s in there), "train")
    if split != config.eval.split:
        print(f"no split {config.eval.split}: split {split} is judged{SEEN if split == 'train' else ''}")
    return split


def main(argv: Sequence[str]) -> int:
    """`TASK [CONFIG] [flags] [key=value ...]`."""
    task, times = argv[0], {}
    request = requested(task, argv[1:])
    for note in request.notes:
        print(f"note: {note}")
    folder = run_task(task, request, times)
    print("\n".join(["", *(f"{part:<12}{seconds:8.1f} s" for part, seconds in times.items())]))
    for verb in ("report", "doctor"):
        print(f"next: {typed('fsdet {} {}', verb, folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1:])))
