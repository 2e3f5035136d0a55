"""Decode and prefill of whole models on this machine's GPU: bfloat16 beside what llmq writes, batch 1. And solves.

    python scripts/bench_gpu.py [--out DIR] [--rounds 5] [--shape tinyllama] [--blocks 22] [--minutes 8]
    python scripts/bench_gpu.py --solves 7B 70B

With --solves, in place of models: GPTQ and one round of descent at the sites of a block, seconds and launches, with the
kernels and by torch. 70B needs room for some matrices of 28672 x 28672 float32, 3.3 GB each.

A random Llama of TinyLlama-1.1B's shape, or with `--shape 8B` blocks of Llama-3-8B's, rounded to nearest; every model
computes in bfloat16. Decode is timed eager, as `generate` runs it, and as one CUDA graph a step, as servers run it.
Models take turns, and a ratio is of neighbours in time. Then each is compiled as `llmq.load(compile=True)` does, and
`generate`, with each cache, and prefill are timed once more. What has not begun after `--minutes` is left out, and
named. Ends with an error where there is no GPU.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _measure as measure
import _solves
import _speed
import torch
from bench_runtime import TINYLLAMA, quantized, random_llama, weight_bytes
from torch import Tensor
from transformers import AutoModelForCausalLM, StaticCache

import llmq
from llmq.integrations.compiled import compile_for_generation
from llmq.runtime.linear import QuantLinear

SCHEMES = {
    "int4 g128": ("--bits", 4, "--group-size", 128, "--format", "compressed-tensors"),
    "int8 channel": ("--bits", 8, "--group-size", "channel", "--format", "compressed-tensors"),
    "nvfp4": ("--weights", "nvfp4", "--format", "compressed-tensors"),
    "mxfp4": ("--weights", "mxfp4", "--format", "compressed-tensors"),
    "fp8": ("--weights", "fp8", "--format", "compressed-tensors"),
    "fp8, fp8 inputs": ("--weights", "fp8", "--inputs", "fp8", "--format", "compressed-tensors"),
    "w8a8": ("--bits", 8, "--act-bits", 8, "--group-size", "channel", "--format", "compressed-tensors"),
}
SHAPES: dict[str, tuple[dict[str, Any], int]] = {  # the config, and how many blocks where nothing is said
    "tinyllama": (TINYLLAMA, 22),
    "8B": (
        TINYLLAMA
        | {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "max_position_embeddings": 8192,
        },
        8,
    ),
}
PREFILL = 2048
CACHES = {"generate tok/s": None, "with an int8 cache": 8, "with an int4 cache": 4}
COMPILED = (*CACHES, f"prefill {PREFILL} tok/s")
"""What is timed of a compiled model."""


def now() -> float:
    """Return the time once the GPU is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


class Step:
    """One step of greedy decode, captured in a CUDA graph after a prompt."""

    @torch.inference_mode()
    def __init__(self, model: Any, ids: Tensor, steps: int) -> None:
        cache = StaticCache(config=model.config, max_cache_len=_speed.PROMPT + steps + 4)
        self.kept = cache  # the graph reads and writes it, and does not hold it
        self.token = model(ids[:, : _speed.PROMPT], past_key_values=cache).logits[:, -1:].argmax(-1)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # tunes the kernels, and sets libraries up
                self._run(model, cache)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run(model, cache)

    def _run(self, model: Any, cache: Any) -> None:
        self.token.copy_(model(self.token, past_key_values=cache).logits[:, -1:].argmax(-1))

    def rate(self, new: int) -> float:
        """Return the tokens per second of `new` steps."""
        began = now()
        for _ in range(new):
            self.graph.replay()
        return new / (now() - began)


def models(out: Path, shape: str, blocks: int, only: list[str]) -> dict[str, Any]:
    """Return the models by name, all on the GPU."""
    source = random_llama(out / f"random-{shape.lower()}-{blocks}", blocks, SHAPES[shape][0])
    found: dict[str, Any] = {
        "bfloat16": AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).cuda().eval()
    }
    for name, options in SCHEMES.items():
        if name not in only:
            continue
        folder = quantized(out / f"{source.name}-{name.replace(', ', '-').replace(' ', '-')}", source, *options)
        found[name] = llmq.load(folder, dtype=torch.bfloat16, device="cuda")
    return found


def measured(name: str, model: Any, ids: Tensor, new: int, rounds: int) -> dict[str, Callable[[], float]]:
    """Return what is timed of a model; a step that cannot be captured is told and left out."""
    found = {
        "decode": lambda: _speed.decode(model, ids, new, now),
        "prefill": lambda: _speed.prefill(model, ids, now),
    }
    try:
        step = Step(model, ids, new * (rounds + 1))
    except RuntimeError as e:
        print(f"{name}: no CUDA graph of a step: {str(e).splitlines()[0]}")
        return found
    return found | {"graph": lambda: step.rate(new)}


