"""Peak memory against depth: a random Llama of TinyLlama-1.1B's shape with 6 and with 22 blocks, GPTQ.

    python scripts/bench_memory.py --calib FILE --tokenizer DIR [--out DIR] [--blocks 6 22]

DIR is any checkpoint with a tokenizer of at most 32,000 entries or whose ids are folded into that range. Weights are
random, bfloat16, made and dropped here (2.2 GB at 22 blocks). Prints the ratio of the two peaks.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import _measure as measure
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4,
    "head_dim": 64, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip


def make(folder: Path, blocks: int, tokenizer: Path) -> None:
    """Write a random checkpoint, one shard a block, so that making it needs little memory either."""
    folder.mkdir(parents=True)
    vocab = max(32000, len(AutoTokenizer.from_pretrained(tokenizer)))
    config = LlamaConfig(vocab_size=vocab, num_hidden_layers=blocks, dtype="bfloat16", **SHAPE)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    random = torch.Generator().manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return (torch.randn(rows, columns, generator=random) * columns**-0.5).bfloat16()

    H, I, kv = 2048, 5632, 256  # noqa: E741
    shapes = {"self_attn.q_proj": (H, H), "self_attn.k_proj": (kv, H), "self_attn.v_proj": (kv, H)}
    shapes |= {"self_attn.o_proj": (H, H), "mlp.gate_proj": (I, H), "mlp.up_proj": (I, H), "mlp.down_proj": (H, I)}
    weight_map = {}
    for i in range(-1, blocks):
        if i < 0:
            part = {f"{n}.weight": matrix(vocab, H) for n in ("model.embed_tokens", "lm_head")}
            part["model.norm.weight"] = torch.ones(H, dtype=torch.bfloat16)
        else:
            part = {f"model.layers.{i}.{n}.weight": matrix(*s) for n, s in shapes.items()}
            for norm in ("input_layernorm", "post_attention_layernorm"):
                part[f"model.layers.{i}.{norm}.weight"] = torch.ones(H, dtype=torch.bfloat16)
        file = f"model-{i + 2:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def main() -> None:
    """Make, quantize, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--tokenizer", required=True, type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--blocks", nargs="+", type=int, default=[6, 22])
    parser.add_argument("--dtype", default="auto")
    args = parser.parse_args()
    peaks = {}
    print(f"GPTQ 4-bit group 128, 32 x 512 tokens; {measure.machine()}")
    for blocks in args.blocks:
        model, out = args.out / f"random-{blocks}", args.out / f"random-{blocks}-int4"
        make(model, blocks, args.tokenizer)
        options = ("--method", "gptq", "--calib", args.calib, "--samples", 32, "--seq-len", 512, "--dtype", args.dtype)
        taken = measure.llmq("quantize", model, out, *options)
        peaks[blocks] = taken.peak_bytes
        each = taken.seconds / blocks
        print(f"{blocks:3d} blocks: peak {taken.peak_bytes / 1e9:.2f} GB, {taken.seconds:.0f} s, {each:.1f} s a block")
        shutil.rmtree(model)
        shutil.rmtree(out)
    first, last = min(args.blocks), max(args.blocks)
    print(f"peak at {last} blocks / peak at {first}: {peaks[last] / peaks[first]:.3f}")


if __name__ == "__main__":
    main()
