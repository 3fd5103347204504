# SPDX-License-Identifier: AGPL-3.0-or-later
"""Per-loss gradient probe: what each loss asks of the head's inputs, without touching the step.

It differentiates unscaled losses with respect to `LossReport.probe_at` and keeps the graph for the backward that
follows. No `.grad`, generator state, running statistics or scaler is touched.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fsdet.engine.guard import Flag
from fsdet.types import LossReport

OK, NO_GRADIENT, OFF = "ok", "no gradient", "off: weight or rows are 0"
QUIET = (OK, OFF)
FAR = 2.0  # a first value beyond this factor of its expectation gets a verdict


@dataclass(frozen=True)
class ProbeRow:
    """One loss: raw and weighted value, L2 norm of the weighted loss's gradient, its cosine with the total's."""

    name: str
    raw: float
    weighted: float
    norm: float
    cosine: float
    finite: bool
    rows: float


def measure(report: LossReport) -> list[ProbeRow]:
    """Probe a live report, before its backward; rows are empty when it names nothing to differentiate to."""
    at = [t for t in report.probe_at if t.requires_grad]
    if not at or not report.total.requires_grad:
        return []
    total = _gradient(report.total, at)
    facts = [_facts(loss, report.raw.get(name, loss), at, total) for name, loss in report.weighted.items()]
    table = torch.stack(facts).tolist()  # one host sync
    out = []
    for (name, _), (raw, weighted, norm, cosine) in zip(report.weighted.items(), table, strict=True):
        finite = all(math.isfinite(v) for v in (raw, weighted, norm))
        out.append(ProbeRow(name, raw, weighted, norm, cosine, finite, float(report.rows.get(name, math.nan))))
    return out


def _gradient(loss: Tensor, at: list[Tensor]) -> Tensor:
    """Gradient of `loss` with respect to `at`, flat, float64 on the CPU's side of exactness."""
    grads = torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, at, strict=True)]
    return torch.cat([p.flatten().float() for p in parts])


def _facts(loss: Tensor, raw: Tensor, at: list[Tensor], total: Tensor) -> Tensor:
    grad = _gradient(loss, at) if loss.requires_grad else torch.zeros_like(total)
    norm, whole = torch.linalg.vector_norm(grad), torch.linalg.vector_norm(total)
    cosine = (grad @ total) / (norm * whole).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.stack([torch.as_tensor(v, device=grad.device).detach().float() for v in (raw, loss, norm, cosine)])


def verdict(row: ProbeRow, expected: float | None, far: float = FAR) -> str:
    """A row in words."""
    if not row.finite:
        return "NOT FINITE"
    if row.norm == 0.0:
        return NO_GRADIENT if row.weighted else OFF
    if expected and not expected / far <= row.raw <= expected * far:
        side = "above" if row.raw > expected else "below"
        return f"{side} its expected {expected:.3g}: " + (
            "weights are not at their initialisation, or a slip"
            if side == "below"
            else "check initialisation and targets"
        )
    return OK


def flags(rows: list[ProbeRow], expected: Mapping[str, float], far: float = FAR) -> list[Flag]:
    """Red flags of a first batch: losses that are not finite or far from their expected value."""
    words = [(row.name, verdict(row, expected.get(row.name), far)) for row in rows]
    return [Flag(f"first_{n}", f"{n}_loss at the first batch: {text}") for n, text in words if text not in QUIET]


def table(rows: list[ProbeRow], expected: Mapping[str, float]) -> str:
    """The first-batch table: one line a loss, raw value beside its expected initial one."""
    head = f"{'loss':<10}{'raw':>10}{'expected':>10}{'weighted':>10}{'grad norm':>11}{'cosine':>8}  verdict"
    lines = [head]
    for r in rows:
        want = expected.get(r.name)
        shown = f"{want:>10.3f}" if want is not None else f"{'-':>10}"
        lines.append(
            f"{r.name:<10}{r.raw:>10.4f}{shown}{r.weighted:>10.4f}{r.norm:>11.4g}{r.cosine:>8.3f}  {verdict(r, want)}"
        )
    return "\n".join(lines)
