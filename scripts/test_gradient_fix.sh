#!/usr/bin/env bash
# The quick check of older scripts: five short epochs of stage 2, then the norms and losses that were printed.
#   scripts/test_gradient_fix.sh [CONFIG] [key=value ... | flags, see scripts/train.py --help]
# Without CONFIG it trains on the demo set, a few minutes on two cores. The log is test_gradient_fix.log where you stand.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_env.sh"
log="$PWD/test_gradient_fix.log"
_enter_root
"$PY" scripts/train.py --stage 2 --epochs 5 --n_way 2 --batch_size 16 --warmup_epochs 1 --n_episodes 20 \
    --save_dir checkpoints/test_gradient_fix --exist-ok log.every=5 eval.every=0 "$@" 2>&1 | tee "$log"

printf '\nrejected steps: %s\n' "$(grep -c "Skipping optimizer step" "$log" || true)"
for words in "Total Grad Norm:" "Total Loss:"; do
    printf '\n%s\n' "$words"
    grep "$words" "$log" | tail -n 10
done
