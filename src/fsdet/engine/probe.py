# SPDX-License-Identifier: AGPL-3.0-or-later
"""Per-loss gradient probe: what each loss asks of the head's inputs, without touching the step.

It differentiates unscaled losses with respect to `LossReport.probe_at` and keeps the graph for the backward that
follows. No `.grad`, generator state, running statistics or scaler is touched.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fsdet.engine.guard import Flag
from fsdet.peers import ALONE, Peers
from fsdet.types import LossReport

OK, NO_GRADIENT, OFF = "ok", "no gradient", "off: weight or rows are 0"
QUIET = (OK, OFF)
FAR = 2.0  # a first value beyond this factor of its expectation gets a verdict
MOST, LEAST = 0.9, 0.01  # shares of the summed gradient norms: above, one loss rules; below, one is drowned
AGAINST = -0.05  # cosine below which gradients pull apart; random directions are within .01 of a right angle


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


def measure(report: LossReport, peers: Peers = ALONE) -> list[ProbeRow]:
    """Probe a live report, before its backward; rows are empty when it names nothing to differentiate to.

    peers: the processes that hold the rest of the batch; its losses and gradients are all of theirs.
    """
    at = [t for t in report.probe_at if t.requires_grad]
    live = bool(at) and report.total.requires_grad
    if not live and peers.alone:
        return []
    counts = [float(report.rows.get(name, math.nan)) for name in report.weighted]
    grads = {name: _gradient(loss, at) for name, loss in report.weighted.items() if live and loss.requires_grad}
    nothing = torch.zeros((), device=report.total.device).expand(sum(t.numel() for t in at))
    total = sum(grads.values(), nothing)  # the total is their sum, and so is its gradient: one backward less
    parts = [(loss, report.raw.get(name, loss), grads.get(name, nothing)) for name, loss in report.weighted.items()]
    if peers.alone:
        table = torch.stack([_facts(*part, total) for part in parts]).tolist()  # one host sync
    else:
        table, counts = _of_all(parts, total, counts, peers)
    out = []
    for name, (raw, weighted, norm, cosine), rows in zip(report.weighted, table, counts, strict=True):
        finite = all(math.isfinite(v) for v in (raw, weighted, norm))
        out.append(ProbeRow(name, raw, weighted, norm, cosine, finite, rows))
    return out


def _of_all(
    parts: list[tuple[Tensor, Tensor, Tensor]], total: Tensor, counts: list[float], peers: Peers
) -> tuple[list[list[float]], list[float]]:
    """The same over the images of all processes, whose gradients stand one behind the other."""
    sums = [[raw, loss, grad @ grad, grad @ total, total @ total] for loss, raw, grad in parts]
    own = torch.stack([torch.stack([v.detach().float() for v in row]) for row in sums])
    own = torch.cat((own, own.new_tensor(counts)[:, None]), 1)
    table = []
    for raw, loss, square, product, whole, _ in (rows := peers.total(own).tolist()):
        norm = math.sqrt(square) if square >= 0 else math.nan
        table.append([raw, loss, norm, product / max(norm * math.sqrt(max(whole, 0.0)), 1e-38)])
    return table, [row[-1] for row in rows]


def conflicts(report: LossReport) -> dict[tuple[str, str], float]:
    """{(loss, loss): cosine of their gradients} below AGAINST, lowest first; costs as much as `measure` again."""
    at = [t for t in report.probe_at if t.requires_grad]
    alive = {n: loss for n, loss in report.weighted.items() if at and loss.requires_grad}
    grads = {name: _gradient(loss, at) for name, loss in alive.items()}
    units = {n: g / g.norm() for n, g in grads.items() if g.isfinite().all() and float(g.norm()) > 0}
    found = {(a, b): float(units[a] @ units[b]) for a, b in itertools.combinations(units, 2)}
    return {pair: cosine for pair, cosine in sorted(found.items(), key=lambda item: item[1]) if cosine < AGAINST}


def _gradient(loss: Tensor, at: list[Tensor]) -> Tensor:
    """Gradient of `loss` with respect to `at`, flat, float32."""
    grads = torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)
    parts = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, at, strict=True)]
    return torch.cat([p.flatten().float() for p in parts])


def _facts(loss: Tensor, raw: Tensor, grad: Tensor, total: Tensor) -> Tensor:
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


def words(rows: list[ProbeRow], apart: Mapping[tuple[str, str], float] | None = None) -> list[str]:
    """What a table means and what to do, a sentence a line. `apart`: of `conflicts`, where it was asked."""
    if not rows:
        return ["no loss has a gradient here: check stage.freeze and the weights of the losses"]
    out = [*_unsound(rows), *_shares([r for r in rows if r.finite])]
    out += [f"{r.name}_loss pulls against the sum of all (cosine {r.cosine:.2f}): lowering the total raises it"
            for r in rows if r.finite and r.norm and r.cosine < AGAINST]  # fmt: skip
    out += [f"{a}_loss and {b}_loss pull apart (cosine {cosine:.2f}): what helps one harms the other; weigh them "
            "against each other on purpose" for (a, b), cosine in (apart or {}).items()]  # fmt: skip
    return out or [
        f"all {len(rows)} losses are finite and have a gradient; none rules, none is drowned, none conflicts"
    ]


def _unsound(rows: list[ProbeRow]) -> list[str]:
    """Losses that are not finite, and those that move nothing."""
    bad = [r.name for r in rows if not r.finite]
    lines = [f"not finite: {', '.join(bad)}. The step is rejected; see incidents/, or fsdet data check"] if bad else []
    for r in rows:
        if r.finite and r.norm == 0.0 and r.rows == 0:
            lines.append(f"{r.name}_loss is silent: no row of this batch enters it")
        elif r.finite and r.norm == 0.0 and r.weighted == 0.0:
            lines.append(
                f"{r.name}_loss is silent: it is exactly 0 here, which is right only when nothing is left to do"
            )
        elif r.finite and r.norm == 0.0:
            lines.append(f"{r.name}_loss is silent: it has a value and no gradient, so something cuts or saturates it")
    return lines


def _shares(rows: list[ProbeRow]) -> list[str]:
    """Which loss rules the gradient, and which are drowned in it."""
    total = sum(r.norm for r in rows)
    pulling = [r for r in rows if r.norm]
    if not math.isfinite(total) or len(pulling) < 2:
        return []
    first = max(pulling, key=lambda r: r.norm)
    lines = []
    if first.norm > MOST * total:
        lines.append(f"{first.name}_loss rules: {first.norm / total:.0%} of the summed gradient norms; lower "
                     f"the weight of {first.name} or raise the others")  # fmt: skip
    drowned = [r.name for r in pulling if r.norm < LEAST * total]
    if drowned:
        lines.append(f"drowned, below {LEAST:.0%} of the summed gradient norms: {', '.join(drowned)}; raise their "
                     "weights or set them to 0 and save the time")  # fmt: skip
    return lines


def tell(
    rows: list[ProbeRow], expected: Mapping[str, float], apart: Mapping[tuple[str, str], float] | None = None
) -> str:
    """The table, and below it what it means."""
    return "\n".join([table(rows, expected), *words(rows, apart)])
