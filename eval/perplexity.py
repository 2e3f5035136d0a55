#!/usr/bin/env python
"""Perplexity of a checkpoint and, with --baseline, how far it is from the float model.

python eval/perplexity.py MODEL [--baseline FLOAT] [--text FILE | --dataset wikitext2] [--convention gptq] [--windows 8]

Without a text it scores data/sample.txt, which is never calibrated on. The same figures: `llmq eval`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

import llmq
from llmq.evaluation import scores, windows

SAMPLE = Path(__file__).parent / "data" / "sample.txt"


def parser(description: str) -> argparse.ArgumentParser:
    """Return the options that the scripts of this folder share."""
    out = argparse.ArgumentParser(description=description)
    text = out.add_mutually_exclusive_group()
    text.add_argument("--text", type=Path, help=f"text file to score [{SAMPLE.name}]")
    text.add_argument("--dataset", help=f"Hub data set to score: {', '.join(windows.EVAL_SETS)}")
    out.add_argument("--convention", default="gptq", help=f"{', '.join(windows.CONVENTIONS)} [gptq]")
    out.add_argument("--window", type=int, help="tokens in a window, in place of the convention's")
    out.add_argument("--windows", type=int, help="score only the first so many windows (lm-eval: documents)")
    out.add_argument("--json", type=Path, help="write the figures to this file")
    out.add_argument("--dtype", help="float32, bfloat16 ...; each checkpoint's own if left out")
    out.add_argument("--device", default="auto", help="auto, cpu, cuda ... [auto]")
    return out


def report(args: argparse.Namespace, models: list[str], baseline: str | None) -> None:
    """Evaluate the models one after the other, print the table and write the JSON file if one is asked for."""
    scored = {"dataset": args.dataset} if args.dataset else {"text": args.text or SAMPLE}
    rows: dict[str, scores.Evaluation] = {}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        for model in models:
            task = bar.add_task(model, total=None)
            rows[model] = llmq.evaluate(
                model,
                baseline=baseline,
                **scored,
                convention=args.convention,
                window=args.window,
                windows=args.windows,
                dtype=args.dtype,
                device=args.device,
                progress=lambda done, total, _, task=task: bar.update(task, completed=done, total=total),
            )
    Console().print(scores.table(rows))
    if args.json:
        args.json.write_text(json.dumps({name: e.to_json() for name, e in rows.items()}, indent=2) + "\n")


def main() -> None:
    """Parse the command line and report; bad input ends in one line and exit status 1."""
    options = parser("Perplexity of a checkpoint, against a float baseline if one is given.")
    options.add_argument("model", help="float or quantized checkpoint: a folder or a Hub id")
    options.add_argument("--baseline", help="float checkpoint, for KL divergence and top-1 agreement")
    args = options.parse_args()
    try:
        report(args, [args.model], args.baseline)
    except llmq.LlmqError as e:
        sys.exit(f"error: {e}")


if __name__ == "__main__":
    main()
