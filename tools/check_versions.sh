#!/usr/bin/env bash
# Installs the package's wheel in fresh environments and runs a short set of tests in each: with the lowest versions
# that pyproject.toml allows, and with the newest of everything. Checks before that the versions which tools/test.sh
# pins fit together. Prints a table of versions and outcomes at the end.
#   tools/check_versions.sh                                   Python 3.10 and 3.13, lowest and newest
#   tools/check_versions.sh 3.11 3.12-newest                  other versions of Python, or one environment of them
#   tools/check_versions.sh --torch-index URL 3.12            torch and torchvision from this index
# Needs uv (pip install uv) and an index of packages. Interpreters are looked for on the PATH, in pyenv and by uv.
# TTALIGHT_TORCH_INDEX names an index of torch builds too. That of CPU builds, https://download.pytorch.org/whl/cpu, is
# the usual choice: the default builds bring about 3 GB of CUDA libraries for each version of torch on Linux.
# Logs are in runs/versions, one for each environment. The environments are deleted, one at a time.
# Exits with 1 if an environment fails or an interpreter is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH
export OMP_NUM_THREADS=1
logs="$PWD/runs/versions"
packages=(torch lightning torchvision timm torchmetrics jsonargparse tensorboard)
IFS=, read -ra extras <<< "$(sed -n 's/^setup_environment "\(.*\)"/\1/p' tools/test.sh)"
tests=(
    tests/test_compat.py tests/test_start_up.py
    tests/test_cli.py::Test{Runs,CheckpointPath,Command} tests/test_cli.py::TestConfigs::test_every_file_is_parsed
    tests/adapters/test_methods.py tests/adapters/test_wrap.py tests/adapters/test_export.py tests/losses
)

# Prints the path of an interpreter: find_python 3.10
find_python() {
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python \
        "$(uv python find --no-python-downloads "$1" 2>/dev/null)"; do
        if [ "$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)" = "$1" ]; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

# Lines of a uv configuration that takes torch and torchvision from one index, all else from the default one.
torch_source() {
    [ -n "$1" ] || return 0
    printf '\n[[tool.uv.index]]\nname = "torch-builds"\nurl = "%s"\nexplicit = true\n' "$1"
    printf '[tool.uv.sources]\ntorch = { index = "torch-builds" }\ntorchvision = { index = "torch-builds" }\n'
}

# Prints the versions of the environment as cells of the table.
versions() {
    local code='import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]), sep=" | ")'
    "$1/bin/python" -c "$code" "${packages[@]}" 2> /dev/null || echo "| | | | | |"
}

# Makes the environment and tests it. Prints the outcome alone, all else is in the log: check PYTHON RESOLUTION LOG
check() {
    local environment="$work/environment" stage="versions pinned for tools/test.sh"
    {
        uv pip compile --quiet --python "$1" --no-build --constraint tools/constraints.txt \
            "${extras[@]/#/--extra=}" pyproject.toml \
            && stage=installing \
            && uv venv --clear --python "$1" "$environment" \
            && uv pip install --python "$environment" --no-build --resolution "$2" -r "$work/pyproject.toml" \
            && uv pip install --python "$environment" --no-deps "$work"/*.whl \
            && uv pip install --python "$environment" --no-build pytest \
            && uv pip list --python "$environment" \
            && stage="README and configurations" \
            && "$environment/bin/python" -I tools/try_installed.py \
            && stage=tests \
            && (cd "$work/checkout" && "$environment/bin/pytest" -q -p no:cacheprovider "${tests[@]}") \
            && stage=
    } > "$3" 2>&1 || true
    [ -z "$stage" ] && echo passed || echo "failed: $stage"
}

index="${TTALIGHT_TORCH_INDEX:-}"
if [ "${1:-}" = --torch-index ]; then
    index="${2:?--torch-index needs an address}"
    shift 2
fi
[ $# -gt 0 ] || set -- 3.10 3.13
command -v uv > /dev/null || { echo "uv is needed: pip install uv" >&2; exit 1; }

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
mkdir -p "$logs" "$work/checkout"
cp -r configs tests pyproject.toml "$work/checkout"  # without the package, so that tests import the installed one
{ cat pyproject.toml; torch_source "$index"; } > "$work/pyproject.toml"
uv build --quiet --wheel --out-dir "$work"

rows=() failed=0
for argument in "$@"; do
    version="${argument%%-*}"
    kinds=(lowest newest)
    [ "$version" = "$argument" ] || kinds=("${argument#*-}")
    if ! python="$(find_python "$version")"; then
        echo "Python $version is missing: it is not on the PATH, in pyenv, or known to uv" >&2
        rows+=("| $version | ${kinds[*]} | | | | | | | | missing |")
        failed=1
        continue
    fi
    for kind in "${kinds[@]}"; do
        case "$kind" in
            lowest) resolution=lowest-direct ;;
            newest) resolution=highest ;;
            *) echo "$argument: expected 3.12, 3.12-lowest or 3.12-newest" >&2; exit 1 ;;
        esac
        log="$logs/$version-$kind.log"
        echo "Python $version with the $kind versions, log in $log"
        outcome="$(check "$python" "$resolution" "$log")"
        rows+=("| $("$python" --version | cut -d' ' -f2) | $kind | $(versions "$work/environment") | $outcome |")
        [ "$outcome" = passed ] || { failed=1; tail -n 20 "$log" >&2; }
        rm -rf "$work/environment"
    done
done
printf '\n| Python | versions |%s outcome |\n| --- | --- |%s --- |\n' \
    "$(printf ' %s |' "${packages[@]}")" "$(printf ' %s |' "${packages[@]//*/---}")"
printf '%s\n' "${rows[@]}"
exit "$failed"
