"""Large models in little memory: random checkpoints of real shapes, quantized by a child process under a cap.

    python scripts/bench_scale.py                        all parts: 14 GB of disk at once, hours
    python scripts/bench_scale.py 1b-gptq --tokens 8192  one part, a quarter of the tokens
    python scripts/bench_scale.py 7b-gptq --blocks 1 --tokens 262144

For each part: the peak of the child (VmHWM) beside the cap and beside what was predicted from headers, CPU seconds
beside those that a probe predicts, seconds a block, and whether they stay the same. Blocks that are not run are
extrapolated, and said to be. Weights are random, bfloat16, written shard by shard; text and tokenizer are made up. All
that is made is removed. CPU seconds are those of a user's whole process; on a busy machine they are the fair figure.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import _measure as measure
import torch
from _tiny import make_prose, make_tokenizer
from safetensors.torch import save_file
from transformers import AutoConfig

from llmq.options import memory_size
from llmq.pipeline.estimate import estimate
from llmq.pipeline.memory import alive_under, terms
from llmq.pipeline.plan import outline
from llmq.pipeline.rates import probe
from llmq.recipe import Recipe

SEQ_LEN = 2048
_LLAMA = {"model_type": "llama", "max_position_embeddings": SEQ_LEN, "architectures": ["LlamaForCausalLM"]}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": _LLAMA | {
        "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "7b": _LLAMA | {
        "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
        "head_dim": 128, "vocab_size": 32000, "tie_word_embeddings": False,
    },
    "moe": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": False,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True,
        "max_position_embeddings": SEQ_LEN, "architectures": ["Qwen3MoeForCausalLM"],
    },
}  # fmt: skip


class Part(NamedTuple):
    """A run: the shape, how many of its blocks there are and in the real model, the method, the cap."""

    shape: str
    blocks: int
    of: int
    method: str
    cap: str | None
    range: str = "minmax"


PARTS = {
    "1b-gptq": Part("1b", 2, 16, "gptq", None),
    "1b-balanced": Part("1b", 2, 16, "qep,gptq,descent", None),
    "7b-rtn": Part("7b", 32, 32, "rtn", "6GiB"),
    "7b-gptq": Part("7b", 2, 32, "gptq", "6GiB"),
    "7b-balanced": Part("7b", 2, 32, "qep,gptq,descent", "10GiB", "mse"),
    "moe-rtn": Part("moe", 2, 48, "rtn", "6GiB"),
    "moe-gptq": Part("moe", 2, 48, "gptq", "8GiB"),
}


def tensors(shape: dict[str, Any], blocks: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Yield the tensors of a checkpoint, a shard at a time, by name and shape."""
    H, V = shape["hidden_size"], shape["vocab_size"]
    q, kv = (shape[k] * shape["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    outside = {"model.embed_tokens.weight": (V, H), "model.norm.weight": (H,)}
    yield outside if shape["tie_word_embeddings"] else outside | {"lm_head.weight": (V, H)}
    attention = {"q_proj": (q, H), "k_proj": (kv, H), "v_proj": (kv, H), "o_proj": (H, q)}
    if shape["model_type"] == "qwen3_moe":
        attention |= {"q_norm": (shape["head_dim"],), "k_norm": (shape["head_dim"],)}
    for i in range(blocks):
        part: dict[str, tuple[int, ...]] = {f"self_attn.{n}.weight": s for n, s in attention.items()}
        part |= {f"{n}.weight": (H,) for n in ("input_layernorm", "post_attention_layernorm")}
        for e in range(shape.get("num_experts", 0)):
            part |= _gated(f"mlp.experts.{e}", H, shape["moe_intermediate_size"])
        if "num_experts" in shape:
            part["mlp.gate.weight"] = (shape["num_experts"], H)
        else:
            part |= _gated("mlp", H, shape["intermediate_size"])
        yield {f"model.layers.{i}.{n}": s for n, s in part.items()}


def _gated(name: str, H: int, inner: int) -> dict[str, tuple[int, ...]]:
    both = {f"{name}.{n}.weight": (inner, H) for n in ("gate_proj", "up_proj")}
    return both | {f"{name}.down_proj.weight": (H, inner)}


def size(part: Part) -> int:
    """Return the bytes of a part's checkpoint."""
    return sum(2 * torch.Size(s).numel() for shard in tensors(SHAPES[part.shape], part.blocks) for s in shard.values())


def make(folder: Path, part: Part) -> None:
    """Write a random checkpoint, one shard a block."""
    shape = SHAPES[part.shape]
    folder.mkdir(parents=True)
    rest = {k: v for k, v in shape.items() if k not in ("model_type", "architectures")}
    config = AutoConfig.for_model(shape["model_type"], num_hidden_layers=part.blocks, dtype="bfloat16", **rest)
    config.architectures = shape["architectures"]
    config.save_pretrained(folder)
    make_tokenizer(bos=True).save_pretrained(folder)
    random = torch.Generator().manual_seed(0)
    weight_map = {}
    for number, shard in enumerate(tensors(shape, part.blocks)):
        file = f"model-{number + 1:05d}-of-{part.blocks + 1:05d}.safetensors"
        drawn = {n: _draw(s, random) for n, s in shard.items()}
        save_file(drawn, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _draw(shape: tuple[int, ...], random: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, shape[1] ** -0.5, generator=random)


def seconds(log: Path) -> dict[str, float]:
    """Return how long each part of the run took, by what it was."""
    events = [json.loads(line) for line in log.read_text().splitlines()]
    begun = [(e["what"], e["time"]) for e in events if e["event"] == "begin"] + [("", events[-1]["time"])]
    return {what: begun[i + 1][1] - at for i, (what, at) in enumerate(begun[:-1])}


def bench(name: str, part: Part, work: Path, tokens: int) -> None:
    """Run a part and print what it took."""
    need, free = 2 * size(part), shutil.disk_usage(work).free
    if need > free:
        sys.exit(f"{name} needs {need / 1e9:.1f} GB in {work}, {free / 1e9:.1f} GB are free; make room, or say --dir")
    model, out, log, text = (work / n for n in ("model", "out", "log", "text.txt"))
    make(model, part)
    text.write_text(make_prose(2 * tokens))
    how: dict[str, Any] = {"method": part.method, "range": part.range}
    if part.method != "rtn":
        how |= {"calib": str(text), "samples": max(2, tokens // SEQ_LEN), "seq_len": SEQ_LEN}
    plan = outline(str(model), Recipe(**how))
    plan.alive = alive = alive_under(plan, None if part.cap is None else memory_size("--max-memory", part.cap))
    worst = terms(plan, alive).host
    ahead = estimate(plan, probe(plan, work, clock=time.process_time)).total
    options = [word for k, v in how.items() for word in (f"--{k.replace('_', '-')}", v)]
    capped = [] if part.cap is None else ["--max-memory", part.cap]
    taken = measure.llmq("quantize", model, out, *options, *capped, "--log-json", log)
    shutil.rmtree(model)
    shutil.rmtree(out)
    took = seconds(log)
    blocks = [s for what, s in took.items() if re.fullmatch(r"block \d+", what)]
    print(f"{name}: {part.method}, {part.blocks} of {part.of} blocks, {tokens if 'calib' in how else 0} tokens")
    cap = "no cap" if part.cap is None else f"cap {memory_size('', part.cap) / 1e9:.2f} GB"
    ratio = worst.total() / taken.peak_bytes
    print(f"  peak {taken.peak_bytes / 1e9:.2f} GB, {cap}; predicted {worst.total() / 1e9:.2f} GB, {ratio:.2f} times")
    print(f"  at {worst.name}, {worst.at}: " + ", ".join(f"{n} {b / 1e9:.2f}" for n, b in worst.host.items()))
    flat = f"the last {blocks[-1] / blocks[0]:.2f} times the first"
    print(f"  {alive} batches suspended; {sum(blocks) / len(blocks):.1f} s a block, {flat}; {taken.seconds:.0f} s,")
    rest = taken.seconds - sum(blocks)
    whole = rest + part.of * sum(blocks) / len(blocks)
    more = f", all {part.of} blocks about {whole / 60:.0f} min (extrapolated)" if part.of > part.blocks else ""
    told = f"predicted {ahead:.0f}, {ahead / taken.cpu_seconds:.2f} times"
    print(f"  {taken.cpu_seconds:.0f} CPU s, {told}{more}", flush=True)


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them by default")
    parser.add_argument("--tokens", type=int, default=16 * SEQ_LEN, help="of calibration")
    parser.add_argument("--blocks", type=int, help="how many blocks; by default as many as each part has")
    parser.add_argument("--dir", type=Path, help="where the checkpoints lie meanwhile")
    args = parser.parse_args()
    unknown = set(args.parts) - PARTS.keys()
    if unknown:
        parser.error(f"no part {', '.join(sorted(unknown))}")
    print(measure.machine())
    for name in args.parts or PARTS:
        with tempfile.TemporaryDirectory(dir=args.dir) as folder:
            part = PARTS[name]
            bench(name, part._replace(blocks=args.blocks or part.blocks), Path(folder), args.tokens)


if __name__ == "__main__":
    main()
