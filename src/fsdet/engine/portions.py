# SPDX-License-Identifier: AGPL-3.0-or-later
"""A batch that does not fit into memory is run in parts whose gradients add up to its own.

Each part weighs by its normaliser (engine/step.py), so the sum is the batch's gradient for losses of single images
with BatchNorm in eval; BatchNorm in training and losses over pairs of images see the smaller parts.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fsdet.engine.position import Position
from fsdet.engine.step import StepController, TooLarge
from fsdet.errors import RunFailed
from fsdet.types import StepReport

log = logging.getLogger("fsdet")
CURE = "lower data.image_size, data.support_size or episode.ways, take a smaller model.backbone, or another device"
WHOLE = "halve episode.queries and double optim.accumulate, or lower data.image_size"


def run(controller: StepController, window: Sequence[Any], position: Position, how: Mapping[str, Any]) -> StepReport:
    """controller.run(window, **how), each batch cut into `position.parts`, which doubles where that does not fit.

    The interrupted attempt leaves nothing behind: buffers, gradients and generators are as before it.
    Raises:
        RunFailed: a single image does not fit, a batch cannot be cut, or it was not the batch that did not.
    """
    while True:
        parts = [part for batch in window for part in cut(batch, position.parts)]
        try:
            return controller.run(parts, **how)
        except TooLarge as error:
            reason = str(error)  # and no more of it: its frames hold the tensors that have to go
        except torch.OutOfMemoryError as error:
            raise RunFailed(f"out of memory at step {controller.step}, after the backward. Next: {CURE}\n"
                            f"{error}") from error  # fmt: skip
        position.parts = _finer(controller, window, parts, position.parts, reason)
        if controller.device.type == "cuda":
            torch.cuda.empty_cache()


def cut(batch: Any, parts: int) -> list[Any]:
    """`batch` halved again and again into `parts`, a power of two; what has one image or no `halves` stays whole."""
    if parts == 1 or not hasattr(batch, "halves") or len(getattr(batch, "image_ids", ())) < 2:
        return [batch]
    return [part for half in batch.halves() for part in cut(half, parts // 2)]


def _finer(controller: StepController, window: Sequence[Any], parts: Sequence[Any], before: int, reason: str) -> int:
    """Twice as many parts as `before`, told. Raises RunFailed where that changes nothing."""
    finer = [part for batch in window for part in cut(batch, 2 * before)]
    if len(finer) == len(parts):
        single = before > 1 or all(len(getattr(part, "image_ids", ())) == 1 for part in parts)
        cure = f"one image at a time does not fit: {CURE}" if single else WHOLE
        raise RunFailed(f"out of memory at step {controller.step}. Next: {cure}\n{reason}")
    modules = controller.task.model.modules()
    norms = any(m.training for m in modules if isinstance(m, torch.nn.modules.batchnorm._BatchNorm))
    exact = "approximately the same gradient, as BatchNorm sees the parts" if norms else "the same gradient"
    log.log(logging.WARNING if controller.peers.leads else logging.INFO,
                "out of memory at step %d with %d images at once; from here on %d at most, %d times as many in a step: "
                "%s (losses over pairs of images: those within a part). %s",
                controller.step, _most(parts), _most(finer), 2 * before, exact, reason.partition("\n")[0])  # fmt: skip
    return 2 * before


def _most(parts: Sequence[Any]) -> int:
    return max(len(getattr(part, "image_ids", ())) for part in parts)
