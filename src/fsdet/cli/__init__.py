# SPDX-License-Identifier: AGPL-3.0-or-later
"""The command line: one file per verb, each with `parse(parser, argv)` and `run(args) -> exit code`."""
