# SPDX-License-Identifier: AGPL-3.0-or-later
"""What is done about rejected steps, and the red flags of accepted ones."""

import dataclasses
import json
import logging
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fsdet.config import Guard
from fsdet.errors import counted
from fsdet.types import OUTCOMES, StepReport

log = logging.getLogger("fsdet")
INCIDENTS = 20  # folders written in one run at most
REPEAT = 100  # steps before the same flag is raised again
MEAN_DECAY = 0.98  # of the running mean behind loss_jump
MEAN_STEPS = 20  # steps before that mean is trusted
REJECTED = ("bad_input", "bad_loss", "bad_grad", "no_grad")
ADVICE = {
    "bad_input": "look at the named images: `fsdet data check` reads every file and label",
    "bad_loss": "replay its batch, kept in incidents/, with `fsdet probe --incident`; in epoch 1 lower optim.lr or "
    "lengthen warm-up, later look at the named images",
    "bad_grad": "lower optim.lr or optim.clip_norm, or train with run.precision=fp32 to tell AMP from data",
    "no_grad": "nothing that trains received a gradient: check stage.freeze and that a loss weight is above 0",
}
LOW_SCALE = "activations overflow fp16: use run.precision=bf16 or fp32"


@dataclass(frozen=True)
class Flag:
    """One red flag: a short stable name and a sentence."""

    name: str
    message: str


