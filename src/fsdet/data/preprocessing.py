# SPDX-License-Identifier: AGPL-3.0-or-later
"""What happens to pixels before a detector sees them: one object for validation, evaluation and use, kept in the
checkpoint. Training moves and recolours its images, then divides and lays them out by the same functions."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fsdet.data.collate import to_tensor
from fsdet.data.transforms import GREY, letterbox
from fsdet.errors import CheckpointError, explain


@dataclass(frozen=True)
class Preprocessing:
    """image_size: side of the network's input, px. support_size: side of the window around a support instance, px.

    The rest is what this version does, written down so that another version's checkpoint is not misread: channel order,
    how an image is fitted in, the grey it is padded with, what values are divided by.
    """

    image_size: int
    support_size: int
    order: str = "rgb"
    fit: str = "longer side, centred"
    pad: int = GREY
    divide: int = 255

    def fitted(self, pixels: np.ndarray) -> tuple[np.ndarray, float, tuple[float, float]]:
        """uint8 [H, W, 3] RGB -> (uint8 [S, S, 3], factor, (left, top) padding px), which `to_original` undoes."""
        return letterbox(pixels, self.image_size)

    def tensor(self, fitted: Sequence[np.ndarray]) -> Tensor:
        """n fitted images -> [n, 3, S, S] float32 in [0, 1]."""
        return to_tensor(fitted, self.image_size)

    def stored(self) -> dict[str, Any]:
        """As a checkpoint keeps it, beside its sizes."""
        return {key: value for key, value in asdict(self).items() if key not in ("image_size", "support_size")}

    @staticmethod
    def of(spec: Mapping[str, Any], where: str) -> "Preprocessing":
        """Of a checkpoint's spec; one from before it was kept has its sizes alone.

        Raises:
            CheckpointError: it wants what this version does not do.
        """
        own = Preprocessing(spec["image_size"], spec["support_size"])
        known, theirs = own.stored(), spec.get("preprocessing", own.stored())
        if theirs != known:
            keys = sorted({*known, *theirs}, key=str) if isinstance(theirs, Mapping) else ()
            differ = [key for key in keys if theirs.get(key) != known.get(key)]
            want = ", ".join(f"{key} {known.get(key)!r}" for key in differ) or "preprocessing by name"
            got = ", ".join(f"{key} {theirs.get(key)!r}" for key in differ) or repr(theirs)[:80]
            raise CheckpointError(explain(want, got, f"{where}: preprocessing",
                                          "use the version of fsdet that trained it"))  # fmt: skip
        return own
