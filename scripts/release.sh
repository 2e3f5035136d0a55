#!/usr/bin/env bash
# Build the wheel and the sdist and check them as a user would meet them.
#
#   scripts/release.sh DIST [VERSION]     VERSION: what pyproject.toml, CITATION.cff and CHANGELOG.md must say
#
# In an environment of its own: build, twine check; the wheel into a bare environment, where llmq is imported without a
# GPU and its command runs; the sdist builds the same wheel. pip's own settings choose between a CPU and a CUDA torch.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
dist=$(mkdir -p "$1" && cd "$1" && pwd)
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/pyproject.toml")
[ "${2:-$version}" = "$version" ] || { echo "pyproject.toml says $version, not $2" >&2; exit 1; }
grep -q "^version: $version\$" "$here/CITATION.cff" || { echo "CITATION.cff does not say $version" >&2; exit 1; }
grep -q "^## $version" "$here/CHANGELOG.md" || { echo "CHANGELOG.md has no part of $version" >&2; exit 1; }

room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/tools"
"$room/tools/bin/pip" install --quiet build twine
"$room/tools/bin/python" -m build --outdir "$dist" "$here"
"$room/tools/bin/twine" check --strict "$dist"/*"$version"*

python3 -m venv "$room/bare"
"$room/bare/bin/pip" install --quiet --constraint "$here/scripts/constraints.txt" torch
"$room/bare/bin/pip" install --quiet --constraint "$here/scripts/constraints.txt" "$dist"/*"$version"*.whl
cd "$room"
export CUDA_VISIBLE_DEVICES=
[ "$("$room/bare/bin/llmq" --version)" = "llmq $version" ]
"$room/bare/bin/llmq" list schemes > "$room/schemes"
"$room/bare/bin/python" - <<'PY'
import importlib.resources as files

import llmq, llmq_kernels  # noqa: E401

assert all(getattr(llmq, name) for name in llmq.__all__), llmq.__all__
for package in ("llmq", "llmq_kernels"):
    assert files.files(package).joinpath("py.typed").is_file(), package
PY
echo "llmq $version: wheel and sdist are right"
