#!/usr/bin/env bash
# All checks: style, unit tests, then the slow end-to-end tests. Arguments go to pytest instead: scripts/test.sh tests/losses
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
cd "$ROOT"
export OMP_NUM_THREADS=1
if [ $# -gt 0 ]; then exec "$PY" -m pytest "$@"; fi
"$PY" -m ruff check .
"$PY" -m ruff format --check .
gpu="not gpu"
if "$PY" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then gpu="gpu or not gpu"; fi
"$PY" -m pytest -q -m "not slow and ($gpu)"
exec "$PY" -m pytest -q -m "slow and ($gpu)"
