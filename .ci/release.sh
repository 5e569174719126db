#!/usr/bin/env bash
# The source distribution of the commit that is checked out, made twice, its hash, and its bill of materials: in dist/.
# PYTHON is the environment whose tests passed (.ci/run); the bill lists what is installed there.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-python3}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 SOURCE_DATE_EPOCH
SOURCE_DATE_EPOCH=$(git log -1 --format=%ct)
unset PYTHONPATH PYTHONHOME

"$python" -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet --only-binary :all: --require-hashes -r .ci/release.txt
for number in 1 2; do
  mkdir "$work/tree$number"
  git archive HEAD | tar -x -C "$work/tree$number"
  # What setup.py would ask for where there is no torch is not needed to pack files.
  "$work/tools/bin/python" -m build --sdist --no-isolation --skip-dependency-check --outdir "$work/dist$number" "$work/tree$number" >/dev/null
done
cmp "$work"/dist[12]/*.tar.gz

"$python" -m venv "$work/bill"
"$work/bill/bin/pip" install --quiet cyclonedx-bom==7.5.0
mkdir -p dist
cp "$work"/dist1/*.tar.gz dist/
archive=$(basename "$work"/dist1/*.tar.gz)
"$work/bill/bin/cyclonedx-py" environment --output-reproducible --pyproject pyproject.toml --output-file "dist/${archive%.tar.gz}.cdx.json" "$python"
(cd dist && sha256sum "$archive" "${archive%.tar.gz}.cdx.json" | tee SHA256SUMS)
