# SPDX-License-Identifier: AGPL-3.0-or-later
"""The width of numbers inside losses and box arithmetic."""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """float32 of any narrower or integer dtype; float64 stays, so that finite differences can check a gradient."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
