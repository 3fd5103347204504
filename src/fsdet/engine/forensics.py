# SPDX-License-Identifier: AGPL-3.0-or-later
"""Who is to blame for a rejected step. Runs only after a rejection, so it may cost what it costs: a few steps at most.

The window is run again in float32 with hooks on every module. What is finite there was a matter of precision ("amp").
Else the first module whose output is not finite is named: what reaches the losses is bad already ("data"). Else it is a
loss, or the gradient it sends back ("loss"), or the backward of a module whose own outputs are sound ("backward").
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fsdet.engine.optimizer import autocast
from fsdet.peers import ALONE, PeerOutOfMemory, Peers
from fsdet.types import LossReport, Task

Named = Sequence[tuple[str, nn.Parameter]]
SHOWN = 4  # images, 8 rows
CAUSES = {
    "amp": "finite in float32, so precision is the reason",
    "data": "not finite in float32 too: what reaches the losses is bad already",
    "loss": "not finite in float32 too: what reaches the losses is finite, so a loss or its gradient is the reason",
    "backward": "not finite in float32 too: the losses send finite gradients, which the network's backward breaks",
}


@dataclass(frozen=True)
class Rows:
    """Rows of a loss that are not finite, or the largest ones when only their sum is not, and whose images they are."""

    rows: tuple[int, ...] = ()
    images: tuple[str, ...] = ()
    finite: bool = False

    def __str__(self) -> str:
        if not self.rows:
            return ""
        images = f" of {', '.join(self.images[:SHOWN])}" if self.images else ""
        return f" ({'largest, each being finite: ' if self.finite else ''}rows {list(self.rows[: 2 * SHOWN])}{images})"


@dataclass(frozen=True)
class Suspect:
    """The parameter that a bad gradient is told by, with its statistics; finite: only the norm over all overflows."""

    name: str
    statistics: str
    finite: bool = False


@dataclass(frozen=True)
class Replay:
    """A window run again. All is None or empty when it is finite.

    losses: those that are not. module: the first whose output is not, images: those of that output that are not.
    parameter: the first, in backward order, whose gradient is not. gradient_at: the module at whose output the gradient
    stops being finite; gradient_of: the losses that send such a gradient to the head's inputs.
    buffer: the first running statistic that is not. failed: why it could not be run.
    """

    losses: Mapping[str, Rows] = field(default_factory=dict)
    module: str | None = None
    images: tuple[str, ...] = ()
    parameter: Suspect | None = None
    gradient_at: str | None = None
    gradient_of: tuple[str, ...] = ()
    buffer: str | None = None
    failed: str | None = None

    @property
    def finite(self) -> bool:
        """Whether a step of it could be committed; an output that no loss and no gradient sees harms nobody."""
        return not (self.losses or self.parameter or self.buffer or self.failed)

    @property
    def cause(self) -> str | None:
        """One of CAUSES, or None when the replay could not be run."""
        if self.failed:
            return None
        if self.finite:
            return "amp"
        if self.module or (self.buffer and not self.losses and not self.parameter):
            return "data"
        return "loss" if self.losses or self.gradient_of else "backward"


@dataclass(frozen=True)
class Finding:
    """culprit: one line. evidence: the same in plain values, for report.json."""

    culprit: str | None = None
    evidence: Mapping[str, Any] = field(default_factory=dict)


def bad_input(window: Sequence[Any]) -> Finding | None:
    """The images of the first batch that says it is not finite; batches without `.finite()` are not asked."""
    for batch in window:
        if hasattr(batch, "finite") and not batch.finite():
            reason = getattr(batch, "reason", "NaN or inf among the pixels or boxes")
            images = tuple(batch.unsound() if hasattr(batch, "unsound") else getattr(batch, "image_ids", ()))
            text = f"{reason} (batch {getattr(batch, 'index', '?')}: {', '.join(images)})"
            return Finding(text, {"images": list(images), "cause": "data"})
    return None


def bad_loss(losses: Mapping[str, Rows], buffer: str | None, replay: Replay, precision: str) -> Finding:
    """Of a step whose losses, or a running statistic named `buffer`, are not finite."""
    words = [f"{name}_loss{rows}" if name != TOTAL else name for name, rows in losses.items()]
    if not words:
        words = [f"losses are finite, the running statistics {buffer} are not"]
    text = ", ".join(words) + _module_words(replay)
    return Finding(text + _cause_words(replay, precision), _evidence(losses, None, buffer, replay, precision))


def bad_gradient(seen: Suspect, replay: Replay | None, precision: str) -> Finding:
    """Of a step whose losses are finite and whose gradients, or their norm, are not. replay: None when not run."""
    replay = replay or Replay(failed="one overflow says nothing")
    suspect = replay.parameter or seen
    text = f"{suspect.name} ({suspect.statistics})" + _module_words(replay)
    if replay.gradient_of:
        text += f"; sent by {', '.join(f'{n}_loss' for n in replay.gradient_of)}"
    if replay.gradient_at:
        text += f"; first at the output of {replay.gradient_at}"
    return Finding(text + _cause_words(replay, precision), _evidence({}, suspect.name, None, replay, precision))


def _module_words(replay: Replay) -> str:
    images = f", {', '.join(replay.images[:SHOWN])}" if replay.images else ""
    return f"; first in the output of {replay.module}{images}" if replay.module else ""


def _cause_words(replay: Replay, precision: str) -> str:
    cause = replay.cause
    if cause is None or (cause == "amp" and precision == "fp32"):
        return "" if cause is None else "; gone when run again"
    return f"; {CAUSES[cause]}" if precision != "fp32" else ""


def _evidence(losses: Mapping[str, Rows], parameter: str | None, buffer: str | None, replay: Replay,
              precision: str) -> dict[str, Any]:  # fmt: skip
    cause = replay.cause
    again = f"not run: {replay.failed}" if replay.failed else "finite" if replay.finite else "not finite"
    return {
        "losses": {n: {"rows": list(r.rows), "images": list(r.images)} for n, r in losses.items()},
        "parameter": parameter,
        "module": replay.module,
        "module_images": list(replay.images),
        "running_statistics": buffer,
        "gradient_of": list(replay.gradient_of),
        "gradient_at": replay.gradient_at,
        "in_float32": again,
        "cause": None if cause == "amp" and precision == "fp32" else cause,
    }


def names_images(finding: Finding) -> bool:
    """Whether a finding says whose fault it is."""
    evidence = finding.evidence
    return bool(evidence.get("images") or evidence.get("module_images") or evidence.get("module"))


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


TOTAL = "total loss (its parts are finite)"


def losses_not_finite(reports: Sequence[LossReport]) -> dict[str, Rows]:
    """The losses of the first micro-batch that has such, each with its rows."""
    for report in reports:
        both = {**report.weighted, **report.raw}
        names = [n for n in both if not all(_finite(d[n]) for d in (report.weighted, report.raw) if n in d)]
        if names:
            return {n: _rows(report, n) for n in names}
        if not (_finite(report.total) and _finite(report.normaliser)):
            return {TOTAL if not _finite(report.total) else "normaliser of a micro-batch": Rows()}
    return {}


def _finite(value: Any) -> bool:
    return bool(torch.as_tensor(value).isfinite().all())


def _rows(report: LossReport, name: str) -> Rows:
    values, images = report.row_values.get(name), report.row_images.get(name)
    if values is None or not len(values):
        return Rows()
    bad = (~values.isfinite()).nonzero().flatten()
    only_sum = not len(bad)
    if only_sum:
        bad = values.abs().argmax().reshape(1)
    if images is None:
        return Rows(tuple(bad.tolist()), (), only_sum)
    ids = sorted({int(i) for i in images[bad].flatten().tolist() if i >= 0})  # -1: of another process
    known = (report.image_ids[i] if i < len(report.image_ids) else str(i) for i in ids)
    return Rows(tuple(bad.tolist()), tuple(known), only_sum)


def suspect_of(named: Named) -> Suspect:
    """The parameter nearest to the losses whose gradient is not finite, or else the one of the largest.

    Backward runs from the end of `named` to its start, so what broke first is the last of them.
    """
    present = [(n, p.grad) for n, p in named if p.grad is not None]
    return _worst(present[::-1])


def _worst(grads: Sequence[tuple[str, Tensor]]) -> Suspect:
    """The first gradient that is not finite, or the largest, which overflows the norm."""
    wrong = [(name, grad) for name, grad in grads if not grad.isfinite().all()]
    if wrong:
        name, grad = wrong[0]
        return Suspect(name, f"{grad_stats(grad)}; {len(wrong)} of {len(grads)} gradients are not finite")
    name, grad = max(grads, key=lambda pair: float(pair[1].abs().max()) if pair[1].numel() else 0.0)
    return Suspect(name, f"each gradient is finite, their L2 norm overflows; {grad_stats(grad)}", finite=True)


def grad_stats(grad: Tensor) -> str:
    """`Grad stats: min=, max=, mean=` over the finite elements, and how many are not."""
    finite = grad[grad.isfinite()].float()
    wrong = grad.numel() - finite.numel()
    shown = (finite.min(), finite.max(), finite.mean()) if finite.numel() else (torch.tensor(torch.nan),) * 3
    low, high, mean = (float(v) for v in shown)
    return f"Grad stats: min={low:.3e}, max={high:.3e}, mean={mean:.3e}, {wrong} of {grad.numel()} not finite"


def replay(task: Task, window: Sequence[Any], device: torch.device, named: Named, precision: str = "fp32",
           peers: Peers = ALONE) -> Replay:  # fmt: skip
    """Run the window again with hooks, in float32 unless told otherwise, without touching `.grad`.

    The caller brings buffers and generators to where they were, and restores them afterwards (`Memory.again`).
    A window that does not fit into memory in this precision is a Replay that failed, not an error. Of several `peers`
    all stop after the first batch that is not finite in one of them.
    """
    try:
        for batch in window:
            found = _replay_batch(task, batch.to(device), device, named, precision)
            if peers.most(not found.finite):
                return found
    except torch.OutOfMemoryError as error:
        if not isinstance(error, PeerOutOfMemory):
            peers.confess()
        return Replay(failed=f"it does not fit into memory in {precision}")
    return Replay()


def _replay_batch(task: Task, batch: Any, device: torch.device, named: Named, precision: str) -> Replay:
    with _listening(task.model, tuple(getattr(batch, "image_ids", ()))) as heard, autocast(device, precision):
        report = task.losses(batch)
    losses = losses_not_finite([report])
    module, images = heard.outputs[0] if heard.outputs else (None, ())
    if losses or not report.total.requires_grad:
        return Replay(losses, module, images)
    leaves = [(n, p) for n, p in named if p.requires_grad]
    order: list[str] = []
    hooks = [p.register_hook(lambda g, n=n: None if g.isfinite().all() else order.append(n)) for n, p in leaves]
    try:
        grads = torch.autograd.grad(report.total, [p for _, p in leaves], allow_unused=True, retain_graph=True)
    finally:
        for hook in hooks:
            hook.remove()
    present = {n: g for (n, _), g in zip(leaves, grads, strict=True) if g is not None}
    if not present or math.isfinite(float(torch.nn.utils.get_total_norm(list(present.values())))):
        return Replay({}, module, images)
    first = [n for n in dict.fromkeys(order) if not present[n].isfinite().all()]
    rest = [n for n in reversed(present) if n not in first]
    suspect = _worst([(n, present[n]) for n in (*first, *rest)])
    at = heard.gradients[0] if heard.gradients else None
    return Replay({}, module, images, suspect, at, _senders(report))


def _senders(report: LossReport) -> tuple[str, ...]:
    """The losses whose gradient at the head's inputs is not finite, or overflows its norm."""
    at = [t for t in report.probe_at if t.requires_grad]
    out = []
    for name, loss in report.weighted.items() if at else ():
        if isinstance(loss, Tensor) and loss.requires_grad:
            grads = torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True)
            present = [g for g in grads if g is not None]
            if present and not torch.nn.utils.get_total_norm(present).isfinite():
                out.append(name)
    return tuple(out)


