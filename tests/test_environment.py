# SPDX-License-Identifier: AGPL-3.0-or-later
"""Where a user stands, what the folders are called and whether HOME can be written change nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.test_trainer import same
from fsdet.data.synthetic import draw_demo
from fsdet.engine.checkpoint import load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[1]
SMALL = ["data.image_size=96", "data.support_size=64", "run.threads=1", "model.embed_dim=16", "episode.queries=2",
         "optim.warmup_epochs=0", "eval.every=0", "optim.steps=2", "log.wandb.mode=disabled"]  # fmt: skip


def fsdet(cwd: Path, home: str, *words: object) -> str:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("YOLO_", "XDG_", "WANDB_", "MPL"))}
    own = {"HOME": home, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-m", "fsdet", *map(str, words)], cwd=cwd, env={**kept, **own}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=200, encoding="utf-8")  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stdout, done.stdout
    return done.stdout


def test_a_home_that_cannot_be_written_another_folder_and_names_outside_ascii_change_no_bit(tmp_path):
    """/dev/null as HOME: not even root can make a folder in it."""
    plain, odd = tmp_path / "plain", tmp_path / "köln 東京 'q'"
    for place in (plain, odd):
        draw_demo(place / "data", sizes={"train": 8, "val": 2, "test": 1, "support": 1}, processes=1)
    (tmp_path / "home").mkdir()
    stage = ROOT / "configs/demo/stage_1.yaml"
    fsdet(plain, str(tmp_path / "home"), "train", stage, *SMALL, "data.path=data/data.yaml", "run.dir=run")
    fsdet(ROOT, "/dev/null", "train", stage, *SMALL, f"data.path={odd}/data/data.yaml", f"run.dir={odd}/läuft",
          "data.workers=1")  # fmt: skip
    one, other = load(plain / "run/last.pt"), load(odd / "läuft/last.pt")
    assert one["step"] == 2 and same(one["model"], other["model"])
    fsdet(tmp_path, "/dev/null", "train", "--resume", odd / "läuft", "optim.steps=3")
    assert load(odd / "läuft/last.pt")["step"] == 3
