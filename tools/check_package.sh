#!/usr/bin/env bash
# Builds sdist and wheel into dist and checks both: metadata, the wheel's files, that the sdist builds the same wheel,
# and the digits configurations with the installed wheel alone, from an empty folder.
# Run it in a clone, with `python` from an environment that has the package's dependencies, such as .venv. The fresh
# environment of the wheel sees the packages of that one, so that torch is not installed again; ttalight is its own.
# Needs an index of packages for build, twine and hatchling.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONPATH
python -c 'import ttalight, lightning, torch' || { echo "activate an environment with the package's dependencies" >&2; exit 1; }
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# Runs a command, and shows what it printed only if it fails.
quietly() {
    "$@" > "$work/log" 2>&1 || { cat "$work/log" >&2; return 1; }
}

echo "Building"
python -m venv "$work/tools"
"$work/tools/bin/python" -m pip install --quiet --disable-pip-version-check build twine
rm -f dist/ttalight-*
quietly "$work/tools/bin/python" -m build --outdir dist  # the sdist, and the wheel from it
quietly "$work/tools/bin/python" -m build --wheel --outdir "$work"
"$work/tools/bin/python" -m twine check --strict dist/ttalight-*
cmp "$work"/ttalight-*.whl dist/ttalight-*.whl || { echo "the sdist builds another wheel than the clone" >&2; exit 1; }

python - dist/ttalight-*.whl <<'PYTHON'
"""Compares the files of the wheel with those that git knows."""
import subprocess
import sys
import zipfile

known = subprocess.run(["git", "ls-files", "ttalight", "configs"], capture_output=True, text=True, check=True).stdout
expected = {f"ttalight/{name}" if name.startswith("configs/") else name for name in known.splitlines()}
names = zipfile.ZipFile(sys.argv[1]).namelist()
found = {name for name in names if ".dist-info/" not in name}
needed = ("ttalight/py.typed", "ttalight/data/mnist.ckpt", "ttalight/data/digits.npz", "/LICENSE", "/NOTICE.txt")
problems = [f"missing: {name}" for name in sorted(expected - found)]
problems += [f"not expected: {name}" for name in sorted(found - expected)]
problems += [f"missing: {end}" for end in needed if not any(name.endswith(end) for name in names)]
if problems:
    sys.exit("files of the wheel:\n" + "\n".join(problems))
print(f"The wheel has the {len(found)} files of ttalight and configs, and nothing else")
PYTHON

echo "Installing the wheel and running configs/digits"
python -m venv "$work/fresh"
"$work/fresh/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-index dist/ttalight-*.whl
python -c 'import sys; print(*(path for path in sys.path if path.endswith("-packages")), sep="\n")' \
    > "$("$work/fresh/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages.pth"
if "$work/fresh/bin/python" -m pip check | grep '^ttalight '; then
    echo "the environment does not have what the wheel requires" >&2
    exit 1
fi
quietly "$work/fresh/bin/python" -I tools/try_installed.py
echo "Passed:" dist/ttalight-*
