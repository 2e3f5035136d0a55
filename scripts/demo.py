"""The main job on a real model: float checkpoint -> 4-bit -> a generated sentence -> a table of what it cost.

    bash scripts/demo.sh [FOLDER]        FOLDER (default demo/) keeps the float and the quantized checkpoint

The model is SmolLM2-135M-Instruct with its channels permuted (make_reference_model.py says why); group size 64, since
128 does not divide its 576 channels. It writes its own calibration text, so nothing but the model is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import _measure as measure
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "eval/data/sample.txt"
RECIPE = [
    "--quality",
    "fast",
    "--bits",
    "4",
    "--group-size",
    "64",
    "--calib",
    "self",
    "--samples",
    "32",
    "--seq-len",
    "512",
]


def main() -> None:
    """Run the job and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "demo")
    parser.add_argument("--windows", type=int, default=8, help="windows of 2048 tokens to score (default 8)")
    args = parser.parse_args()
    model, out = args.folder / "smollm2-135m-float", args.folder / "smollm2-135m-int4"
    if not (model / "config.json").exists():
        measure.run(sys.executable, ROOT / "scripts/make_reference_model.py", model)
    taken = measure.llmq("quantize", model, out, *RECIPE, "--overwrite", quiet=False)
    measure.llmq("generate", out, "The capital of France is", "--max-new-tokens", 24, quiet=False)
    figures = measure.scores(out, model, SAMPLE, args.windows)
    size = json.loads((out / "quantization.json").read_text())["size"]

    table = Table("", "float", "4-bit", title=f"SmolLM2-135M on {measure.machine()}", title_justify="left")
    table.add_row("weights on disk", f"{size['float_bytes'] / 1e6:.1f} MB", f"{size['bytes'] / 1e6:.1f} MB")
    table.add_row("bits per quantized weight", "16", f"{size['bits_per_weight']:.3f}")
    table.add_row("perplexity", f"{figures['baseline_perplexity']:.3f}", f"{figures['perplexity']:.3f}")
    table.add_row("mean KL to float", "0", f"{figures['kl_mean']:.4f}")
    table.add_row("same top-1 token", "100 %", f"{figures['top1']:.1%}")
    table.add_row("seconds to quantize", "", f"{taken.seconds:.0f}")
    table.add_row("peak memory", "", f"{taken.peak_bytes / 1e9:.2f} GB")
    Console().print(table)
    print(f"scored: {figures['tokens']} tokens of eval/data/sample.txt, which was not calibrated on")
    print(f"The checkpoint is {out}: try `llmq inspect {out} --linears`")


if __name__ == "__main__":
    main()
