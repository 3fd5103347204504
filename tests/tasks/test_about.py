# SPDX-License-Identifier: AGPL-3.0-or-later
"""`fsdet info` tells parts, operations and memory; the memory is what a training step takes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fsdet.cli.main import main
from fsdet.models.build import model_spec
from fsdet.tasks import about, kind_of
from tasks import others

ROOT = Path(__file__).resolve().parents[2]
STEP = """
import ctypes, re, sys
from pathlib import Path
import torch
from fsdet import config
from fsdet.engine.optimizer import build_optimizer
from fsdet.tasks import about, kind_of
torch.set_num_threads(1)
file, batch, side = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
settings = config.load(file, [f"data.image_size={side}"])
kind = kind_of(settings.task, "test")
spec = kind.planned(settings)[0]
model = kind.network(spec, "test").train()
told = about.step_memory(kind, model, spec, settings, [(batch, side)], "fp32", torch.device("cpu"))
for norm in model.modules():
    if settings.stage.freeze_norm and isinstance(norm, torch.nn.BatchNorm2d):
        norm.eval()
optimizer = build_optimizer(model.groups(), settings.optim)
def step(images):
    kind.practice(model, images).backward()
    optimizer.step()
    optimizer.zero_grad()
def kilobytes(key):
    return int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
step(torch.rand(2, 3, 64, 64))
optimizer.state.clear()
ctypes.CDLL(None).malloc_trim(0)
before = kilobytes("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the largest size so far starts anew
step(torch.rand(batch, 3, side, side))
print(told.total - told.weights - told.ema, 1024 * (kilobytes("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is read from Linux's /proc"
)
@pytest.mark.parametrize(
    ("file", "batch", "side"),
    [("stage_1.yaml", 8, 256), ("stage_2.yaml", 8, 256), ("docuforge.yaml", 32, 128), ("maskrcnn.yaml", 4, 256)],
)
def test_the_estimate_is_what_a_process_grows_by_within_a_third(file, batch, side):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", STEP, str(ROOT / "configs/demo" / file), str(batch), str(side)]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    told, grew = map(int, done.stdout.split()[-2:])
    assert grew > 50e6 and 0.75 < told / grew < 1.34, f"told {told / 1e6:.0f} MB, grew by {grew / 1e6:.0f} MB"


@pytest.fixture(params=others.TASKS)
def line(request, sets, tmp_path):
    return lambda *more: others.words(request.param, sets[request.param], tmp_path / "run", *more)


def told(capsys, *argv: str) -> list[str]:
    assert main(["info", *argv]) == 0
    return [row[2:] for row in capsys.readouterr().out.splitlines() if row.startswith("# ")]


def numbers(rows: list[str]) -> tuple[float, float]:
    """(GFLOPs, GiB)."""
    text = "\n".join(rows)
    return float(re.search(r"([\d.e+-]+) GFLOPs", text)[1]), float(re.search(r"\(([\d.]+) activations", text)[1])


def test_every_task_tells_operations_memory_and_what_is_frozen(line, capsys):
    rows = told(capsys, *line("stage.freeze=[backbone]"))
    assert any(re.match(r"  backbone +[\d.]+ M, frozen$", row) for row in rows)
    assert any(re.match(r"  total .*of 50 M, [\d.]+ M of it trains", row) for row in rows)
    assert any("GFLOPs an image at" in row for row in rows) and any(
        "a training step of 4 images" in row for row in rows
    )


def test_size_batch_and_budget_may_be_asked_for(sets, tmp_path, capsys):
    line = others.words("classifier", sets["classifier"], tmp_path / "run", "classifier.width=1")
    small, large = (told(capsys, *line, "--size", str(side), "--batch", "64") for side in (64, 128))
    assert numbers(large)[0] == pytest.approx(4 * numbers(small)[0], rel=0.05)
    assert numbers(large)[1] == pytest.approx(4 * numbers(small)[1], rel=0.2)
    assert "a training step of 64 images at 128 px, fp32" in "\n".join(large)
    assert any("of 2 M: over the budget" in row for row in told(capsys, *line, "--budget", "2"))
    assert main(["info", *line, "--size", "100"]) == 2 and "a multiple of 32" in capsys.readouterr().err
    assert main(["info", *line, "--size", "10000000"]) == 2 and "up to 4096, got '10000000'" in capsys.readouterr().err


def test_batchnorm_that_keeps_its_statistics_takes_less_memory(capsys):
    line = (str(ROOT / "configs/demo/stage_1.yaml"), "data.path=", "run.device=cpu", "--size", "640")
    moving, still = (told(capsys, *line, f"stage.freeze_norm={word}") for word in ("false", "true"))
    assert numbers(still)[1] < 0.8 * numbers(moving)[1]


def test_the_two_branches_of_the_detector_are_told_apart(best, capsys):
    assert main(["info", str(best), "--size", "64"]) == 0
    rows = capsys.readouterr().out.splitlines()
    counts = {row.split()[0]: row.split()[1] for row in rows[1:] if re.search(r" [\d.]+ M", row)}
    assert list(counts) == ["backbone", "neck", "box", "tower", "standard", "prototype", "contrast", "total"]
    model = about.checkpoints.load(best)["model"]
    own = ("head.embed", "head.proxies", "head.refine", "head.objectness")
    embed = sum(v.numel() for k, v in model.items() if k.startswith(own)) + 2
    assert float(counts["prototype"]) == pytest.approx(embed / 1e6, abs=0.005)
    assert any("at 64 px" in row for row in rows)


@pytest.mark.parametrize("switches", [{}, {"refine": True, "objectness": True}])
def test_parts_are_every_parameter_once(switches):
    spec = model_spec("yolov8n", "P3-P5", 3, 8, 16, "anchors", True, 3, **switches)
    model = kind_of("fewshot", "test").network(spec, "test")
    listed = [name for members in model.parts().values() for name, _ in members]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())


def test_episodes_count_their_supports(small_demo, tmp_path, capsys):
    words = [f"data.path={small_demo}", "stage.name=episodic", "episode.ways=4", "episode.shots=[1,2]",
             "episode.queries=3", "data.image_size=96", "data.support_size=64", "model.embed_dim=16"]  # fmt: skip
    (tmp_path / "c.yaml").write_text("run: {precision: fp32}\n", encoding="utf-8")
    rows = told(capsys, str(tmp_path / "c.yaml"), *words)
    assert any("a training step of 3 images at 96 px and 8 supports at 64 px, fp32" in row for row in rows)


def test_a_checkpoint_whose_configuration_is_not_read_any_more_says_so(best, tmp_path, capsys):
    state = torch.load(best, weights_only=True)
    torch.save({**state, "config": {"gone": 1}}, tmp_path / "old.pt")
    assert main(["info", str(tmp_path / "old.pt")]) == 0
    assert "no estimate of memory: the configuration it holds is of another version" in capsys.readouterr().out
