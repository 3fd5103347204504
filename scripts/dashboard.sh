#!/usr/bin/env bash
# Runs as curves in a terminal, offline: W&B's `leet` on the newest run that has a W&B log.
#   scripts/dashboard.sh [FOLDER]      FOLDER: a run folder, or a folder of runs (default: checkpoints)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
folder="${1:-$ROOT/checkpoints}"
[ -d "$folder" ] || _fail "$folder: expected a folder of runs, found none. Next: train one with ./train_stage_2.sh"
newest="$(find "$folder" -name 'run-*.wandb' -type f -exec ls -t {} + 2>/dev/null | head -n 1 || true)"
[ -n "$newest" ] || _fail "$folder: expected a W&B log, found none. Next: train with log.wandb.mode=offline" \
    "(results.csv and results.png are in every run folder)"
_say "in it: / filters curves (train_step/.*loss, grad, val), h is help, q leaves"
exec "$PY" -m wandb leet "$(dirname "$newest")"
