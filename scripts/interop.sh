#!/usr/bin/env bash
# Read llmq's GPTQ and AWQ checkpoints, and the golden ones, with stock transformers and GPTQModel's kernels; and, of a
# real model's QUANTIZED checkpoint, the plain ONNX and the GGUF that llmq exports with openvino and openvino-genai.
#
#   scripts/interop.sh [ENV_DIR] [QUANTIZED]      ENV_DIR (default .venv-interop) is made, or used again; so is
#                                     ENV_DIR-openvino where QUANTIZED, a folder, is given
#   LLMQ_PYTHON=...                   the python that has llmq (default: python)
#   PYTHON=...                        the python that makes ENV_DIR (default: python3)
#
# scripts/peers/env.sh makes the environment, the same that scripts/bench_peers.sh measures GPTQModel in.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
env_dir=${1:-.venv-interop}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$root/scripts/peers/env.sh" gptqmodel "$env_dir"

"${LLMQ_PYTHON:-python}" "$root/scripts/interop_make.py" "$work"
"$env_dir/bin/python" "$root/scripts/interop_check.py" "$work"/*/ "$root"/tests/golden/{gptq,awq}_*/

if [ -n "${2:-}" ]; then
    "$root/scripts/peers/env.sh" openvino "$env_dir-openvino"
    "${LLMQ_PYTHON:-python}" "$root/scripts/interop_openvino.py" make "$2" "$work/openvino"
    "$env_dir-openvino/bin/python" "$root/scripts/interop_openvino.py" check "$work/openvino"
fi
