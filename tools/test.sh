#!/usr/bin/env bash
# All checks: style, types, tests. Needs Python 3.10 or newer and, the first time, a package index.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
setup_environment "analysis,clip,dev,docs,forward-only,plots,retrieval,serve"

ruff check .
ruff format --check .
mypy
# A few threads too many make many small operations slower than none.
OMP_NUM_THREADS=1 python -m pytest -n 2 --dist worksteal --durations=15 "$@"
