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
# a file stays on one process, since its tests share fixtures; each process holds torch, hence not more than four
processes="$("$PY" -c 'import os; print(min(4, os.cpu_count() or 1))')"
"$PY" -m pytest -q -n "$processes" --dist loadfile -m "not slow and ($gpu)"
exec "$PY" -m pytest -q -n "$processes" --dist loadfile -m "slow and ($gpu)"
