#!/usr/bin/env bash
# Stage 3: balanced fine-tuning on K shots of base and novel classes.
#   scripts/train_stage_3.sh [CONFIG] [key=value ... | flags, see scripts/train.py --help]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
run_stage 3 "$@"
