# SPDX-License-Identifier: AGPL-3.0-or-later
"""Two processes see the images that one would, and their gradient is the one that it would have."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from engine.test_trainer import same
from fsdet import config as configs
from fsdet import objective, tasks
from fsdet.assign import assign
from fsdet.engine.checkpoint import load
from fsdet.engine.optimizer import build_optimizer
from fsdet.engine.step import StepController
from fsdet.errors import ConfigError
from fsdet.peers import ALONE, Peers
from fsdet.types import Targets
from processes import together
from tasks import others

ALL = ["loss.weights.supcon=0.3", "loss.weights.cpe=0.2", "loss.weights.triplet=0.2", "loss.cpe_iou=0",
       "loss.pair_rows=64", "loss.bbox=wiou_v3", "loss.cpe_weighting=one"]  # fmt: skip
EPISODES = ["stage.name=episodic", "episode.ways=3", "episode.shots=[1,2]"]
SHOTS = ["stage.name=finetune", "stage.forget=true", "episode.shots=1"]
DENSE = ["loss.weights.bbox=0", "loss.weights.cls=0", "loss.weights.dfl=0"]


def built(config):
    return tasks.build_task(config, tasks.read_data(config), resume=True)[0]


def pieces(batch) -> dict[str, list]:
    """{field: what there is of each image}, of a batch of images or an episode."""
    out = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        if field.name in ("query", "images", "labels", "boxes", "masks", "image_ids"):
            out[field.name] = list(value)
        elif isinstance(value, Targets):
            for b in range(len(value.boxes)):
                for part in fields(value):
                    rows = getattr(value, part.name)[b]
                    known = part.name in ("base_known", "way_known")
                    out.setdefault(part.name, []).append(rows if known else rows[value.valid[b]])
    return out


@pytest.mark.parametrize("kind", ["base", "episodic", "finetune", "classifier", "maskrcnn"])
def test_the_parts_of_a_batch_are_the_batch(settings, sets, tmp_path, kind):
    if kind in ("classifier", "maskrcnn"):
        config = others.settings(kind, sets[kind], tmp_path / "r", "episode.queries=4")
    else:
        config = settings("episode.queries=4", *{"base": [], "episodic": EPISODES, "finetune": SHOTS}[kind])
    task = built(config)
    for index in (0, 5):
        task.join(ALONE)
        whole = pieces(task.batch(index))
        halves = []
        for rank in range(2):
            task.join(Peers(rank, 2))
            halves.append(task.batch(index))
        assert [len(half.image_ids) for half in halves] == [2, 2]
        first, second = map(pieces, halves)
        for name, values in whole.items():
            assert all(map(equal, values, first[name] + second[name])) and len(values) == 4, name
        if kind == "episodic":
            for name in ("support", "support_boxes", "support_way", "class_ids"):
                assert torch.equal(getattr(halves[0], name), getattr(halves[1], name))


def equal(a, b) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_a_batch_that_the_processes_cannot_share_is_refused(settings):
    with pytest.raises(ConfigError, match=r"episode\.queries: expected a multiple of 3 processes, got 4"):
        built(settings("episode.queries=4")).join(Peers(0, 3))


def gradients(task, batch, peers: Peers = ALONE) -> tuple[dict, dict]:
    """{parameter: gradient} and {loss: value} of one step over this process's part of `batch`."""
    task.objective.peers = peers
    places = peers.part(len(batch.image_ids), "queries")
    seen = {}
    optimizer = build_optimizer(task.param_groups(), task.config.optim)
    control = StepController(task, optimizer, device=torch.device("cpu"), peers=peers)
    report = control.run(
        [batch._rows(slice(places.start, places.stop))],
        lr_factor=1.0,
        clip_norm=0.0,
        watch=lambda named: seen.update({n: p.grad.clone() for n, p in named if p.grad is not None}),
    )
    assert report.committed, report.culprit
    return seen, {**report.raw, **{f"{n} cut": v for n, v in report.saturated.items()}}, float(task.objective.wiou_mean)


def without_boxes(batch, images: slice):
    """The batch with nothing in some of its images."""
    valid = batch.targets.valid.clone()
    valid[images] = False
    return replace(batch, targets=replace(batch.targets, valid=valid))


