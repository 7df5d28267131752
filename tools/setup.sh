# Sourced by demo.sh and test.sh: makes .venv, installs the package under the pinned versions, and activates it.
#   setup_environment EXTRA    EXTRA is an optional set of dependencies, "" for none
cd "$(dirname "${BASH_SOURCE[0]}")/.."

find_python() {
    for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python 3.10 or newer found: install one, or name it with PYTHON=/path/to/python" >&2
    return 1
}

setup_environment() {
    local extra="$1" python stamp
    python="$(find_python)"
    stamp="$(cat pyproject.toml tools/constraints.txt | cksum | tr -d ' ')-${extra:-none}"
    if [ ! -f ".venv/installed-$stamp" ]; then
        echo "Installing into .venv (once)"
        [ -x .venv/bin/python ] || "$python" -m venv .venv
        # The CPU build of torch comes first: torchvision's own requirement would bring a CUDA build of several GiB.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint tools/constraints.txt torch
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint tools/constraints.txt \
            --editable ".${extra:+[$extra]}"
        touch ".venv/installed-$stamp"
    fi
    . .venv/bin/activate
}
