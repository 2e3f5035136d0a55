"""What `llmq plan` says of models that are not here, on machines that are not here: the table of docs/scale.md.

    python scripts/predict.py                    # Llama 8B and 70B, Qwen3 235B, DeepSeek 671B on 1, 8 and 64 H100s
    python scripts/predict.py --models llama-8b --devices 1 2 4 --like a100 --quality fast

A model is its published config.json beside files of headers whose weights are a hole: no weight is there, or is read.
All of it is arithmetic, by the formulas of llmq/pipeline/operations.py and data sheets (llmq/pipeline/machines.py).
"""

import argparse
import json
import os
import struct
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import llmq
from llmq.model.experts import unfuse
from llmq.pipeline.estimate import Estimate
from llmq.show import span

LLAMA = {
    "model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "dtype": "bfloat16",
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}  # fmt: skip
MODELS = {
    "llama-8b": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "llama-70b": LLAMA | {
        "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "qwen3-235b-a22b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288,
        "moe_intermediate_size": 1536, "num_hidden_layers": 94, "num_attention_heads": 64, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
        "norm_topk_prob": True, "tie_word_embeddings": False, "dtype": "bfloat16", "max_position_embeddings": 40960,
    },
    "deepseek-671b": {
        "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256, "num_experts_per_tok": 8,
        "n_group": 8, "topk_group": 4, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 3, "tie_word_embeddings": False,
        "dtype": "bfloat16", "max_position_embeddings": 163840,
    },
}  # fmt: skip
_SHARD = 200 * 10**9


def hollow(folder: Path, config: dict) -> None:
    """Write a checkpoint of a config whose weights are a hole in its files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    kind = {k: v for k, v in config.items() if k != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **kind))
    unfuse(model)
    state = model.state_dict()
    shards: list[tuple[dict, int]] = [({}, 0)]
    for name, tensor in state.items():
        header, at = shards[-1]
        size = 2 * tensor.numel()
        if header and at + size > _SHARD:
            header, at = {}, 0
            shards.append((header, at))
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        shards[-1] = header, at + size
    where = {}
    for i, (header, size) in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        text = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(folder / file, 8 + len(text) + size)
        where |= dict.fromkeys(header, file)
    index = {"metadata": {"total_size": sum(size for _, size in shards)}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--like", default="h100")
    parser.add_argument("--quality", default="balanced")
    args = parser.parse_args()
    print(f"Arithmetic for {args.like}, {args.quality}, 4 bits, group 128, 128 x 2048 tokens; nothing was run.\n")
    head = ["model", "weights", "OUT", "host memory", "disk", *(f"{n} x {args.like}" for n in args.devices)]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            hollow(Path(folder, name), MODELS[name])
            found = [of(Path(folder, name), args, n) for n in args.devices]
            cells = [name, *sizes(next(f for f in found if f is not None))]
            cells += ["does not fit" if f is None else shown(f) for f in found]
            print(f"| {' | '.join(cells)} |", flush=True)


def of(folder: Path, args: argparse.Namespace, devices: int) -> Estimate | None:
    """Return the plan of a model on so many machines, None where one of them cannot hold it."""
    try:
        return llmq.plan(folder, quality=args.quality, device_like=args.like, devices=devices)
    except llmq.LlmqError as e:
        print(f"{folder.name}, {devices}: {e}", file=sys.stderr)
        return None


def shown(found: Estimate) -> str:
    """Return the memory of one device, the time, and what takes most of both."""
    device, most = found.memory["device"], max(found.seconds, key=found.seconds.__getitem__)
    term = max(device["terms"], key=device["terms"].__getitem__)
    return f"{span(found.total)} (most: {most}), {device['bytes'] / 1e9:,.0f} GB (most: {term})"


def sizes(found: Estimate) -> list[str]:
    """Return what does not depend on the number of machines."""
    host = found.memory["host"]["bytes"]
    return [f"{n / 1e9:,.0f} GB" for n in (found.float_bytes, found.bytes, host, sum(found.disk.values()))]


if __name__ == "__main__":
    main()
