#!/usr/bin/env bash
# Checks and measures everything on a CUDA device, in at most LIMIT seconds (480), writing tables as it goes. The same
# command continues where the last one stopped: see gpu.py for the steps, the options and the tables.
#   tools/benchmarks/gpu.sh OUT [--peer CHECKOUT] [--steps tests methods] [--tiny]
# Needs an environment that has the package and a build of torch for the device; PYTHON names its interpreter.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
limit="${LIMIT:-480}"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# An error of the device ends the process with 75: another one continues behind the row that failed.
for attempt in 1 2 3 4; do
    left=$((limit - SECONDS))
    [ "$left" -gt 0 ] || break
    status=0
    # Rows are begun until 40 seconds before the end. One that hangs is cut off there.
    timeout --kill-after=5 "$left" "${PYTHON:-python}" "$root/tools/benchmarks/gpu.py" "$@" \
        --seconds "$((left > 80 ? left - 40 : left / 2))" || status=$?
    [ "$status" -eq 75 ] || break
    echo "continuing in a new process ($attempt)"
done
exit "$status"
