#!/usr/bin/env bash
# The main job: episodic training of the dual-head detector, then its evaluation.
#   ./train_stage_2.sh [CONFIG] [key=value ... | flags, see scripts/train.py --help]
# On first use it makes .venv, draws the demo data and trains stage 1 when they are missing. A stopped run continues;
# a finished one prints its table and the next commands.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/_env.sh"
run_stage 2 "$@"
