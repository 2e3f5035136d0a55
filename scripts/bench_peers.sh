#!/usr/bin/env bash
# Make the rivals' environments, then quantize with each and score every file by llmq's decoder.
#
#   scripts/bench_peers.sh ENVS MODEL --calib FILE --text FILE [--out DIR] [--only NAME ...]
#
#   ENVS             folder of the environments, made where they are missing: about 2 GB each
#   MODEL            float checkpoint, as scripts/make_reference_model.py makes
#   LLMQ_PYTHON=...  the python that has llmq (default: python);  PYTHON=...  the one that makes ENVS (default: python3)
#
# Rows are kept in DIR/peers.json as they come; run it again and it goes on. `--help` as MODEL lists the options.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
envs=${1:?usage: bench_peers.sh ENVS MODEL --calib FILE --text FILE}
shift
for peer in gptqmodel autoround llmcompressor; do
    "$here/peers/env.sh" "$peer" "$envs/$peer"
done
exec "${LLMQ_PYTHON:-python}" "$here/bench_peers.py" --envs "$envs" "$@"
