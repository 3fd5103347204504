# SPDX-License-Identifier: AGPL-3.0-or-later
"""The detector on a CUDA device: losses as on the CPU, memory of a large step, out of memory, and a whole training."""

import json
import warnings
from dataclasses import fields, replace

import pytest
import torch

import test_objective as cpu
from fsdet import tasks
from fsdet.config import Guard, Optim
from fsdet.engine import portions
from fsdet.engine.ema import Ema
from fsdet.engine.optimizer import build_optimizer
from fsdet.engine.position import Position
from fsdet.engine.step import StepController
from fsdet.models.build import build_model, model_spec
from fsdet.objective import MultiLoss
from fsdet.tasks.loading import load_trained
from fsdet.types import Episode, Targets
from gpu.test_step import watch
from tasks.conftest import small

pytestmark = pytest.mark.gpu
WEIGHTS = {"bbox": 7.5, "cls": 0.5, "dfl": 1.5, "supcon": 0.5, "cpe": 0.3, "triplet": 0.3}
GIB, LIMIT = 2**30, 3.6
LEAVES = ("box_logits", "embeddings", "standard", "prototype")


def to_cuda(output):
    """The output with its leaves, boxes and points on the device; gradients reach the CPU's leaves."""
    return replace(output, **{f.name: getattr(output, f.name).cuda() for f in fields(output)})


def large(targets):
    """Boxes that ten anchors overlap: what a box takes for lack of better is a matter of order, and of the device."""
    low, high = targets.boxes.split(2, -1)
    return replace(targets, boxes=torch.cat((0.5 * low, 0.5 * low + 90 + 0.5 * (high - low)), -1))


@pytest.mark.parametrize("bbox", ["ciou", "wiou_v1", "wiou_v2", "wiou_v3"])
@pytest.mark.parametrize("boxes", [5, 1])
def test_every_loss_and_its_gradient_is_the_cpus(bbox, boxes):
    found = []
    for move in (lambda x: x, to_cuda):
        output, targets = cpu.make_output(), large(cpu.make_targets(boxes=boxes))
        moved = move(output)
        device = moved.boxes.device
        loss = MultiLoss(WEIGHTS, bbox=bbox).to(device)
        report = loss(moved, targets.to(device), cpu.ids().to(device))
        report.total.backward()
        found.append(([float(v.detach()) for v in report.raw.values()], report.rows,
                      [getattr(output, name).grad for name in LEAVES]))  # fmt: skip
    (a, rows_a, grad_a), (b, rows_b, grad_b) = found
    assert rows_a == rows_b
    assert dict(zip(WEIGHTS, b, strict=True)) == pytest.approx(dict(zip(WEIGHTS, a, strict=True)), rel=1e-5)
    for one, other in zip(grad_a, grad_b, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def episode(batch: int, size: int, ways: int, shots: int, classes: int, support: int) -> Episode:
    g = torch.Generator().manual_seed(0)
    corner = torch.rand(batch, 8, 2, generator=g) * 0.6 * size
    boxes = torch.cat((corner, corner + (0.1 + 0.25 * torch.rand(batch, 8, 2, generator=g)) * size), -1)
    labels = torch.randint(classes, (batch, 8), generator=g)
    ways_of = torch.where(labels < ways, labels, -1)
    known = torch.ones(batch, classes, dtype=torch.bool)
    targets = Targets(boxes, labels, ways_of, torch.ones_like(labels, dtype=torch.bool), known, known[:, :ways])
    n = ways * shots
    at = torch.tensor([0.2, 0.2, 0.8, 0.8]) * support
    return Episode(0, torch.rand(batch, 3, size, size, generator=g), targets,
                   torch.rand(n, 3, support, support, generator=g), at.repeat(n, 1),
                   torch.arange(ways).repeat_interleave(shots), torch.arange(ways),
                   tuple(f"image {i}" for i in range(batch)))  # fmt: skip


class Detector:
    """A task of one episode: stage 2 of yolov8n with all six losses."""

    name = "detector"

    def __init__(self, classes: int = 60) -> None:
        torch.manual_seed(0)
        self.model = build_model(model_spec("yolov8n", "P3-P5", classes, 128, 16, "anchors", True, classes))
        self.model = self.model.cuda().to(memory_format=torch.channels_last).train()
        self.objective = MultiLoss(WEIGHTS, bbox="wiou_v3").cuda()

    def param_groups(self):
        return self.model.groups()

    def losses(self, batch):
        output, dense = self.model(batch)
        return self.objective(output, batch.targets, batch.class_ids, contrast=self.model.contrast,
                              probe_at=dense.features, image_ids=batch.image_ids)  # fmt: skip

    def controller(self, precision: str) -> StepController:
        optimizer = build_optimizer(self.param_groups(), Optim(lr=1e-3))
        return StepController(self, optimizer, device=torch.device("cuda"), precision=precision, guard=Guard(),
                              ema=Ema(self.model, 0.9999, 2000))  # fmt: skip


@pytest.fixture
def card():
    """Nothing of other tests in the device's memory, and all of it allowed again afterwards."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_stage_2_step_at_640_px_with_all_losses_stays_inside_its_memory(card, precision, capsys):
    """Eight queries at 640 px, 5 ways x 5 shots of 224 px, six losses, EMA, optimizer: twice, as the second step holds
    the optimizer's state as well."""
    before = torch.cuda.memory_allocated()
    task = Detector()
    c, batch = task.controller(precision), episode(8, 640, 5, 5, 60, 224)
    outcomes = [c.run([batch], lr_factor=1.0, clip_norm=10.0).outcome for _ in range(3)]
    peak = (torch.cuda.max_memory_allocated() - before) / GIB
    with capsys.disabled():
        print(f"\n640 px, batch 8, {precision}: peak {peak:.2f} GiB on {torch.cuda.get_device_name()}")
    assert outcomes[-1] == "committed" and set(outcomes) <= {"committed", "amp_backoff"}
    assert peak < LIMIT


def test_a_batch_that_does_not_fit_is_run_in_parts(card):
    """The device's memory is cut to what half of the batch takes; the step is taken all the same."""
    task = Detector()
    c, batch = task.controller("fp32"), episode(8, 320, 2, 1, 60, 96)
    half = batch.halves()[0]
    c.run([half], lr_factor=1.0, clip_norm=10.0)
    need = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.1 * need / card)
    position = Position()
    report = portions.run(c, [batch], position, {"lr_factor": 1.0, "clip_norm": 10.0})
    assert report.committed and position.parts > 1 and c.step == 2