@torch.inference_mode()
def compiled(model: Any, ids: Tensor, new: int, rounds: int) -> dict[str, float]:
    """Return tokens per second of a model that is compiled now: decode by `generate` with each cache, and prefill."""
    compile_for_generation(model)
    prompt, room = ids[:, : _speed.PROMPT], _speed.PROMPT + new + 1

    def seconds(tokens: int, cache: Any) -> float:
        given = {"past_key_values": cache, "cache_implementation": None, "do_sample": False}
        cache.reset()  # and not another one, whose place would be recorded anew
        began = now()
        model.generate(prompt, max_new_tokens=tokens, min_new_tokens=tokens, **given)
        return now() - began

    found = {}
    for what, bits in CACHES.items():
        cache: Any = StaticCache(model.config, room)
        if bits is not None:
            cache = llmq.QuantizedCache(model.config, bits, max_cache_len=room)
        for tokens in (new + 1, 1):  # compiles, tunes, records
            seconds(tokens, cache)
        found[what] = statistics.median(new / (seconds(new + 1, cache) - seconds(1, cache)) for _ in range(rounds))
    prefill = [_speed.prefill(model, ids, now) for _ in range(rounds + 1)][1:]
    return found | {COMPILED[-1]: statistics.median(prefill)}


def print_compiled(found: dict[str, Any], ids: Tensor, new: int, rounds: int, end: float) -> None:
    """Print what the models do compiled, and how that is to bfloat16's."""
    print(f"\n| compiled | {' | '.join(COMPILED)} |\n{'|---' * (1 + len(COMPILED))}|")
    base: dict[str, float] = {}
    for name, model in found.items():
        if time.monotonic() > end:
            print(f"{name}: no time left to compile it")
            continue
        speed = compiled(model, ids, new, rounds)
        base = base or speed
        cells = [f"{speed[what]:.1f} ({speed[what] / base[what]:.2f}x)" for what in COMPILED]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        torch._dynamo.reset()


def main() -> None:
    """Time all models in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", choices=SHAPES, default="tinyllama")
    parser.add_argument("--blocks", type=int, help="of the shape [22 of tinyllama, 8 of 8B]")
    parser.add_argument("--only", nargs="+", choices=SCHEMES, default=list(SCHEMES), metavar="SCHEME")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing further after so many")
    parser.add_argument("--new", type=int, default=_speed.NEW)
    parser.add_argument("--solves", nargs="+", choices=_solves.BLOCKS, default=[], help="time solves, not models")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_gpu.py needs a GPU, and torch sees none here")
    print(f"{torch.cuda.get_device_name()}; {measure.machine()}")
    if args.solves:
        print("| site | step | s, kernels | launches | s, torch | launches |\n|---|---|---|---|---|---|")
        for line in (row for block in args.solves for row in _solves.timed(block)):
            print(line, flush=True)
        return
    end = time.monotonic() + 60 * args.minutes
    found = models(args.out, args.shape, args.blocks or SHAPES[args.shape][1], args.only)
    ids = torch.randint(3, 32000, (1, PREFILL), generator=torch.Generator().manual_seed(0)).cuda()
    runs = {name: measured(name, model, ids, args.new, args.rounds) for name, model in found.items()}
    speed: dict[tuple[str, str], list[float]] = {}
    for turn in range(args.rounds + 1):
        if time.monotonic() > end and turn > 1:
            print(f"no time left for rounds from {turn} on")
            break
        for name, each in runs.items():
            for what, run in each.items():
                value = run()
                speed.setdefault((name, what), []).extend([value] if turn else [])  # the first turn warms up
    print("| model | back-ends | decode tok/s, eager | as a graph | prefill 2048 tok/s | linears |")
    print(f"{'|---' * 6}|")
    for name, model in found.items():
        used = sorted({m.backend for m in model.modules() if isinstance(m, QuantLinear)})
        cells = [_cell(speed, name, what) for what in ("decode", "graph", "prefill")]
        packed, bf16, *_ = weight_bytes(model)
        print(f"| {name} | {', '.join(used)} | {' | '.join(cells)} | {packed / bf16 if used else 1:.3f} |")
    del runs  # graphs, and the caches that they read
    print_compiled(found, ids, args.new, args.rounds, end)


def _cell(speed: dict[tuple[str, str], list[float]], name: str, what: str) -> str:
    values, base = speed.get((name, what)), speed.get(("bfloat16", what))
    if not values:
        return ""
    ratio = statistics.median(a / b for a, b in zip(values, base, strict=True)) if base else 0
    return f"{statistics.median(values):.1f} ({ratio:.2f}x)"


if __name__ == "__main__":
    main()
