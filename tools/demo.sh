#!/usr/bin/env bash
# The main job on embedded data: train the stages of CTA on scanned digits, adapt to corruptions, compare.
# Needs Python 3.10 or newer and, the first time, a package index. SEED=1 tools/demo.sh runs with another seed.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_environment ""

# Prints the number of cores that are free in one second, at least 1. Threads on busy cores wait for each other.
free_cores() {
    local hertz idle before
    [ -r /proc/stat ] || { getconf _NPROCESSORS_ONLN; return; }
    hertz="$(getconf CLK_TCK)"
    before="$(awk '/^cpu / {print $5 + $6}' /proc/stat)"
    sleep 1
    idle="$(awk '/^cpu / {print $5 + $6}' /proc/stat)"
    awk -v idle="$((idle - before))" -v hertz="$hertz" 'BEGIN {n = int(idle / hertz + 0.5); print (n > 1 ? n : 1)}'
}

began=$SECONDS
seed="${SEED:-0}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(free_cores)}" OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
echo "Training three stages and adapting five ways, $OMP_NUM_THREADS thread(s)"
for stage in source simclr align; do
    ttalight fit --config "configs/digits/$stage.yaml" --overwrite --quiet true --seed_everything "$seed"
done
for method in unadapted ptbn tent ema_bn cta; do
    ttalight adapt --config "configs/digits/$method.yaml" --overwrite --quiet true --seed_everything "$seed"
done
echo
ttalight compare runs/digits/unadapted runs/digits/ptbn runs/digits/tent runs/digits/ema_bn runs/digits/cta \
    --output runs/digits/table
echo
echo "The table is in runs/digits/table. Watch the runs: tensorboard --logdir runs/digits"
echo "Done in $((SECONDS - began)) s."
