# SPDX-License-Identifier: AGPL-3.0-or-later
"""docs/faults.md names tests that are there."""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).parent
ROWS = [line for line in (TESTS.parent / "docs/faults.md").read_text(encoding="utf-8").splitlines()
        if re.match(r"\| \d+ \|", line)]  # fmt: skip


def test_every_fault_has_a_row_and_every_row_tests_that_exist():
    assert [int(line.split("|")[1]) for line in ROWS] == list(range(1, 33))
    for line in ROWS:
        named = re.findall(r"`(\S+\.py)::(test_\w+)`", line.rsplit("|", 2)[1])
        assert named and line.count("::") == len(named), line
        for file, test in named:
            tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
            assert any(isinstance(n, ast.FunctionDef) and n.name == test for n in ast.walk(tree)), f"{file}::{test}"
