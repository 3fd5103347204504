#!/usr/bin/env bash
# An image classifier: genuine or forged pages.
#   scripts/train_classifier.sh [CONFIG] [key=value ... | flags, see scripts/train.py --help]
# Without CONFIG it is configs/demo/docuforge.yaml, on pages that are drawn first. A stopped run continues.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
_enter_root
exec "$PY" "$ROOT/scripts/run_task.py" classifier "$@"
