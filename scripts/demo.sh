#!/usr/bin/env bash
# The main job end to end: environment, a real model, 4-bit GPTQ, a sentence, and a table of what it cost.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/env.sh
exec python scripts/demo.py "$@"
