# SPDX-License-Identifier: AGPL-3.0-or-later
"""Commands as a user types them, in processes of their own: three stages, evaluation, use, a stop and its resume."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fsdet.data.synthetic import draw_demo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "FSDET_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
SMALL = ["data.image_size=96", "data.support_size=64", "data.workers=0", "run.threads=1", "model.embed_dim=16",
         "episode.queries=2", "optim.warmup_epochs=0", "eval.every=0", "log.every=1",
         "log.wandb.mode=disabled"]  # fmt: skip
EPISODES = ["episode.ways=3", "episode.shots=[1, 2]"]


def call(*argv: object, cwd: Path, code: int = 0) -> str:
    """A command's output, both streams; it must end with `code` and without a traceback."""
    done = subprocess.run([str(word) for word in argv], cwd=cwd, env=ENVIRONMENT, text=True, timeout=250,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    assert done.returncode == code and "Traceback" not in done.stdout, done.stdout[-4000:]
    return done.stdout


def fsdet(*argv: object, cwd: Path, code: int = 0) -> str:
    return call(sys.executable, "-m", "fsdet", *argv, cwd=cwd, code=code)


def demo_stage(number: int) -> Path:
    return ROOT / f"configs/demo/stage_{number}.yaml"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Where the user stands; a few pictures of the demo set are in datasets/demo."""
    place = tmp_path_factory.mktemp("user")
    draw_demo(place / "datasets/demo", sizes={"train": 48, "val": 6, "test": 8, "support": 24}, processes=1)
    return place


@pytest.fixture(scope="module")
def stage_1(place) -> Path:
    fsdet("train", demo_stage(1), *SMALL, "optim.steps=3", cwd=place)
    return place / "checkpoints/stage1"


@pytest.fixture(scope="module")
def stage_2(place, stage_1) -> Path:
    told = fsdet("train", demo_stage(2), *SMALL, *EPISODES, "optim.steps=3", cwd=place)
    assert "tensors fitted" in told and "3 steps; run folder: checkpoints/stage2" in told
    return place / "checkpoints/stage2"


def test_stage_2_is_evaluated_reported_and_used(place, stage_2):
    results = stage_2 / "results.json"
    table = fsdet("eval", stage_2 / "best.pt", "--shots", "1,2", "--seeds", "2", "--json", results, cwd=place)
    assert "nAP50" in table and set(json.loads(results.read_text())["shots"]) == {"1", "2"}
    assert {"confusion.png", "pr_novel.png", "shots.png"} <= {path.name for path in stage_2.iterdir()}
    report = fsdet("report", stage_2, cwd=place)
    assert "finished" in report and "nAP50" in report and (stage_2 / "results.png").stat().st_size > 1000
    support = place / "support/mug"
    support.mkdir(parents=True)
    for number in range(2):
        shutil.copy(place / f"datasets/demo/support/00000{number}.jpg", support)
    told = fsdet("register", stage_2 / "best.pt", "--support", "support", "--out", "my.bank", cwd=place)
    [following] = [line.removeprefix("next: ") for line in told.splitlines() if line.startswith("next: ")]
    command = following.replace("IMAGE", "datasets/demo/test") + " --conf 0.01"
    call("bash", "-c", command, cwd=place)
    drawn = {path.name for path in (place / "predictions").iterdir()}
    assert drawn == {f"{number:06d}.jpg" for number in range(8)} | {"predictions.json"}


def test_the_log_answers_the_six_greps(stage_2):
    def grep(words: str, rest: str) -> str:
        return call("bash", "-c", f'grep "{words}" training_debug.log | {rest}', cwd=stage_2)

    assert [int(grep(words, "wc -l")) for words in ("NaN/Inf gradient", "Skipping optimizer step")] == [0, 0]
    found = {words: grep(words, "tail -20").splitlines()
             for words in ("dfl_loss:", "Norm after clip", "Total Grad Norm:", "Total Loss:")}  # fmt: skip
    assert [len(lines) for lines in found.values()] == [3, 3, 3, 3]
    for before, after in zip(found["Total Grad Norm:"], found["Norm after clip"], strict=True):
        norm = float(re.search(r"Norm: ([\d.]+)", before)[1])
        clipped, limit = map(float, re.search(r"clip: ([\d.]+) \(threshold ([\d.]+)\)", after).groups())
        assert clipped == pytest.approx(min(norm, limit), rel=1e-4)


def test_the_script_of_stage_3_trains_and_evaluates_from_another_folder(place, stage_2):
    command = [ROOT / "scripts/train_stage_3.sh", "configs/demo/stage_3.yaml", *SMALL, "optim.steps=3",
               "data.path=datasets/demo/data.yaml", "stage.init_from=checkpoints/stage2/best.pt",
               "run.dir=checkpoints/stage3_elsewhere", "episode.shots=2", "eval.seeds=1"]  # fmt: skip
    told = call(*command, cwd=place)
    folder = place / "checkpoints/stage3_elsewhere"
    assert list(json.loads((folder / "results.json").read_text())["shots"]) == ["2"], "its own K"
    assert "novel classes start from the prototypes" in told and "nAP50" in told and f"next, in {ROOT}:" in told
    again = call(*command, cwd=place)
    assert "finished before, nothing to train" in again and "nAP50" in again, "the same command prints its table"


def test_a_stopped_run_continues_where_it_was(place):
    run = place / "stopped"
    command = [sys.executable, "-m", "fsdet", "train", demo_stage(1), *SMALL, "optim.steps=100000", f"run.dir={run}"]
    with subprocess.Popen([str(word) for word in command], cwd=place, env=ENVIRONMENT, text=True,
                          stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:  # fmt: skip
        assert any("step 2 " in line and "Total Loss:" in line for line in process.stderr)
        process.send_signal(signal.SIGTERM)
        told = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "the state is saved" in told and f"-m fsdet train --resume {run}" in told
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = max(row["step"] for row in rows)
    again = fsdet("train", "--resume", run, f"optim.steps={last + 2}", cwd=place)
    assert f"at step {last}, batch {last}" in again and f"{last + 2} steps; run folder: {run}" in again
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "step"] == list(range(1, last + 3))


def test_what_the_user_has_to_mend_is_exit_2_and_no_traceback(place):
    (place / "corrupt.pt").write_bytes(b"not a checkpoint")
    for argv, told in (
        (["train", demo_stage(1), "optim.lrr=3"], "Did you mean 'lr'?"),
        (["train", demo_stage(1), "data.path=gone/data.yaml"], "gone/data.yaml: expected a data YAML"),
        (["eval", "corrupt.pt"], "corrupt.pt: expected"),
    ):
        shown = fsdet(*argv, cwd=place, code=2)
        assert told in shown and shown.splitlines()[-1].startswith("error: ")


def test_the_quick_check_prints_what_its_users_grep_for(place):
    told = call(ROOT / "scripts/test_gradient_fix.sh", "configs/demo/stage_2.yaml", *SMALL, *EPISODES[1:],
                "--n_episodes", "1", "stage.init_from=", "stage.freeze_norm=false",
                "data.path=datasets/demo/data.yaml", cwd=place)  # fmt: skip
    log = (place / "test_gradient_fix.log").read_text()
    assert log.count("Total Grad Norm:") == log.count("Total Loss:") == 5 and "Traceback" not in log
    assert "rejected steps: 0" in told and (place / "checkpoints/test_gradient_fix/best.pt").exists()
