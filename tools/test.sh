#!/usr/bin/env bash
# All checks: style, types, tests. Needs Python 3.10 or newer and, the first time, a package index.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_environment "analysis,clip,dev,docs,forward-only,plots,retrieval,serve"

ruff check .
ruff format --check .

# The types are checked while the tests begin: mypy is one process. What it says comes last.
said="$(mktemp)"
mypy >"$said" 2>&1 &
types=$!
trap 'kill "$types" 2>/dev/null || true; rm -f "$said"' EXIT
failed=""
# A few threads too many make many small operations slower than none.
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal --durations=15 "$@" || failed="pytest"
wait "$types" || failed="${failed:+$failed and }mypy"
cat "$said"
if [ -n "$failed" ]; then
    echo "failed: $failed" >&2
    exit 1
fi
