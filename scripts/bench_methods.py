"""Every method on one model: size, perplexity and KL on text that was not calibrated on, seconds, peak memory.

    python scripts/bench_methods.py MODEL --calib FILE --text FILE [--out DIR] [--only NAME ...] [--seeds 0 1 2]

Each row is one `llmq quantize` and one `llmq eval` in processes of their own, both models scored in float32. Rows are
kept in DIR/methods.json as they come, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import _measure as measure
from rich.console import Console
from rich.table import Table

W8A8 = ("--bits", 8, "--act-bits", 8, "--group-size", "channel", "--format", "compressed-tensors")
W4 = ("--bits", 4, "--group-size", 64)
ROWS: dict[str, tuple[object, ...]] = {
    "rtn": ("--method", "rtn", *W4),
    "rtn mse": ("--method", "rtn", *W4, "--range", "mse"),
    "gptq": ("--method", "gptq", *W4),
    "gptq float32": ("--method", "gptq", *W4, "--dtype", "float32"),
    "gptq mse": ("--method", "gptq", *W4, "--range", "mse"),
    "gptq desc_act": ("--method", "gptq:desc_act=true", *W4),
    "awq": ("--method", "awq,rtn", *W4, "--format", "awq"),
    "awq minmax": ("--method", "awq,rtn", *W4, "--range", "minmax", "--format", "awq"),
    "awq+gptq": ("--method", "awq,gptq", *W4, "--format", "awq"),
    "awq+gptq mse": ("--method", "awq,gptq", *W4, "--range", "mse", "--format", "awq"),
    "rtn asym": ("--method", "rtn", *W4, "--asym"),
    "gptq asym": ("--method", "gptq", *W4, "--asym"),
    "gptq asym mse": ("--method", "gptq", *W4, "--asym", "--range", "mse"),
    "gptq 3-bit mse": ("--method", "gptq", "--bits", 3, "--group-size", 64, "--range", "mse"),
    "gptq 8-bit": ("--method", "gptq", "--bits", 8, "--group-size", 64),
    "w8a8 rtn": ("--method", "rtn", *W8A8),
    "w8a8 smoothquant": ("--method", "smoothquant,rtn", *W8A8),
    "w8a8 smoothquant .5": ("--method", "smoothquant:alpha=0.5,rtn", *W8A8),
    "w8a8 smoothquant .8": ("--method", "smoothquant:alpha=0.8,rtn", *W8A8),
    "w8a8 smoothquant .5 norms": ("--method", "smoothquant:alpha=0.5:linears=false,rtn", *W8A8),
    "w8a8 smoothquant .8 norms": ("--method", "smoothquant:alpha=0.8:linears=false,rtn", *W8A8),
    "w8a8 smoothquant+gptq": ("--method", "smoothquant,gptq", *W8A8),
    "w8a8 static": ("--method", "smoothquant,rtn", *W8A8, "--act", "tensor"),
    "gptq calib self": ("--method", "gptq", *W4, "--calib", "self"),
    "gptq mse calib self": ("--method", "gptq", *W4, "--range", "mse", "--calib", "self"),
}


def measure_row(name: str, seed: int, args: argparse.Namespace) -> dict[str, object]:
    """Quantize, score, and drop the checkpoint."""
    out = args.out / "checkpoint"
    common = ("--samples", args.samples, "--seq-len", args.seq_len, "--seed", seed, "--overwrite")
    options = ROWS[name] if "--calib" in ROWS[name] else (*ROWS[name], "--calib", args.calib)
    taken = measure.llmq("quantize", args.model, out, *options, *common)
    record = json.loads((out / "quantization.json").read_text())
    figures = measure.scores(out, args.model, args.text, args.windows)
    shutil.rmtree(out)
    return {
        "options": [str(o) for o in options],
        "bits_per_weight": record["size"]["bits_per_weight"],
        "bytes": record["size"]["bytes"],
        "dtype": record["dtype"],
        "seconds": taken.seconds,
        "peak_bytes": taken.peak_bytes,
        "machine": measure.machine(),
        **{k: figures[k] for k in ("perplexity", "baseline_perplexity", "kl_mean", "kl_standard_error", "top1")},
    }


def show(rows: dict[str, dict]) -> None:
    """Print the table of all rows measured so far."""
    table = Table("method", "bits/weight", "perplexity", "change", "mean KL", "top-1", "s", "peak GB")
    for key, r in rows.items():
        change = 100 * (r["perplexity"] / r["baseline_perplexity"] - 1)
        kl = f"{r['kl_mean']:.5f} ± {r['kl_standard_error']:.5f}"
        cells = (f"{r['bits_per_weight']:.3f}", f"{r['perplexity']:.3f}", f"{change:+.2f} %", kl, f"{r['top1']:.2%}")
        table.add_row(key, *cells, f"{r['seconds']:.0f}", f"{r['peak_bytes'] / 1e9:.2f}")
    Console(width=120).print(table)
    if rows:
        print(f"float: {next(iter(rows.values()))['baseline_perplexity']:.3f}; {measure.machine()}")


def main() -> None:
    """Measure the rows that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), metavar="NAME")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "methods.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    for seed in args.seeds:
        for name in args.only:
            key = name if seed == 0 else f"{name}, seed {seed}"
            if key not in rows:
                rows[key] = measure_row(name, seed, args)
                file.write_text(json.dumps(rows, indent=2) + "\n")
                show({key: rows[key]})
    show(rows)


if __name__ == "__main__":
    main()
