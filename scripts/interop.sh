#!/usr/bin/env bash
# Read llmq's GPTQ and AWQ checkpoints, and the golden ones, with stock transformers and GPTQModel's kernels.
#
#   scripts/interop.sh [ENV_DIR]      ENV_DIR (default .venv-interop) is made, or used again
#   LLMQ_PYTHON=...                   the python that has llmq (default: python)
#   PYTHON=...                        the python that makes ENV_DIR (default: python3)
#
# GPTQModel has no wheels: it is built, and compiles kernels at first use, so a C++ compiler and Python's headers are
# needed. pip's own settings (PIP_FIND_LINKS, PIP_INDEX_URL) choose between a CPU and a CUDA build of torch.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
env_dir=${1:-.venv-interop}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

[ -x "$env_dir/bin/python" ] || "${PYTHON:-python3}" -m venv "$env_dir"
pip=("$env_dir/bin/python" -m pip install --quiet --disable-pip-version-check)
"${pip[@]}" torch==2.13.0 setuptools wheel
# GPTQModel 7.7.0 declares torch>=2.14.1 but runs with 2.13.0; --no-deps keeps that, and the rest is its own list.
"${pip[@]}" transformers==5.23.0 optimum==2.3.0 accelerate==1.15.0 datasets==5.2.0 torchao==0.18.0 defuser==0.0.28 \
    device-smi==0.5.7 logbar==0.4.15 pypcre==0.6.4 tokenicer==0.0.14 'numpy>=2.4.6' 'safetensors>=0.8.0' threadpoolctl \
    packaging 'protobuf>=7.36.2' pillow requests jinja2 ninja maturin pyarrow dill
"${pip[@]}" --no-deps gptqmodel==7.7.0

"${LLMQ_PYTHON:-python}" "$root/scripts/interop_make.py" "$work"
"$env_dir/bin/python" "$root/scripts/interop_check.py" "$work"/*/ "$root"/tests/golden/{gptq,awq}_*/
