"""The rivals and llmq on one model and the same calibration tokens, every file scored by llmq's decoder.

    python scripts/bench_peers.py MODEL --envs DIR --calib FILE --text FILE [--out DIR] [--only NAME ...]
    python scripts/bench_peers.py MODEL --envs DIR --calib FILE --text FOLDER [--home FILE] ...

Run through scripts/bench_peers.sh, which makes the environments DIR/{gptqmodel,autoround,llmcompressor} first. Each row
quantizes in a process of its own, checks that the file holds the grid asked for, scores it in float32, and is kept in
OUT/peers.json, so that a stopped run goes on where it was; with a folder of texts each row is scored on every kind, in
OUT/kinds.json, where those of bench_accuracy.py lie too (_scored.py). Integers are symmetric, in groups of 64; small
floats are as their schemes have them. GPTQModel compiles kernels at its first use: warm it up once before its seconds
mean anything. On a machine that is busy otherwise, compare CPU seconds, of runs with OMP_NUM_THREADS=1: threads that
wait for each other burn them. On a processor without bfloat16 GPTQModel and llm-compressor compute in it all the same,
several times slower than with `--dtype float32`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from math import prod
from pathlib import Path
from typing import Any

import _measure as measure
import torch
from _rows import Row
from _scored import Scores, add_options

from llmq.checkpoint import Source
from llmq.loading import load
from llmq.runtime.linear import QuantLinear

GROUP = 64
AUTOROUND_LIGHT = ("--iters", 50, "--lr", 5e-3, "--batch-size", 4)  # its recipe `light`, with smaller steps
FLOATS = {"NVFP4A16": (16, 4.5), "MXFP4A16": (32, 4.25), "NVFP4": (16, 4.5), "MXFP4": (32, 4.25)}
"""The schemes of small floats as a rival names them: columns of a group, bits of a weight."""
OBSERVERS = {
    "minmax": "memoryless_minmax",
    "mse": "memoryless_mse",
    "imatrix": "imatrix_mse",
    "expanded mse": "nvfp4_expanded_mse",
    "expanded imatrix": "nvfp4_expanded_imatrix",
}  # others of llm-compressor differ in how they average over batches, of which a weight is one
ROWS: dict[str, tuple[str, int | str, tuple[object, ...]]] = {
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
    "autoround 3 light": ("autoround", 3, AUTOROUND_LIGHT),
    "autoround 3 x50": ("autoround", 3, ("--iters", 50, "--batch-size", 4)),
    "autoround 2 x50": ("autoround", 2, ("--iters", 50, "--batch-size", 4)),
    "llmcompressor 4 gptq": ("llmcompressor", 4, ("--method", "gptq")),
    "llmcompressor 4 gptq mse": ("llmcompressor", 4, ("--method", "gptq", "--observer", "memoryless_mse")),
    "llmcompressor 4 awq": ("llmcompressor", 4, ("--method", "awq")),
    "gptqmodel 2 mse": ("gptqmodel", 2, ("--mse", 2.4)),
    "autoround 2 x200": ("autoround", 2, ("--iters", 200, "--batch-size", 4)),
    "llmq 4 rtn": ("llmq", 4, ("--method", "rtn")),
    "llmq 4 gptq": ("llmq", 4, ("--method", "gptq")),
    **{
        f"llmcompressor {kind.lower()} {method} {name}": (
            "llmcompressor",
            kind,
            ("--scheme", kind, "--method", method, "--observer", observer),
        )
        for kind in ("NVFP4A16", "MXFP4A16")
        for method in ("rtn", "gptq")
        for name, observer in OBSERVERS.items()
        if kind == "NVFP4A16" or "nvfp4" not in observer
    },
    **{
        f"autoround {kind.lower()}a16 {name}": ("autoround", kind, ("--scheme", kind, "--format", "fake", *options))
        for kind in ("NVFP4", "MXFP4")
        for name, options in (("rtn", ("--iters", 0)), ("light", AUTOROUND_LIGHT), ("x200", ("--iters", 200)))
    },
    **{
        f"llmq {b} {q}": ("llmq", b, ("--quality", q, "--varied", 0))
        for b in (4, 3, 2)
        for q in ("fast", "balanced", "best")
    },
}


def measure_row(name: str, args: argparse.Namespace, scores: Scores) -> Row:
    """Quantize, check, score, and drop the checkpoint. What quantizing took outlives a stop before the score."""
    tool, bits, options = ROWS[name]
    out = args.out / name.replace(" ", "-")
    taken = out.with_suffix(".json")
    if not taken.exists():
        shutil.rmtree(out, ignore_errors=True)
        group = ("--bits", bits, "--group-size", GROUP) if isinstance(bits, int) else ()
        row = quantize(tool, out, (*options, *group, "--dtype", args.dtype), args)
        taken.write_text(json.dumps(row))
    check_grid(out, bits)
    row = {
        "tool": tool,
        "bits": bits,
        **json.loads(taken.read_text()),
        **sizes(out, args.model, bits),
        **scores.of(name, out),
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


def check_grid(folder: Path, grid: int | str) -> None:
    """Exit unless every linear of every block lies on the grid asked for.

    Integers: symmetric, of these bits, in groups of GROUP columns. Small floats: no more magnitudes than E2M1 has in a
    group, whether they are packed or the floats that the codes stand for.
    """
    model: Any = load(folder, device="cpu", dtype=torch.float32)
    linears = {n: m for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear | QuantLinear)}
    for name, module in linears.items():
        wrong = _of_floats(module, FLOATS[grid][0]) if isinstance(grid, str) else _of_integers(module, grid)
        if wrong:
            sys.exit(f"{folder}: {name} {wrong}")


def _of_integers(module: Any, bits: int) -> str:
    if not isinstance(module, QuantLinear):
        return "is not quantized"
    q = module.unpack()
    G, K, symmetric = q.params.scale.shape[1], q.codes.shape[1], bool((q.params.zero == 2 ** (bits - 1)).all())
    right = (q.grid.bits, K // G, symmetric) == (bits, GROUP, True)
    return "" if right else f"is {q.grid.bits} bits, group {K // G}, symmetric {symmetric}"


def _of_floats(module: Any, group: int) -> str:
    W = module.unpack().dequantize() if isinstance(module, QuantLinear) else module.weight
    sorted_NGg = W.detach().abs().unflatten(1, (-1, group)).sort(dim=-1).values
    most = int((sorted_NGg.diff(dim=-1) > 1e-6 * sorted_NGg[..., -1:]).sum(-1).max()) + 1
    return "" if most <= 8 else f"has {most} magnitudes in a group of {group}; E2M1 has 8"


def sizes(folder: Path, model: Path, grid: int | str) -> dict[str, float]:
    """Return the bits per quantized weight on disk, scales, zeros and orders counted, and the bytes of all tensors.

    Small floats have the bits of their scheme: a rival may have written what the codes stand for.
    """
    source, packed = Source(model), Source(folder)
    if isinstance(grid, str):
        return {"bits_per_weight": FLOATS[grid][1], "bytes": packed.bytes()}
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
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--dtype", default="auto", help="of activations, for every tool; auto is each one's own choice")
    parser.add_argument("--keep", action="store_true", help="keep the checkpoints in OUT")
    add_options(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as room:
        scores = Scores(args, "peers", Path(room))
        if args.markdown:
            return scores.markdown({n: r for n, r in ((n, scores.rows.read().get(n)) for n in ROWS) if r})
        failed = scores.rows.fill(args.only, lambda name: measure_row(name, args, scores), scores.show)
    scores.show(scores.rows.read())
    print(f"float: {scores.floats()}; {measure.machine()}")
    sys.exit(f"{failed} rows failed" if failed else 0)


if __name__ == "__main__":
    main()
