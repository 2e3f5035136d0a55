#!/usr/bin/env bash
# The tests, with their environment: lint, types, then pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh '[test]'
ruff check .
ruff format --check .
mypy
# A file a process, a thread each: threads of small tensors that wait for each other take several times as long.
export OMP_NUM_THREADS=1
exec python -m pytest -n auto --dist loadfile "$@"