@dataclass
class Heard:
    """What hooks heard: (module, images) whose output is not finite; modules at whose output the gradient is not."""

    outputs: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)


@contextmanager
def _listening(model: nn.Module, image_ids: tuple[str, ...]) -> Iterator[Heard]:
    """Hooks on all modules of `model`, for one forward; those on gradients live as long as the graph."""
    heard, calls = Heard(), Counter()

    def listen(name: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, inputs: Any, output: Any) -> None:
            calls[name] += 1
            title = f"{name} ({type(module).__name__})" + (f", call {calls[name]}" if calls[name] > 1 else "")
            for tensor in _tensors(output):
                if not heard.outputs and not tensor.isfinite().all():
                    heard.outputs.append((title, _images(tensor, image_ids) if calls[name] == 1 else ()))
                if tensor.grad_fn is not None:
                    tensor.register_hook(
                        lambda g, title=title: None if g.isfinite().all() else heard.gradients.append(title)
                    )

        return module.register_forward_hook(hook)

    handles = [listen(name or "the model", module) for name, module in model.named_modules()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _images(output: Tensor, image_ids: tuple[str, ...]) -> tuple[str, ...]:
    """The images of a batch-first output whose part is not finite; none when it has no part an image."""
    if output.ndim < 2 or len(output) != len(image_ids):
        return ()
    bad = ~output.detach().flatten(1).isfinite().all(1)
    return tuple(name for name, wrong in zip(image_ids, bad.tolist(), strict=True) if wrong)


def _tensors(value: Any) -> list[Tensor]:
    """The floating tensors in a module's output, however it is built."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, f.name) for f in fields(value)]
    elif isinstance(value, Mapping):
        value = list(value.values())
    return [t for v in value for t in _tensors(v)] if isinstance(value, (list, tuple)) else []


def gradient_norms(named: Named, count: int = 5) -> tuple[float, list[tuple[str, float]]]:
    """Total L2 norm and the `count` largest parameters' [(name, L2)]; for the debug log only."""
    norms = [(n, float(p.grad.norm())) for n, p in named if p.grad is not None]
    return math.hypot(*(value for _, value in norms)), sorted(norms, key=lambda pair: -pair[1])[:count]