CASES = {
    "unequal": (slice(3, 4), []),
    "one has none": (slice(2, 4), []),
    "nobody has any": (slice(0, 4), []),
    "pairs alone": (slice(1, 2), DENSE),
    "clamped": (slice(0, 1), ["loss.dfl=clamped", "loss.supcon=clamped", "loss.cpe=clamped"]),
    "frozen": (slice(0, 0), []),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("stage", [[], EPISODES], ids=["base", "episodic"])
def test_the_gradient_of_two_processes_is_that_of_one_with_the_whole_batch(settings, stage, case, monkeypatch):
    gone, more = CASES[case]
    monkeypatch.setattr(objective, "assign", fitting)
    task = built(settings("episode.queries=4", "stage.freeze_norm=true", *ALL, *stage, *more))
    warm_up(task)
    if case == "frozen":
        for parameter in (*task.model.backbone.parameters(), *task.model.neck.parameters()):
            parameter.requires_grad_(False)
    batch = without_boxes(task.batch(1), gone)
    start = {name: value.clone() for name, value in task.model.state_dict().items()}
    found = together(lambda peers: gradients(task, batch, peers))
    task.model.load_state_dict(start)
    alone, losses, mean = gradients(task, batch)
    normaliser = float(task.losses(batch).normaliser)
    assert case in ("nobody has any", "pairs alone") or normaliser > 2
    assert case == "nobody has any" or all(losses[name] > 0 for name in ("supcon", "cpe", "triplet"))
    scale = max(float(g.abs().max()) for g in alone.values())
    for theirs, raw, theirs_mean in found:
        assert theirs.keys() == alone.keys()
        assert max(float((theirs[n] - g).abs().max()) for n, g in alone.items()) <= 1e-6 * scale
        assert raw == pytest.approx(losses, rel=1e-5, abs=1e-6) and theirs_mean == pytest.approx(mean, rel=1e-6)


def fitting(*args, **options):
    """Weights as of a detector whose boxes fit; at the start their sum is below 1, where the normaliser ends."""
    found = assign(*args, **options)
    return replace(found, weight=50 * found.weight)


def warm_up(task) -> None:
    """BatchNorm in eval, by statistics that fit the images."""
    with torch.no_grad():
        for index in range(3):
            task.losses(task.batch(index))
    task.model.eval()
    task.objective.train()
    task.objective.discard()


ROOT = Path(__file__).resolve().parents[2]


def torchrun(*words: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "fsdet"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *map(str, words)], env=environment, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT)  # fmt: skip


@pytest.fixture
def written(small_demo, tmp_path):
    """A configuration of stage 2 for torchrun."""
    content = {"data": {"path": str(small_demo), "image_size": 96, "support_size": 64, "workers": 1},
               "run": {"threads": 1, "device": "cpu"}, "model": {"embed_dim": 16},
               "stage": {"name": "episodic"}, "episode": {"ways": 3, "shots": 1, "queries": 4, "per_epoch": 4},
               "loss": {"weights": {"supcon": 0.1, "cpe": 0.1, "triplet": 0.1}, "bbox": "wiou_v3"},
               "optim": {"steps": 6, "warmup_epochs": 0}, "eval": {"every": 0}}  # fmt: skip
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.slow
def test_a_run_under_torchrun_that_is_stopped_goes_on_to_the_last_bit(written, tmp_path):
    def fit(peers, run, resume=False):
        config = configs.load(written, [f"run.dir={run}"])
        return tasks.build(config, resume=resume, peers=peers).fit().steps

    assert together(lambda peers: fit(peers, tmp_path / "a")) == [6, 6]
    process = torchrun("train", written, f"run.dir={tmp_path / 'b'}")
    timings, end = tmp_path / "b/timings.jsonl", time.monotonic() + 40
    while not (timings.exists() and timings.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on to all, and gives them 30 seconds
    begun = time.monotonic()
    said, _ = process.communicate(timeout=35)
    assert "stopped by signal 15 after step" in said and time.monotonic() - begun < 15
    assert said.count("Per-loss probe at step 1") == 1, "one of them tells"
    assert 0 < load(tmp_path / "b/last.pt")["step"] < 6
    assert together(lambda peers: fit(peers, tmp_path / "b", resume=True)) == [6, 6]
    first, second = load(tmp_path / "a/last.pt"), load(tmp_path / "b/last.pt")
    assert same({**first, "config": None}, {**second, "config": None}) and first["world"] == 2
    assert (tmp_path / "a/metrics.jsonl").read_bytes() == (tmp_path / "b/metrics.jsonl").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["finetune", "classifier", "maskrcnn"])
def test_every_task_trains_whole_under_torchrun(settings, best, sets, tmp_path, kind):
    """From reading data to the last evaluation: one of two processes writes, and what it writes is a finished run."""
    words = ["episode.queries=4", f"run.dir={tmp_path / 'run'}", "run.device=cpu", "optim.steps=2", "eval.every=1"]
    if kind == "finetune":
        config = settings(*SHOTS, "stage.recipe=given", f"stage.init_from={best}", *words)
    else:
        config = others.settings(kind, sets[kind], tmp_path / "run", *words)
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(config.model_dump(mode="json")))
    process = torchrun("train", path)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    state = load(tmp_path / "run/last.pt")
    assert (state["step"], state["world"]) == (2, 2) and (tmp_path / "run/best.pt").is_file()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any(key.startswith("val/") for row in rows for key in row) and said.count("Per-loss probe at step 1") == 1
