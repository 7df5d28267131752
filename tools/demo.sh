#!/usr/bin/env bash
# The main job on embedded data: train the stages of CTA on scanned digits, adapt to corruptions, compare.
# Needs Python 3.10 or newer and, the first time, a package index. SEED=1 tools/demo.sh runs with another seed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_environment ""

began=$SECONDS
seed="${SEED:-0}"
for stage in source simclr align; do
    echo; echo "== fit: $stage"
    ttalight fit --config "configs/digits/$stage.yaml" --overwrite --seed_everything "$seed"
done
for method in unadapted ptbn tent ema_bn cta; do
    echo; echo "== adapt: $method"
    ttalight adapt --config "configs/digits/$method.yaml" --overwrite --seed_everything "$seed"
done
echo
ttalight compare runs/digits/unadapted runs/digits/ptbn runs/digits/tent runs/digits/ema_bn runs/digits/cta \
    --output runs/digits/table
echo
echo "The table is in runs/digits/table. Watch the runs: tensorboard --logdir runs/digits"
echo "Done in $((SECONDS - began)) s."
