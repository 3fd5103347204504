# SPDX-License-Identifier: AGPL-3.0-or-later
"""A sample that cannot be used, and another drawn in its place, by the key of that place and nothing else."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import cv2
import numpy as np

from fsdet import errors
from fsdet.errors import DataError, told
from fsdet.types import Replaced

T = TypeVar("T")
R = TypeVar("R")
TRIES = 8  # draws for one place of a batch
MISTAKES = (*errors.MISTAKES, cv2.error)


class Unmade(DataError):
    """No sample that was drawn for a place of a batch can be used. replaced: all that were tried for the batch."""

    def __init__(self, message: str, replaced: Sequence[Replaced] = ()) -> None:
        super().__init__(message)
        self.replaced = tuple(replaced)


def usable(
    key: tuple[int, ...],
    first: T,
    make: Callable[[T, np.random.Generator], R],
    name: Callable[[T], str],
    again: Callable[[T, np.random.Generator], T],
    replaced: list[Replaced],
) -> tuple[T, R]:
    """(what was drawn, what was made of it): `first`, or the next draw of which something can be made.

    Args:
        key: (seed, kind, ...) of the place; it and the number of the try seed every draw, so that workers, prefetching
            and a resume change nothing. The first try has the stream that it has where nothing is at fault.
        make: draws augmentation from its generator. name: of the sample, where an error does not name another.
        again: another draw for the same place. replaced: gets what could not be used.
    Raises:
        Unmade: after TRIES.
    """
    chosen = first
    for attempt in range(TRIES):
        try:
            return chosen, make(chosen, np.random.default_rng((*key, attempt) if attempt else key))
        except MISTAKES as error:
            own, blamed = name(chosen), getattr(error, "sample", "")
            replaced.append(Replaced(blamed or own, told(error)))
        if blamed in ("", own):  # another image that was mixed in: the next try mixes in others
            chosen = again(chosen, np.random.default_rng((*key, attempt, 1)))
    raise Unmade(f"{TRIES} samples in a row cannot be used; last: {replaced[-1].reason}", replaced)
