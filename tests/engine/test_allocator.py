# SPDX-License-Identifier: AGPL-3.0-or-later
"""A block that is freed and asked for again brings its pages along."""

import subprocess
import sys

import pytest

from fsdet.engine.allocator import keep_freed_memory

FAULTS = """
import resource, torch
from fsdet.engine.allocator import keep_freed_memory
{before}
for _ in range(30):
    torch.ones(4 << 20)
begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(4 << 20)  # 16 MiB, 4,096 pages
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun)
"""


def faults(before: str) -> int:
    code = [sys.executable, "-c", FAULTS.format(before=before)]
    return int(subprocess.run(code, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(not keep_freed_memory(), reason="no glibc")
def test_freed_blocks_are_used_again_without_page_faults():
    assert faults("keep_freed_memory()") < 500


def test_elsewhere_nothing_is_changed(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