class StepGuard:
    """Counts outcomes, raises flags, and says when a run has to end.

    limits: thresholds. folder: the run folder, where incidents are written. Its state is part of a checkpoint.
    """

    def __init__(self, limits: Guard, folder: Path) -> None:
        self.limits, self.folder = limits, folder
        self.totals: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))
        self.in_row = self.low_scale = self.incidents = self.seen = 0
        self.recent: deque[str] = deque(maxlen=limits.window)
        self.clipped: deque[bool] = deque(maxlen=limits.window)
        self.mean, self.weight = 0.0, 0.0  # running mean of the total loss, and how far it is from its start
        self.last_norms: deque[float] = deque(maxlen=10)
        self._raised: dict[str, int] = {}

    def see(self, report: StepReport, warm: bool) -> list[Flag]:
        """Count a step; returns its red flags, each at most every REPEAT steps. `warm`: warm-up is over."""
        self.seen += 1
        self.totals[report.outcome] += 1
        self.recent.append(report.outcome)
        self.in_row = self.in_row + 1 if report.outcome in REJECTED else 0
        self.low_scale = self.low_scale + 1 if report.loss_scale < self.limits.min_scale else 0
        flags = [*self._scale_flags(report), *(self._norm_flags(report, warm) if report.committed else ())]
        if report.committed:
            self.last_norms.append(report.grad_l2_preclip)
            flags += [*self._loss_flags(report, warm)]
        return [flag for flag in flags if self._is_news(flag)]

    def _is_news(self, flag: Flag) -> bool:
        last = self._raised.get(flag.name)
        if last is not None and self.seen - last < REPEAT:
            return False
        self._raised[flag.name] = self.seen
        return True

    def _scale_flags(self, report: StepReport) -> list[Flag]:
        if not self.low_scale:
            return []
        return [
            Flag(
                "loss_scale",
                f"loss scale {report.loss_scale:g} is below {self.limits.min_scale:g}; {LOW_SCALE}",
            )
        ]

    def _norm_flags(self, report: StepReport, warm: bool) -> list[Flag]:
        limits, norm, out = self.limits, report.grad_l2_preclip, []
        if norm > limits.norm_explosion:
            out.append(
                Flag(
                    "norm_explosion",
                    f"gradient norm {norm:.4g} before clipping exceeds {limits.norm_explosion:g}: explosion",
                )
            )
        elif norm > limits.norm_warning:
            out.append(Flag("norm_warning", f"Large gradient norm ({norm:.2f}) at step {report.step}"))
        if warm and report.clip_ratio > limits.clip_ratio:  # the first gradients are large by nature
            out.append(
                Flag(
                    "clip_ratio",
                    f"clipping divided the gradient by {report.clip_ratio:.1f} "
                    f"(limit {limits.clip_ratio:g}): lower the LR or raise optim.clip_norm",
                )
            )
        if warm:
            self.clipped.append(report.clip_ratio > 1)
        share = sum(self.clipped) / max(1, len(self.clipped))
        if len(self.clipped) == self.clipped.maxlen and share > limits.clipped_share:
            out.append(
                Flag(
                    "clipped_share",
                    f"{share:.0%} of the last {len(self.clipped)} steps were clipped: "
                    "optim.clip_norm sets the length of most steps",
                )
            )
        return out

    def _loss_flags(self, report: StepReport, warm: bool) -> list[Flag]:
        limits, out = self.limits, []
        if self.totals["committed"] > MEAN_STEPS and report.total > limits.loss_jump * self.mean / self.weight > 0:
            out.append(
                Flag(
                    "loss_jump",
                    f"total loss {report.total:.4g} is more than {limits.loss_jump:g}x its running "
                    f"mean {self.mean / self.weight:.4g}",
                )
            )
        self.mean = MEAN_DECAY * self.mean + (1 - MEAN_DECAY) * report.total
        self.weight = MEAN_DECAY * self.weight + 1 - MEAN_DECAY
        if warm and report.raw.get("dfl", 0.0) > limits.dfl_high:
            out.append(
                Flag(
                    "dfl_high",
                    f"dfl_loss {report.raw['dfl']:.3f} exceeds {limits.dfl_high:g} after warm-up "
                    "(mean over sides; ln 16 = 2.77 knows nothing)",
                )
            )
        if cut := {name: share for name, share in report.saturated.items() if share > limits.saturated_share}:
            shown = ", ".join(f"{name} {share:.0%}" for name, share in cut.items())
            out.append(
                Flag(
                    "saturated",
                    f"rows that the clamp of their loss keeps from learning: {shown}; they are the most wrong ones: "
                    f"take the clamp away ({', '.join(f'loss.{name}={name}' for name in cut)})",
                )
            )
        if warm and report.weighted.get("cpe", 0.0) == 0.0 and report.raw.get("cpe") == 0.0:
            out.append(
                Flag(
                    "cpe_zero",
                    "cpe_loss is exactly 0 after warm-up: no pair contributes; "
                    "lower loss.cpe_iou or set its weight to 0",
                )
            )
        return out

    def verdict(self) -> str | None:
        """Why the run must end, or None."""
        limits = self.limits
        rejected = [o for o in self.recent if o in REJECTED]
        if self.low_scale >= limits.max_low_scale:
            told = f"the loss scale stayed below {limits.min_scale:g} for {counted(self.low_scale, 'step')}"
            return f"{told}. {LOW_SCALE}"
        if self.in_row >= limits.max_rejected_in_row:
            worst = self.recent[-1]
            several = f"{self.in_row} steps in a row were rejected, the last one"
            return f"{several if self.in_row > 1 else 'a step was rejected,'} as {worst}. {ADVICE[worst]}"
        if len(self.recent) == self.recent.maxlen and len(rejected) > limits.max_rejected_share * len(self.recent):
            worst = Counter(rejected).most_common(1)[0][0]
            share = f"{len(rejected)} of the last {len(self.recent)} steps"
            return f"{share} were rejected, mostly as {worst}. {ADVICE[worst]}"
        return None

    @property
    def curable(self) -> bool:
        """Whether going back may help; a loss scale that fell and a graph without gradients would be there again."""
        return self.low_scale < self.limits.max_low_scale and "no_grad" not in list(self.recent)[-1:]

    def pardon(self) -> None:
        """Judge what comes next by itself: rejections so far do not count for the verdict any more."""
        self.in_row = self.low_scale = 0
        self.recent.clear()

    def summary(self) -> str:
        """Outcomes so far in one line, with advice when any step was rejected."""
        shown = ", ".join(f"{name} {count}" for name, count in self.totals.items() if count)
        worst = max(REJECTED, key=lambda name: self.totals[name])
        return f"{shown}. {ADVICE[worst]}" if self.totals[worst] else shown

    def record(self, report: StepReport, window: Sequence[Any], batch: int, epoch: int) -> Path | None:
        """Write incidents/step_N: report.json and batch.pt; None once INCIDENTS are written or the disk refuses."""
        if report.outcome not in REJECTED or self.incidents >= INCIDENTS:
            return None
        self.incidents += 1
        folder = self.folder / "incidents" / f"step_{report.step}"
        if folder.exists():
            folder = folder.with_name(f"step_{report.step}_batch_{batch}")
        content = {
            "outcome": report.outcome,
            "step": report.step,
            "epoch": epoch,
            "batches": indices(window, batch),
            "culprit": report.culprit,
            "evidence": report.evidence,
            "image_ids": list(report.image_ids),
            "loss_scale": report.loss_scale,
            "total": report.total,
            "raw": report.raw,
            "weighted": report.weighted,
            "grad_l2_preclip": report.grad_l2_preclip,
            "last_norms": list(self.last_norms),
            "lr": report.lr,
            "advice": ADVICE[report.outcome],
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(jsonable(content), indent=1)
            (folder / "report.json").write_text(text, encoding="utf-8")
            torch.save([plain(b) for b in window], folder / "batch.pt")
        except (OSError, RuntimeError) as error:
            log.warning("incident of step %d not written: %s", report.step, error)
            return None
        return folder / "report.json"

    def state_dict(self) -> dict[str, Any]:
        return {
            "totals": dict(self.totals),
            "in_row": self.in_row,
            "low_scale": self.low_scale,
            "seen": self.seen,
            "incidents": self.incidents,
            "recent": list(self.recent),
            "clipped": list(self.clipped),
            "mean": self.mean,
            "weight": self.weight,
            "last_norms": list(self.last_norms),
            "raised": dict(self._raised),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in ("in_row", "low_scale", "seen", "incidents", "mean", "weight"):
            setattr(self, name, state[name])
        self.totals.update({k: v - self.totals[k] for k, v in state["totals"].items()})
        for name in ("recent", "clipped", "last_norms"):
            queue = getattr(self, name)
            queue.clear()
            queue.extend(state[name])
        self._raised = dict(state["raised"])


def indices(window: Sequence[Any], first: int) -> list[int]:
    """Batch indices of a window that began at `first`; `task.batch` makes them again."""
    return [int(getattr(b, "index", first + i)) for i, b in enumerate(window)]


def plain(value: Any) -> Any:
    """A dataclass as nested dicts of tensors and plain values, so that it loads with weights_only."""
    if isinstance(value, Tensor) or value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return plain(vars(value)) if hasattr(value, "__dict__") else repr(value)


def jsonable(value: Any) -> Any:
    """The same with non-finite numbers as null: JSON has no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: jsonable(v) for k, v in value.items()}
    return [jsonable(v) for v in value] if isinstance(value, (list, tuple)) else value
