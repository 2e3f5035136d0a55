"""What llmq does on this machine's GPU, beside the same on its CPU: quantization, the loaded model, its cache.

    python scripts/check_gpu.py MODEL --calib FILE [--out DIR] [--only NAME ...] [--tokens 64]

First, whether the kernels that quantize give what the CPU's loops give. Then for each way to quantize: seconds on both,
the share of weights that both rounded alike (sums of floats in another order move some, and error feedback moves others
after them), how far the logits of either checkpoint lie from the float model's, and how far the GPU's kernels lie from
the exact back-end on the CPU. Then greedy tokens per second with every cache, and how many of them are those of the
float cache. Ends with an error where kernels are not close, or where there is no GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import _measure as measure
import _solves
import torch
from torch import Tensor
from transformers import DynamicCache

import llmq
from llmq.integrations.cache import packed_attention
from llmq.runtime.linear import QuantLinear

FOUR = ("--bits", 4, "--group-size", 64)
W8A8 = ("--bits", 8, "--act-bits", 8, "--group-size", "channel", "--format", "compressed-tensors")
CT = ("--format", "compressed-tensors")
RECIPES: dict[str, tuple[object, ...]] = {
    "rtn": (*FOUR, "--method", "rtn"),
    "4 bits fast": (*FOUR, "--quality", "fast"),
    "4 bits balanced": (*FOUR, "--quality", "balanced"),
    "4 bits balanced asym": (*FOUR, "--quality", "balanced", "--asym"),
    "4 bits best": (*FOUR, "--quality", "best"),
    "2 bits best": ("--bits", 2, "--group-size", 64, "--quality", "best"),
    "awq": (*FOUR, "--method", "awq,rtn", "--format", "awq"),
    "rotate": (*FOUR, "--method", "rotate,gptq"),
    "W8A8": W8A8,
    "W8A8 static": (*W8A8, "--act", "tensor"),
    "NVFP4": ("--weights", "nvfp4", *CT),
    "MXFP4": ("--weights", "mxfp4", *CT),
    "FP8": ("--weights", "fp8", "--inputs", "fp8", *CT),
    "FP8 blocks": ("--weights", "fp8:group=128x128", *CT),
}
LEAST_DB = 25  # between kernels in bfloat16, with int8 activations too, and the exact back-end, through every layer
LOSS = 0.01  # by how much the loss of a solve may differ between devices, whose products are summed in other orders
CACHES: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8},
    "int4, scale per token": {"bits": 4, "keys": "token"},
    "int4, keys per channel": {"bits": 4},
}


def decibel(found: Tensor, wanted: Tensor) -> float:
    """Return the signal-to-noise ratio of `found`."""
    noise = (found.double() - wanted.double()).square().sum().item()
    return 10 * math.log10(wanted.double().square().sum().item() / noise) if noise else math.inf


def linears(model: torch.nn.Module) -> dict[str, QuantLinear]:
    """Return the quantized linears of a model by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}


def alike(gpu: Path, cpu: Path) -> float:
    """Return the share of equal codes of two checkpoints."""
    equal = total = 0
    ours, theirs = (linears(llmq.load(f, device="cpu", backend="reference")) for f in (gpu, cpu))
    for name, linear in ours.items():
        a, b = linear.unpack().codes, theirs[name].unpack().codes
        equal += int((a == b).sum())
        total += a.numel()
    return equal / total


