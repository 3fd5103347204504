# SPDX-License-Identifier: AGPL-3.0-or-later
"""Looking before training: `fsdet probe`, `fsdet check`."""

import resource
import time

import torch

from fsdet.config import Config
from fsdet.data.check import check as check_data
from fsdet.engine import probe as gradient_probe
from fsdet.engine.freezing import Freezer
from fsdet.engine.optimizer import choose_device
from fsdet.errors import counted
from fsdet.tasks import build_task, kind_of, read_data


def probe(config: Config) -> str:
    """The first batch's losses beside their expected values, each one's gradient at the head, and what that means.

    What trains is what would train in the first epoch. Nothing is written and no weight moves.
    """
    task, _ = build_task(config, read_data(config), resume=False)
    Freezer(task, config.stage.freeze, config.stage.freeze_norm).apply(1)
    task.objective.train()
    batch = task.batch(0)
    if not batch.finite():
        return f"NaN or inf among the pixels or boxes: {', '.join(batch.unsound())}"
    report = task.losses(batch)
    expected = task.expected_initial(report) if not config.stage.init_from else {}
    return gradient_probe.tell(gradient_probe.measure(report), expected, gradient_probe.conflicts(report))


def check(config: Config) -> str:
    """Config, data, one dry step, memory: what would go wrong in the first minute, without training."""
    choose_device(config.run.device)
    data = read_data(config)
    lines = [str(check_data(data, deep=False))]  # which tells what the reader mended, too
    task, report = build_task(config, data, resume=False)
    lines.append(report or "")
    began = time.perf_counter()
    Freezer(task, config.stage.freeze, config.stage.freeze_norm).apply(1)
    losses = task.losses(task.batch(0))
    if losses.total.requires_grad:
        losses.total.backward()
    seconds = time.perf_counter() - began
    norm = torch.nn.utils.get_total_norm([p.grad for p in task.model.parameters() if p.grad is not None])
    values = ", ".join(f"{k} {float(torch.as_tensor(v).detach()):.4g}" for k, v in losses.raw.items())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    lines.append(
        f"one dry step: {values}; gradient norm {float(norm):.4g}; {seconds:.2f} s; peak memory {peak:.1f} GiB"
    )
    lines.append(f"{counted(task.batches_per_epoch, 'step')} an epoch")
    lines.append(kind_of(config.task, "task").advice(data))
    return "\n".join(line for line in lines if line)
