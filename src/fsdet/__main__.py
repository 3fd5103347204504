# SPDX-License-Identifier: AGPL-3.0-or-later
"""`python -m fsdet`."""

import sys

from fsdet.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