@torch.inference_mode()
def logits(checkpoint: Path, ids: Tensor, device: str = "cpu", backend: str = "reference") -> tuple[Tensor, str]:
    """Return the logits of a checkpoint, in bfloat16 on a GPU and in float32 on the CPU, and its back-ends."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: Any = llmq.load(checkpoint, dtype=dtype, device=device, backend=backend)
    used = ", ".join(sorted({m.backend for m in linears(model).values()}))
    return model(ids.to(device)).logits[0].cpu().float(), used


@torch.inference_mode()
def decode(model: Any, ids: Tensor, cache: Any, new: int) -> tuple[list[int], float]:
    """Return greedy tokens after `ids`, and how many a second."""
    token = model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)
    found, began = [token], 0.0
    for i in range(new):
        if i == new // 4:  # what comes first compiles kernels
            torch.cuda.synchronize()
            began = time.perf_counter()
        token = model(token, past_key_values=cache).logits[:, -1:].argmax(-1)
        found.append(token)
    torch.cuda.synchronize()
    return torch.cat(found, 1)[0].tolist(), (new - new // 4) / (time.perf_counter() - began)


def caches(checkpoint: Path, ids: Tensor, new: int) -> Iterator[str]:
    """Yield a line for each cache."""
    model: Any = llmq.load(checkpoint, dtype=torch.bfloat16, device="cuda")
    wanted, rate = decode(model, ids.cuda(), DynamicCache(config=model.config), new)
    yield f"| float | {rate:.1f} | |"
    for name, options in CACHES.items():
        for packed in (True, False):
            with packed_attention(model) if packed else nullcontext():
                cache = llmq.QuantizedCache(model.config, **options)
                found, rate = decode(model, ids.cuda(), cache, new)
            same = next((i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b), len(wanted))
            yield f"| {name}{', packed attention' if packed else ''} | {rate:.1f} | {same} of {len(wanted)} |"


def recipe_row(name: str, args: argparse.Namespace, ids: Tensor, wanted: Tensor) -> tuple[str, float]:
    """Quantize on both devices; return a line of the table, and the dB of the GPU's kernels."""
    folders = {device: folder(args.out, name, device) for device in ("cuda", "cpu")}
    options = (*RECIPES[name], "--calib", args.calib, "--samples", args.samples, "--seq-len", 512)
    options += ("--dtype", "float32", "--overwrite")
    with ThreadPoolExecutor() as pool:
        jobs = {d: pool.submit(measure.llmq, "quantize", args.model, f, *options, "--device", d)
                for d, f in folders.items()}  # fmt: skip
        seconds = " | ".join(f"{job.result().seconds:.0f}" for job in jobs.values())
    exact = {d: logits(f, ids)[0] for d, f in folders.items()}
    found, used = logits(folders["cuda"], ids, "cuda", "auto")
    db = decibel(found, exact["cuda"])
    errors = ", ".join(f"{decibel(e, wanted):.1f}" for e in exact.values())
    equal = alike(*folders.values())
    return f"| {name} | {seconds} | {equal:.1%} | {errors} dB | {used} | {db:.1f} dB |", db


def solves() -> int:
    """Compare columns rounded on both devices; return how many comparisons failed."""
    alike = _solves.panels_alike("cuda")
    print(f"a panel of columns, rounded and walked: {'bit for bit' if alike else 'NOT'} as on the CPU")
    wrong = not alike
    for line, ratio in _solves.checked("cuda"):
        print(line)
        wrong += not abs(ratio - 1) < LOSS
    print(flush=True)
    return wrong


def folder(out: Path, name: str, device: str) -> Path:
    """Return where a recipe's checkpoint goes."""
    return out / f"{name.replace(' ', '-')}-{device}"


def main() -> None:
    """Quantize on both, compare, load, generate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="NAME")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="that each cache is asked for")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("check_gpu.py needs a GPU, and torch sees none here")
    print(f"{torch.cuda.get_device_name()}; {measure.machine()}\n")
    wrong = solves()
    config = llmq.load(args.model, device="cpu").config
    ids = torch.randint(3, config.vocab_size, (1, 200), generator=torch.Generator().manual_seed(0))
    wanted, _ = logits(args.model, ids)
    print("| recipe | s, GPU | s, CPU | equal codes | to float, GPU's, CPU's | back-ends | kernels to exact |")
    print(f"{'|---' * 7}|")
    for name in args.only:
        line, db = recipe_row(name, args, ids, wanted)
        wrong += not db >= LEAST_DB
        print(line, flush=True)
    print("\n| cache | tokens/s | as with the float cache |\n|---|---|---|")
    for line in caches(folder(args.out, args.only[-1], "cuda"), ids, args.tokens):
        print(line, flush=True)
    sys.exit(f"{wrong} solves or models are not as they should be" if wrong else 0)


if __name__ == "__main__":
    main()
