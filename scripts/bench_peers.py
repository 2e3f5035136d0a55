"""The rivals and llmq on one model and the same calibration tokens, every file scored by llmq's decoder.

    python scripts/bench_peers.py MODEL --envs DIR --calib FILE --text FILE [--out DIR] [--only NAME ...]

Run through scripts/bench_peers.sh, which makes the environments DIR/{gptqmodel,autoround,llmcompressor} first. Each row
quantizes in a process of its own, checks that the file holds the grid asked for, scores it in float32, and is kept in
OUT/peers.json, so that a stopped run goes on where it was. Group 64, symmetric. GPTQModel compiles kernels at its first
use: warm it up once before its seconds mean anything. On a machine that is busy otherwise, compare CPU seconds, of runs
with OMP_NUM_THREADS=1: threads that wait for each other burn them. On a processor without bfloat16 GPTQModel and
llm-compressor compute in it all the same, several times slower than with `--dtype float32`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from math import prod
from pathlib import Path
from typing import Any

import _measure as measure
import torch
from _rows import Row, Rows, show, show_markdown

from llmq.checkpoint import Source
from llmq.loading import load
from llmq.runtime.linear import QuantLinear

GROUP = 64
AUTOROUND_LIGHT = ("--iters", 50, "--lr", 5e-3, "--batch-size", 4)  # its recipe `light`, with smaller steps
ROWS: dict[str, tuple[str, int, tuple[object, ...]]] = {
    "gptqmodel 4": ("gptqmodel", 4, ()),
    "gptqmodel 4 mse": ("gptqmodel", 4, ("--mse", 2.4)),
    "gptqmodel 4 gptaq": ("gptqmodel", 4, ("--gptaq", 0.25)),
    "gptqmodel 4 mse gptaq": ("gptqmodel", 4, ("--mse", 2.4, "--gptaq", 0.25)),
    "gptqmodel 4 mse gptaq desc_act": ("gptqmodel", 4, ("--mse", 2.4, "--gptaq", 0.25, "--desc-act")),
    "autoround 4 x50": ("autoround", 4, ("--iters", 50, "--batch-size", 4)),
    "autoround 4 light": ("autoround", 4, AUTOROUND_LIGHT),
    "gptqmodel 3": ("gptqmodel", 3, ()),
    "gptqmodel 3 mse": ("gptqmodel", 3, ("--mse", 2.4)),
    "gptqmodel 3 mse gptaq": ("gptqmodel", 3, ("--mse", 2.4, "--gptaq", 0.25)),
    "autoround 3 x50": ("autoround", 3, ("--iters", 50, "--batch-size", 4)),
    "autoround 2 x50": ("autoround", 2, ("--iters", 50, "--batch-size", 4)),
    "llmcompressor 4 gptq": ("llmcompressor", 4, ("--method", "gptq")),
    "llmcompressor 4 gptq mse": ("llmcompressor", 4, ("--method", "gptq", "--observer", "memoryless_mse")),
    "llmcompressor 4 awq": ("llmcompressor", 4, ("--method", "awq")),
    "gptqmodel 2 mse": ("gptqmodel", 2, ("--mse", 2.4)),
    "autoround 2 x200": ("autoround", 2, ("--iters", 200, "--batch-size", 4)),
    "llmq 4 rtn": ("llmq", 4, ("--method", "rtn")),
    "llmq 4 gptq": ("llmq", 4, ("--method", "gptq")),
    **{f"llmq {b} {q}": ("llmq", b, ("--quality", q)) for b in (4, 3, 2) for q in ("fast", "balanced", "best")},
}


def measure_row(name: str, args: argparse.Namespace) -> Row:
    """Quantize, check, score, and drop the checkpoint. What quantizing took outlives a stop before the score."""
    tool, bits, options = ROWS[name]
    out = args.out / name.replace(" ", "-")
    taken = out.with_suffix(".json")
    if not taken.exists():
        shutil.rmtree(out, ignore_errors=True)
        row = quantize(tool, out, (*options, "--bits", bits, "--group-size", GROUP, "--dtype", args.dtype), args)
        taken.write_text(json.dumps(row))
    check_grid(out, bits)
    figures = measure.scores(out, args.model, args.text, args.windows)
    row = {
        "tool": tool,
        "bits": bits,
        **json.loads(taken.read_text()),
        **sizes(out, args.model),
        **{k: figures[k] for k in ("perplexity", "baseline_perplexity", "kl_mean", "kl_standard_error", "top1")},
        "windows": args.windows,
    }
    if not args.keep:
        taken.unlink()
        shutil.rmtree(out)
    return row


def quantize(tool: str, out: Path, options: tuple[object, ...], args: argparse.Namespace) -> Row:
    """Run a tool, and return what it took and says of itself."""
    row: Row = {"command": " ".join(str(o) for o in options), "threads": torch.get_num_threads()}
    row["samples"], row["seq_len"] = args.samples, args.seq_len
    if tool == "llmq":
        calib = ("--calib", args.calib, "--samples", args.samples, "--seq-len", args.seq_len)
        ran = measure.llmq("quantize", args.model, out, *calib, *options)
        row |= {"versions": {"torch": str(torch.__version__)}}
    else:
        python, driver = args.envs / tool / "bin/python", Path(__file__).with_name(f"peer_{tool}.py")
        tokens = out.with_suffix(".tokens.json")
        measure.write_tokens(tokens, args.model, args.calib, args.samples, args.seq_len)
        ran = measure.run(python, driver, args.model, out, "--tokens", tokens, *options)
        tokens.unlink()
        row["driver"] = json.loads(next(s for s in reversed(ran.output.splitlines()) if s.startswith("{")))
        row["versions"] = row["driver"].pop("versions")
    return row | {"seconds": ran.seconds, "cpu_seconds": ran.cpu_seconds, "peak_bytes": ran.peak_bytes}


def check_grid(folder: Path, bits: int) -> None:
    """Exit unless every linear of every block lies on a symmetric grid of these bits in groups of GROUP columns."""
    model: Any = load(folder, device="cpu")
    found = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    linears = [n for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear | QuantLinear)]
    if len(found) != len(linears):
        sys.exit(f"{folder}: {len(found)} of {len(linears)} linears are quantized")
    for name, module in found.items():
        q = module.unpack()
        symmetric = bool((q.params.zero == 2 ** (bits - 1)).all())
        G, K = q.params.scale.shape[1], q.codes.shape[1]
        if (q.grid.bits, K // G, symmetric) != (bits, GROUP, True):
            sys.exit(f"{folder}: {name} is {q.grid.bits} bits, group {K // G}, symmetric {symmetric}")


def sizes(folder: Path, model: Path) -> dict[str, float]:
    """Return the bits per quantized weight on disk, scales, zeros and orders counted, and the bytes of all tensors."""
    source, packed = Source(model), Source(folder)
    shapes = {n: shape for n, (_, shape) in source.headers().items()}
    linears = {n.removesuffix(".weight") for n in source.names() if f"{n}_packed" in packed}
    linears |= {n.removesuffix(".weight") for n in source.names() if f"{n.removesuffix('weight')}qweight" in packed}
    weights = sum(prod(shapes[f"{n}.weight"]) for n in linears)
    stored = sum(size for n, size in packed.sizes().items() if n.rpartition(".")[0] in linears and ".bias" not in n)
    return {"bits_per_weight": round(8 * stored / weights, 4), "bytes": packed.bytes()}


def main() -> None:
    """Measure the rows that are not there yet, and print them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--envs", type=Path, required=True, help="folder of the rivals' environments")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--dtype", default="auto", help="of activations, for every tool; auto is each one's own choice")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints in OUT")
    parser.add_argument("--markdown", action="store_true", help="measure nothing: print what is there as Markdown")
    args = parser.parse_args()
    rows = Rows(args.out / "peers.json")
    if args.markdown:
        show_markdown({n: r for n, r in ((n, rows.read().get(n)) for n in ROWS) if r})
        return
    failed = rows.fill(args.only, lambda name: measure_row(name, args), show)
    kept = rows.read()
    show(kept)
    for r in list(kept.values())[:1]:
        print(f"float: {r['baseline_perplexity']:.3f}")
    sys.exit(f"{failed} rows failed" if failed else 0)


if __name__ == "__main__":
    main()