def test_what_the_selection_of_rows_waits_for_is_known(capsys):
    """Losses choose rows by value, and shapes that depend on values wait for the device; nothing else of a step does.
    The number is printed, and an unnoticed new one fails."""
    task = Detector()
    c, batch = task.controller("bf16"), episode(4, 320, 5, 2, 60, 96).pin_memory()
    c.run([batch], lr_factor=1.0, clip_norm=10.0)
    watch("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert c.run([batch], lr_factor=1.0, clip_norm=10.0).committed
    finally:
        watch("default")
    waits = [w for w in seen if "synchroniz" in str(w.message)]
    with capsys.disabled():
        print(f"\n{len(waits)} waits in a step of six losses")
        for w in waits:
            print("  ", w.filename.rsplit("/fsdet/", 1)[-1], w.lineno)
    assert len(waits) <= 32


def test_a_training_on_the_device_ends_and_its_checkpoint_says_the_same_on_the_cpu(small_demo, tmp_path):
    keys = ["run.device=cuda", "log.every=1", "run.precision=bf16", "data.workers=2", "optim.steps=4",
            "loss.weights.supcon=0.1", "loss.weights.cpe=0.1", "loss.weights.triplet=0.1"]  # fmt: skip
    task = tasks.build(small(small_demo, tmp_path / "run", *keys))
    result = task.fit()
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["outcome"] for row in rows if "outcome" in row] == 4 * ["committed"]
    image = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    boxes = []
    for device in ("cpu", "cuda"):
        model = load_trained(result.best, device).model
        with torch.no_grad():
            dense = model.dense(image.to(device))
        boxes.append((dense.boxes.cpu(), dense.standard.cpu(), dense.embeddings.cpu()))
    for one, other in zip(*boxes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=5e-3)
