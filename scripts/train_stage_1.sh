#!/usr/bin/env bash
# Stage 1: a detector on the base classes.
#   scripts/train_stage_1.sh [CONFIG] [key=value ... | flags, see scripts/train.py --help]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
run_stage 1 "$@"
