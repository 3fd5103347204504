# SPDX-License-Identifier: AGPL-3.0-or-later
"""Who is to blame for a rejected step. Runs only after a rejection, so it may cost what it costs."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fsdet.types import LossReport, Task

Named = Sequence[tuple[str, nn.Parameter]]


def bad_input(window: Sequence[Any]) -> str | None:
    """The images of the first batch that says it is not finite; batches without `.finite()` are not asked."""
    for batch in window:
        if hasattr(batch, "finite") and not batch.finite():
            reason = getattr(batch, "reason", "NaN or inf among the pixels")
            return f"{reason} (batch {getattr(batch, 'index', '?')}: {', '.join(getattr(batch, 'image_ids', ()))})"
    return None


def without_graph(report: LossReport) -> LossReport:
    """The same numbers, detached, so that no graph outlives its backward."""

    def cut(values: Any) -> dict:
        return {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()}

    return replace(
        report,
        total=report.total.detach(),
        raw=cut(report.raw),
        weighted=cut(report.weighted),
        normaliser=torch.as_tensor(report.normaliser).detach(),
        probe_at=(),
    )


def bad_loss(reports: Sequence[LossReport]) -> str:
    """Name the non-finite losses, and the images of their non-finite rows where the report tells rows."""
    for report in reports:
        names = [n for n, v in {**report.weighted, **report.raw}.items() if not torch.as_tensor(v).isfinite().all()]
        if names or not torch.as_tensor(report.total).isfinite():
            parts = [f"{n}_loss{_rows(report, n)}" for n in names]
            return ", ".join(parts) or "total loss (its parts are finite)"
    return "normaliser of a micro-batch"


def _rows(report: LossReport, name: str) -> str:
    values = report.row_values.get(name)
    if values is None:
        return ""
    bad = (~values.isfinite()).nonzero().flatten()
    images = report.row_images.get(name)
    if images is None or not len(bad):
        return f" (rows {bad.tolist()[:8]})" if len(bad) else ""
    ids = sorted({int(i) for i in images[bad].tolist()})
    known = [report.image_ids[i] if i < len(report.image_ids) else str(i) for i in ids]
    return f" (rows {bad.tolist()[:8]} of {', '.join(known[:4])})"


def bad_gradient(named: Named) -> str:
    """The first parameter whose gradient is not finite, with its statistics; or the one that overflows the norm."""
    present = [(n, p.grad) for n, p in named if p.grad is not None]
    for name, grad in present:
        if not grad.isfinite().all():
            return f"{name} ({grad_stats(grad)})"
    name, grad = max(present, key=lambda pair: float(pair[1].abs().max()))
    return f"{name} (each gradient is finite, their L2 norm overflows; {grad_stats(grad)})"


def grad_stats(grad: Tensor) -> str:
    """`Grad stats: min=, max=, mean=` over the finite elements, and how many are not."""
    finite = grad[grad.isfinite()].float()
    wrong = grad.numel() - finite.numel()
    shown = (finite.min(), finite.max(), finite.mean()) if finite.numel() else (torch.tensor(torch.nan),) * 3
    low, high, mean = (float(v) for v in shown)
    return f"Grad stats: min={low:.3e}, max={high:.3e}, mean={mean:.3e}, {wrong} of {grad.numel()} not finite"


def replay(task: Task, window: Sequence[Any], device: torch.device, named: Named) -> str | None:
    """Run the window again in float32 without touching gradients or RNG; the culprit there, or None when it is finite.

    The caller restores running statistics afterwards.
    """
    leaves = [(n, p) for n, p in named if p.requires_grad]
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for batch in window:
            with torch.autocast(device.type, enabled=False):
                report = task.losses(batch.to(device))
            if not torch.as_tensor(report.total).isfinite():
                return bad_loss([report])
            grads = torch.autograd.grad(report.total, [p for _, p in leaves], allow_unused=True)
            for (name, _), grad in zip(leaves, grads, strict=True):
                if grad is not None and not grad.isfinite().all():
                    return f"{name} ({grad_stats(grad)})"
    return None


def first_bad_module(task: Task, window: Sequence[Any], device: torch.device) -> str | None:
    """The module whose output is not finite first when the window is run forward again in float32, or None.

    The caller restores running statistics afterwards.
    """
    found: list[str] = []

    def listen(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            if not found and any(not t.isfinite().all() for t in _tensors(output)):
                found.append(f"{name} ({type(module).__name__})")

        return module.register_forward_hook(hook)

    handles = [listen(name, module) for name, module in task.model.named_modules() if name]
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            for batch in window:
                task.losses(batch.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def gradient_norms(named: Named, count: int = 5) -> tuple[float, list[tuple[str, float]]]:
    """Total L2 norm and the `count` largest parameters' [(name, L2)]; for the debug log only."""
    norms = [(n, float(p.grad.norm())) for n, p in named if p.grad is not None]
    return math.hypot(*(value for _, value in norms)), sorted(norms, key=lambda pair: -pair[1])[:count]
