# SPDX-License-Identifier: AGPL-3.0-or-later
"""The other tasks at a size that a step takes a moment on."""

import json
from pathlib import Path

import torch

from fsdet import config, tasks
from fsdet.data.documents import draw_documents
from fsdet.data.drawn_instances import draw_instances

TASKS = ("classifier", "maskrcnn")
SIZES = {"train": 8, "val": 6, "test": 6}
COMMON = ("run.threads=1", "run.device=cpu", "run.precision=fp32", "data.workers=0", "optim.epochs=2", "log.every=1",
          "log.wandb.mode=disabled", "eval.every=0", "optim.warmup_epochs=0", "save.every_steps=0")  # fmt: skip
OWN = {
    "classifier": ("data.image_size=32", "classifier.width=0.125", "episode.queries=4", "optim.name=sgd"),
    "maskrcnn": ("data.image_size=64", "maskrcnn.width=0.125", "maskrcnn.channels=16", "maskrcnn.box_features=16",
                 "episode.queries=4", "optim.ema=0.9"),
}  # fmt: skip
FILES = {"classifier": "configs/demo/docuforge.yaml", "maskrcnn": "configs/demo/maskrcnn.yaml"}
ROOT = Path(__file__).resolve().parents[2]


def draw(folder: Path) -> dict[str, Path]:
    """{task: data.yaml} of small sets."""
    return {"classifier": draw_documents(folder / "pages", sizes=SIZES, processes=1),
            "maskrcnn": draw_instances(folder / "shapes", sizes=SIZES, processes=1)}  # fmt: skip


def words(task: str, data: Path, folder: Path, *more: str) -> list[str]:
    """A command line's configuration: the demo's file, and what makes it small."""
    return [str(ROOT / FILES[task]), *COMMON, *OWN[task], f"data.path={data}", f"run.dir={folder}", *more]


def settings(task: str, data: Path, folder: Path, *more: str) -> config.Config:
    path, *overrides = words(task, data, folder, *more)
    return config.load(path, overrides)


def built(config_: config.Config):
    """The task alone, as a fresh run has it."""
    return tasks.build_task(config_, tasks.read_data(config_), resume=False)[0]


def rows(run: Path, kind: str) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """All that a run's last checkpoint knows, flat."""
    state = torch.load(run / "last.pt", weights_only=True)
    out: dict[str, torch.Tensor] = {}

    def walk(value, at):
        if isinstance(value, torch.Tensor):
            out[at] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                walk(item, f"{at}.{key}")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                walk(item, f"{at}.{number}")

    walk({k: state[k] for k in ("model", "ema", "optimizer", "rng")}, "")
    return out
