"""What many small linears cost beside few large ones: a block of 1,000 experts against a dense one of the same weights.

    python scripts/bench_experts.py [--experts 1000] [--width 128] [--hidden 512] [--format gptq] [--limit 1.3]

Both are Qwen3-MoE of one block, random and made here (bfloat16, 0.4 GB each): the experts' matrices [width, hidden]
and [hidden, width], or one MLP as wide as all of them together. Rounded to nearest, with and without the check of what
was written; each the best of `--times` runs, in seconds of the processor. Prints both and their ratio; ends with 1
where it is above `--limit`. The smallest experts that are published (granite 3's 1B) are [512, 1024].
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from _tiny import VOCAB, make_tokenizer
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

import llmq


def make(folder: Path, experts: int, width: int, H: int, *, dense: bool) -> None:
    """Write a checkpoint of one block, under the names that Qwen3-MoE's have."""
    config = Qwen3MoeConfig(
        vocab_size=VOCAB, hidden_size=H, num_hidden_layers=1, num_attention_heads=H // 128,
        num_key_value_heads=H // 128, head_dim=128, intermediate_size=experts * width if dense else width,
        moe_intermediate_size=width, num_experts=experts, num_experts_per_tok=8, mlp_only_layers=[0] if dense else [],
        dtype="bfloat16", bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    make_tokenizer(bos=True).save_pretrained(folder)
    wide, mlp = (experts * width, "mlp.") if dense else (width, "mlp.experts.{}.")
    shapes = {f"self_attn.{p}_proj": (H, H) for p in "qkvo"} | ({} if dense else {"mlp.gate": (experts, H)})
    for e in range(1 if dense else experts):
        where = mlp.format(e)
        shapes |= {f"{where}gate_proj": (wide, H), f"{where}up_proj": (wide, H), f"{where}down_proj": (H, wide)}
    tensors = {f"model.layers.0.{n}.weight": torch.randn(s, dtype=torch.bfloat16) * 0.02 for n, s in shapes.items()}
    for norm, n in (("input_layernorm", H), ("post_attention_layernorm", H)):
        tensors[f"model.layers.0.{norm}.weight"] = torch.ones(n, dtype=torch.bfloat16)
    for norm in ("q_norm", "k_norm"):
        tensors[f"model.layers.0.self_attn.{norm}.weight"] = torch.ones(128, dtype=torch.bfloat16)
    for n in ("model.embed_tokens", "lm_head"):
        tensors[f"{n}.weight"] = torch.randn(VOCAB, H, dtype=torch.bfloat16) * 0.02
    tensors["model.norm.weight"] = torch.ones(H, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def seconds(folder: Path, out: Path, form: str, times: int, *, verify: bool) -> float:
    """Return the least time of some runs."""
    found = []
    for _ in range(times):
        start = time.process_time()
        llmq.quantize(folder, out, method="rtn", format=form, verify=verify, overwrite=True, warn=str)
        found.append(time.process_time() - start)
    return min(found)


def main() -> int:
    """Make, quantize, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=1000)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--format", default="gptq")
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--limit", type=float, default=1.3)
    args = parser.parse_args()
    most = 0.0
    with tempfile.TemporaryDirectory() as room:
        folders = {dense: Path(room, "dense" if dense else "experts") for dense in (True, False)}
        for dense, folder in folders.items():
            make(folder, args.experts, args.width, args.hidden, dense=dense)
        for verify in (False, True):
            took = {
                dense: seconds(folder, Path(room, "out"), args.format, args.times, verify=verify)
                for dense, folder in folders.items()
            }
            most = max(most, took[False] / took[True])
            print(
                f"{args.experts * 3:,} linears of experts {took[False]:.2f} s, 3 of the same weights {took[True]:.2f} "
                f"s, {'with' if verify else 'without'} the check: {took[False] / took[True]:.2f}"
            )
    return int(most > args.limit)


if __name__ == "__main__":
    raise SystemExit(main())
