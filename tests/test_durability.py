# SPDX-License-Identifier: AGPL-3.0-or-later
"""Each stage, killed by SIGKILL, is the undisturbed run to the last bit; and what the command line says of an end."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.test_trainer import same
from fsdet import config as configs
from fsdet import tasks
from fsdet.cli.main import main
from fsdet.data.synthetic import draw_demo
from fsdet.engine.checkpoint import candidates, is_finished, load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
STEPS = 6
SMALL = ["data.image_size=64", "data.support_size=64", "data.workers=0", "run.threads=1", "model.embed_dim=16",
         "episode.queries=2", "optim.warmup_epochs=0", f"optim.steps={STEPS}", "optim.accumulate=2", "eval.every=0",
         "log.every=1", "log.wandb.mode=disabled", "save.every_steps=1"]  # fmt: skip
STAGES = {
    1: ["episode.per_epoch=5"],
    2: ["episode.ways=3", "episode.shots=[1, 2]", "episode.per_epoch=5", "stage.init_from=one/best.pt"],
    3: [
        "episode.shots=2",
        "stage.recipe=far",
        "stage.init_from=one/best.pt",
        "run.precision=fp32",
        "episode.per_epoch=5",
    ],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small data set and a checkpoint of stage 1, which later stages start from."""
    place = tmp_path_factory.mktemp("user")
    draw_demo(place / "datasets/demo", sizes={"train": 48, "val": 4, "test": 4, "support": 24}, processes=1)
    before = Path.cwd()
    os.chdir(place)
    try:
        straight(1, Path("one"))
        yield place
    finally:
        os.chdir(before)


def overrides(stage: int, folder: Path) -> list[str]:
    return [*SMALL, *STAGES[stage], f"run.dir={folder}"]


def demo(stage: int) -> Path:
    return ROOT / f"configs/demo/stage_{stage}.yaml"


def straight(stage: int, folder: Path, resume: bool = False, *more: str) -> None:
    """Train in this process to the end."""
    tasks.build(configs.load(demo(stage), [*overrides(stage, folder), *more]), resume=resume).fit()


def killed(stage: int, folder: Path, rng: random.Random) -> int:
    """Train in another process, and kill it at a random moment after its first step; the steps it had told."""
    command = [sys.executable, "-m", "fsdet", "train", str(demo(stage)), *overrides(stage, folder)]
    with subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        told = folder / "metrics.jsonl"
        while process.poll() is None and not (told.exists() and '"committed"' in told.read_text()):
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.6))
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it was over before it was killed"
    return told.read_text().count('"committed"')


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_was_killed_is_the_undisturbed_one_to_the_last_bit(place, stage):
    """Parameters, EMA, optimizer, scaler, generators, position, metrics.jsonl and results.csv; workers 0, then 1."""
    whole = Path("one") if stage == 1 else Path(f"whole_{stage}")
    if stage > 1:
        straight(stage, whole)
    folder = Path(f"killed_{stage}")
    steps = killed(stage, folder, random.Random())
    straight(stage, folder, bool(candidates(folder)), "data.workers=1")
    told = f"stage {stage} was killed after step {steps}"
    for name in ("metrics.jsonl", "results.csv"):
        assert (whole / name).read_text() == (folder / name).read_text(), f"{name}: {told}"
    for name in ("last.pt", "best.pt"):
        a, b = load(whole / name), load(folder / name)
        assert a.pop("config") != b.pop("config"), "their folders"
        assert same(a, b), f"{name}: {told}"
    assert torch.tensor([row["total"] for row in rows(folder) if row["kind"] == "step"]).isfinite().all()


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_too_many_rejections_are_exit_1_with_the_report_and_no_traceback(place, capsys):
    """Nothing is finite after a step at such a learning rate; the run is rewound once, and ends."""
    hot = ["optim.name=sgd", "optim.lr=1e30", "optim.min_lr=0", "optim.clip_norm=0", "optim.steps=60",
           "guard.max_rejected_in_row=2", "guard.max_rewinds=1"]  # fmt: skip
    assert main(["train", str(demo(1)), *overrides(1, Path("hot")), *hot]) == 1
    told = capsys.readouterr().err
    message = told[told.index("error: training stopped at step 1") :]
    assert "before: " in message and "rewind 1 of 1" in message and "fsdet doctor hot" in message
    assert Path(re.search(r"^report: (.+)$", message, re.MULTILINE)[1]).is_file()
    assert not is_finished(Path("hot")) and load("hot/last.pt")["position"]["rewinds"][0]["lr_factor"] == 0.5
    assert main(["doctor", "hot"]) == 0 and "rewind 1: from step" in capsys.readouterr().out


def test_the_second_signal_does_not_wait_and_what_was_saved_is_intact(place):
    """It comes while the step that the first one waits for takes long."""
    code = (
        "import sys, time\n"
        "from fsdet.tasks.fewshot import FewshotTask\n"
        "losses, count = FewshotTask.losses, []\n"
        "def slow(self, batch):\n"
        "    count.append(1)\n"
        "    if len(count) == 6: print('slow', flush=True); time.sleep(60)\n"
        "    return losses(self, batch)\n"
        "FewshotTask.losses = slow\n"
        "from fsdet.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = [sys.executable, "-c", code, "train", str(demo(1)), *overrides(1, Path("slow"))]
    with subprocess.Popen(
        command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout.readline() == "slow\n"
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None, "the first one waits for the step"
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 128 + signal.SIGTERM and time.monotonic() - began < 20
    # five batches an epoch in windows of two: the sixth is the fourth step's, and each before it may be saved by then
    assert load("slow/last.pt")["step"] in (1, 2, 3)
