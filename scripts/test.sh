#!/usr/bin/env bash
# The tests, with their environment: lint, types, then pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh '[test]'
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
