# SPDX-License-Identifier: AGPL-3.0-or-later
"""The drawn set of tests/tasks, for trainings on a CUDA device."""

from tasks.conftest import small_demo  # noqa: F401  (a fixture)
