"""One quantized checkpoint in every runtime on one thread: tokens per CPU second, and how far its logits are off.

    python scripts/bench_runtimes.py QUANTIZED --text FILE [--openvino PYTHON] [--mlx PYTHON] [--work DIR] [--json FILE]

Each runtime runs in a process of its own (scripts/_runtimes.py) on what `llmq export` made of the checkpoint; one whose
Python is not named is left out. KL is of the next token behind each of 32 tokens of the text, the mean, against llmq's
reference decode in float32, which is the checkpoint's exact meaning. Speed: a prompt of 128 tokens, and 48 tokens
behind it. CPU seconds are the fair figure on a machine that others use too.
What is in DIR already is used as it is. `--openvino`: a Python with openvino-genai, openvino-tokenizers, transformers.
`--mlx`: one with mlx[cpu] and mlx-lm. `--only`: rows whose names match.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import _measure as measure
import numpy as np
from _runtimes import DECODED

from llmq.loading import load_tokenizer

SCRIPTS = Path(__file__).parent
TEXT, PROMPT = 32, 128


class Row(NamedTuple):
    """A row of the table: what it is called, the class of _runtimes.py, what `llmq export --to` makes for it.

    python: that has the runtime. suffix: of the export. stateful: whether it is made a model of OpenVINO's then.
    """

    name: str
    runtime: str
    to: str = ""
    python: str = sys.executable
    suffix: str = ""
    stateful: bool = False


def rows(openvino: str | None, mlx: str | None) -> Iterator[Row]:
    """Yield the rows, in the order of the table."""
    yield Row("llmq, bfloat16", "Llmq")
    yield Row("llmq, float32", "LlmqFloat32")
    yield Row("onnxruntime-genai, level 0, float head", "OnnxGenai", "onnx")
    yield Row("onnxruntime-genai, level 4, float head", "OnnxGenai", "onnx:accuracy_level=4")
    yield Row("onnxruntime-genai, level 4, int8 head", "OnnxGenai", "onnx:accuracy_level=4:head=int8")
    yield Row("llama.cpp, Q4_0, BF16 head", "LlamaCpp", "gguf", suffix=".gguf")
    if openvino:
        yield Row("OpenVINO GenAI, plain ONNX", "OpenVino", "onnx:qdq", openvino, stateful=True)
        yield Row("OpenVINO GenAI, the same GGUF", "OpenVino", "gguf", openvino, suffix=".gguf")
    if mlx:
        yield Row("mlx-lm, on the CPU", "Mlx", "mlx", mlx)


def made(row: Row, quantized: Path, work: Path) -> Path:
    """Return what a row loads, exported if it is not there yet."""
    if not row.to:
        return quantized
    out = work / f"{row.to.replace(':', '-')}{row.suffix}"
    if not out.exists():
        measure.llmq("export", quantized, out, "--to", row.to)
    if not row.stateful:
        return out
    model = work / "openvino"
    if not model.exists():
        measure.run(row.python, SCRIPTS / "_openvino.py", out, model)
    return model


def run(row: Row, path: Path, ids: Path, work: Path) -> dict[str, Any]:
    """Run a row in a process of its own; return its log-probabilities and seconds."""
    out = work / "figures.npz"
    measure.run(row.python, SCRIPTS / "_runtimes.py", row.runtime, path, ids, out)
    with np.load(out) as found:
        return dict(found)


def figures(found: dict[str, Any], exact: Any, path: Path) -> dict[str, Any]:
    """Return a row's figures; exact: the reference's log-probabilities `[T, V]`."""
    p, q = exact, found["log_probabilities"]
    files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
    return {
        "decode": DECODED / float(found["seconds"][1]),
        "prefill": PROMPT / float(found["seconds"][0]),
        "kl": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "top1": float((p.argmax(-1) == q.argmax(-1)).mean()),
        "megabytes": sum(f.stat().st_size for f in files) / 1e6,
    }


def show(table: dict[str, dict[str, Any]]) -> None:
    """Print the table as Markdown."""
    print("| runtime | tokens a CPU second | prompt | KL | same token | MB |\n|---|---|---|---|---|---|")
    for name, f in table.items():
        print(
            f"| {name} | {f['decode']:.1f} | {f['prefill']:.0f} | {f['kl']:.1e} | {100 * f['top1']:.0f} % "
            f"| {f['megabytes']:.0f} |"
        )


def main() -> None:
    """Measure every row, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quantized", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--openvino", metavar="PYTHON")
    parser.add_argument("--mlx", metavar="PYTHON")
    parser.add_argument("--only", metavar="REGEX", default="")
    parser.add_argument("--work", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(exist_ok=True)
        tokens = load_tokenizer(str(args.quantized))(args.text.read_text())["input_ids"]
        ids = work / "ids.json"
        ids.write_text(json.dumps({"text": tokens[:TEXT], "prompt": tokens[:PROMPT]}))
        exact = run(Row("reference", "Reference"), args.quantized, ids, work)["log_probabilities"]
        table = {}
        for row in (r for r in rows(args.openvino, args.mlx) if re.search(args.only, r.name)):
            path = made(row, args.quantized, work)
            table[row.name] = figures(run(row, path, ids, work), exact, path)
            print(row.name, table[row.name], file=sys.stderr, flush=True)
    show(table)
    print(measure.machine())
    if args.json:
        args.json.write_text(json.dumps(table, indent=2) + "\n")


if __name__ == "__main__":
    main()
