# SPDX-License-Identifier: AGPL-3.0-or-later
"""Activations of a step on the CPU stay with the process instead of going back to the kernel and coming again.

glibc maps each large block anew and unmaps it when it is freed, so every step touches its pages for the first time:
31,000 page faults and a seventh of the time of a step of yolov8n (docs/notebook.md).
"""

import ctypes
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
LARGEST = 32 << 20  # bytes; glibc accepts no larger threshold for blocks of their own
SPARE = 64 << 20


def keep_freed_memory() -> bool:
    """Tell glibc's malloc so; False where there is no glibc, and nothing is changed."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version") or not hasattr(libc, "mallopt"):
        return False
    settings = ((MMAP_THRESHOLD, LARGEST), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, SPARE))
    return all([libc.mallopt(name, value) == 1 for name, value in settings])
