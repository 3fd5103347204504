#!/usr/bin/env bash
# Mask R-CNN on COCO instances.
#   scripts/train_maskrcnn.sh [CONFIG] [key=value ... | flags, see scripts/train.py --help]
# Without CONFIG it is configs/demo/maskrcnn.yaml, on pictures that are drawn first. A stopped run continues.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
_enter_root
exec "$PY" "$ROOT/scripts/run_task.py" maskrcnn "$@"
