# SPDX-License-Identifier: AGPL-3.0-or-later
"""The clip norm of a step, and how it follows the norms of the steps before.

`percentile` is AutoClip (Seetharaman et al. 2020, https://arxiv.org/abs/2007.14469) over a window, `zscore` is ZClip's
rule (Kumar et al. 2025, https://arxiv.org/abs/2504.02507) over the same window.
"""

import math
from collections import deque
from collections.abc import Mapping
from typing import Any

from fsdet.config import Optim

KINDS = ("none", "percentile", "zscore")
LEAST = 20  # norms before they are trusted


class Clipping:
    """Clip norms from a fixed bound and, unless `optim.clip_adaptive` is none, from the last committed norms.

    The window holds norms before clipping; for zscore, what exceeds the limit of its step is held at that limit, so
    that one spike neither hides the next nor widens the band. Its state is part of a checkpoint.
    """

    def __init__(self, optim: Optim) -> None:
        self.kind, self.percentile, self.zscore = optim.clip_adaptive, optim.clip_percentile, optim.clip_zscore
        self.norms: deque[float] = deque(maxlen=optim.clip_window)

    def limit(self, fixed: float) -> float:
        """The clip norm of the next step: the lower of `fixed` (0: none) and the adaptive one; 0 means no clipping."""
        adaptive = self._adaptive()
        if adaptive is None:
            return fixed
        return min(fixed, adaptive) if fixed else adaptive

    def add(self, norm: float, limit: float) -> None:
        """Remember a committed step: its norm before clipping, and the limit it had."""
        if self.kind != "none":
            self.norms.append(min(norm, limit) if self.kind == "zscore" and limit else norm)

    def _adaptive(self) -> float | None:
        """None until LEAST norms are known (or the window is full), and where all of them are 0."""
        count = len(self.norms)
        if self.kind == "none" or count < min(LEAST, self.norms.maxlen or LEAST):
            return None
        if self.kind == "percentile":
            ordered = sorted(self.norms)
            place = self.percentile * (count - 1)
            low = math.floor(place)
            high = min(low + 1, count - 1)
            found = ordered[low] + (place - low) * (ordered[high] - ordered[low])
        else:
            mean = math.fsum(self.norms) / count
            spread = math.sqrt(math.fsum((n - mean) ** 2 for n in self.norms) / count)
            found = mean + self.zscore * spread
        return found or None

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self.norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.norms.clear()
        self.norms.extend(state.get("norms", ()))
