"""GGUF types, ours and llama.cpp's side by side: size, perplexity, KL to the F16 file, top-1 agreement, seconds.

    python scripts/bench_gguf.py MODEL --llama BIN --calib FILE --text FILE [--types Q4_K_M Q4_0 ...] [--out DIR]

MODEL is a float checkpoint (scripts/make_reference_model.py OUT --width 768 makes one whose rows K-quants take). BIN
holds llama-quantize, llama-imatrix and llama-perplexity, built from the sdist of llama-cpp-python. Everything is scored
by `llama-perplexity --kl-divergence` against our F16 file, in windows of 512. Both sides calibrate on the same text,
llama.cpp on `--chunks` windows of it, llmq on `--samples`. Seconds are CPU seconds of writing.
Rows are kept in DIR/gguf.json as they come, so that a stopped run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import _measure as measure
from _llama_tools import CONTEXT, LlamaTools
from rich.console import Console
from rich.table import Table

FIGURES = {
    "perplexity": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
    "mean KL": r"Mean\s+KLD:\s*(-?[\d.]+)",
    "99.9% KL": r"99\.9%\s+KLD:\s*(-?[\d.]+)",
    "top-1 %": r"Same top p:\s*([\d.]+)",
}


class Scorer:
    """llama-perplexity on one text, against the logits of the F16 file."""

    def __init__(self, tools: LlamaTools, args: argparse.Namespace) -> None:
        self.tools, self.args, self.base = tools, args, args.out / "base.kld"
        if not self.base.exists():
            self._run("-m", tools.f16(), *self._text(), "--kl-divergence-base", self.base)

    def score(self, file: Path) -> dict[str, float]:
        """Return the figures of a file."""
        options = (*self._text(), "--kl-divergence-base", self.base, "--kl-divergence")
        log = self._run("-m", file, *options)
        return {name: float(re.findall(pattern, log)[-1]) for name, pattern in FIGURES.items()}

    def _text(self) -> tuple[object, ...]:
        return ("-f", self.args.text, "-c", CONTEXT, "--chunks", self.args.windows, "-t", self.args.threads)

    def _run(self, *options: object) -> str:
        return measure.run(self.tools.bin / "llama-perplexity", *options).output


def rows(kind: str, args: argparse.Namespace, tools: LlamaTools) -> dict[str, tuple[str, tuple[object, ...]]]:
    """Return what is measured of a type: name -> who writes it, and with which options."""
    imatrix = ("--imatrix", tools.imatrix())
    calibrated = ("--calib", args.calib, "--samples", args.samples, "--seq-len", CONTEXT)
    return {
        f"{kind} llama.cpp": ("llama", ()),
        f"{kind} llmq rtn": ("llmq", ("--method", "rtn")),
        f"{kind} llama.cpp imatrix": ("llama", imatrix),
        f"{kind} llmq rtn, the same imatrix": ("llmq", ("--method", "rtn", *imatrix)),
        f"{kind} llmq {args.method}": ("llmq", ("--method", args.method, *calibrated)),
    }


def measure_row(kind: str, who: str, options: tuple[object, ...], scorer: Scorer) -> dict[str, Any]:
    """Write one file, score it and drop it."""
    tools = scorer.tools
    with tempfile.TemporaryDirectory(dir=tools.room) as folder:
        file = Path(folder) / "model.gguf"
        if who == "llama":
            taken = tools.quantize(kind, file, *options)
        else:
            taken = measure.llmq("quantize", tools.model, file, "--type", kind, *options)
        return {"bytes": file.stat().st_size, **scorer.score(file), "cpu seconds": round(taken.cpu_seconds, 1)}


def main() -> None:
    """Measure every row that is not yet there, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--llama", type=Path, required=True, help="folder of llama.cpp's tools")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True, help="text to score, not calibrated on")
    parser.add_argument("--types", nargs="+", default=["Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K"])
    parser.add_argument("--method", default="qep,gptq,descent", help="our calibrated method (default: as balanced)")
    parser.add_argument("--samples", type=int, default=32, help="our calibration sequences of 512 tokens")
    parser.add_argument("--chunks", type=int, default=128, help="llama-imatrix's chunks of 512 tokens")
    parser.add_argument("--windows", type=int, default=40, help="scored windows of 512 tokens")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="rows whose name holds one of these")
    parser.add_argument("--out", type=Path, default=Path("bench-gguf"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    tools = LlamaTools(args.llama, args.model, args.calib, args.out, args.chunks, args.threads)
    scorer, file = Scorer(tools, args), args.out / "gguf.json"
    found: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.exists() else {}
    for kind in args.types:
        for name, (who, options) in rows(kind, args, tools).items():
            if name not in found and (not args.only or any(o in name for o in args.only)):
                found[name] = measure_row(kind, who, options, scorer)
                file.write_text(json.dumps(found, indent=1) + "\n")
    table = Table("file", "MB", *FIGURES, "CPU s", title=measure.machine())
    for name, row in found.items():
        figures = [f"{row[f]:.4f}" for f in FIGURES]
        table.add_row(name, f"{row['bytes'] / 1e6:.2f}", *figures, f"{row['cpu seconds']:.0f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
