"""Tokens per second of a GPTQ checkpoint on GPTQModel's own CPU kernels, beside the float32 model, in turns.

Runs in an environment with `gptqmodel`, not in llmq's own; scripts/bench_runtime.py calls it. The last line printed is
one JSON object: the kernels used, and a list of [ours, float32] for decode and for prefill.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import _speed
import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # without it GPTQModel 7.7.0 does not start on a two-core machine


def main() -> None:
    """Load both models, warm both up, and time them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantized")
    parser.add_argument("source")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--new", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    args = parser.parse_args()

    import gptqmodel
    from gptqmodel.nn_modules.qlinear import BaseQuantLinear
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    models: list[Any] = [gptqmodel.GPTQModel.load(args.quantized, device="cpu", dtype=torch.float32).model]
    models.append(AutoModelForCausalLM.from_pretrained(args.source, dtype=torch.float32).eval())
    kernels = sorted({type(m).__name__ for m in models[0].modules() if isinstance(m, BaseQuantLinear)})
    torch.set_num_threads(args.threads)  # GPTQModel sets its own
    ids = _speed.token_ids(models[1].config.vocab_size)
    found: dict[str, Any] = {"version": gptqmodel.__version__, "kernels": kernels, "decode": [], "prefill": []}
    for turn in range(args.rounds + 1):
        decode = [_speed.decode(m, ids, args.new) for m in models]
        prefill = [_speed.prefill(m, ids) for m in models]
        if turn:  # the first one warms up
            found["decode"].append(decode)
            found["prefill"].append(prefill)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
