"""Export a checkpoint as an ExecuTorch program, run it, and compare it with the checkpoint: KL, text, tokens a second.

    python scripts/interop_executorch.py CHECKPOINT [--context 512] [--text FILE] [--program OUT]

OUT is a folder that `llmq export CHECKPOINT OUT --to executorch` made before; without it CHECKPOINT is exported anew.

In an environment of its own, since executorch 1.5 wants torch 2.13 and takes half a gigabyte:

    python -m venv ENV && ENV/bin/pip install torch==2.13.0
    ENV/bin/pip install -c scripts/constraints.txt -e '.[executorch]'

The logits differ from those of `llmq.load` by what XNNPACK's 8-bit inputs cost. That the program holds the codes, and
computes what torch does with the same inputs, `llmq export` sees to itself before OUT exists.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from _measure import decibels, divergence

import llmq
from llmq.export._run import export
from llmq.export.executorch import Program

PROMPT = "The capital of France is"


def main() -> None:
    """Print one line for each thing that was compared."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--text", type=Path, help="whose first tokens are scored")
    parser.add_argument("--program", type=Path, metavar="OUT", help="exported before")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as room:
        out = args.program or Path(room, "out")
        if args.program is None:
            export(args.checkpoint, out, to=f"executorch:{args.context}")
        compare(args.checkpoint, out, args.text.read_text()[:4000] if args.text else PROMPT)


def compare(checkpoint: str, out: Path, text: str) -> None:
    """Print how far the program of a folder is from the checkpoint on a text, what it says, and how fast."""
    tokenizer, program = llmq.load_tokenizer(checkpoint), Program(out / "model.pte")
    holds = json.loads((out / "export.json").read_text())["target"]["executorch"]["context"]
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: min(128, holds - 1)])[None]
    began = time.process_time()
    found = program(ids, torch.arange(ids.shape[1]))
    rate = ids.shape[1] / (time.process_time() - began)
    with torch.no_grad():
        wanted = llmq.load(checkpoint, dtype=torch.float32, backend="reference")(ids).logits
    same = float((found.argmax(-1) == wanted.argmax(-1)).float().mean())
    print(
        f"{ids.shape[1]} tokens, {rate:.0f} a CPU second, against llmq.load: {decibels(found, wanted):.1f} dB, ", end=""
    )
    print(f"mean KL {divergence(found, wanted):.2e}, the same token {same:.0%}")
    made, seconds = generate(program, tokenizer(PROMPT)["input_ids"], 24)
    print(f"{PROMPT}{tokenizer.decode(made)}".replace("\n", " "))
    print(f"{(len(made) - 1) / seconds:.1f} tokens a CPU second, {(out / 'model.pte').stat().st_size / 1e6:.0f} MB")


def generate(program: Program, prompt: list[int], count: int) -> tuple[list[int], float]:
    """Return the likeliest tokens behind a prompt, and the CPU seconds of making them one by one."""
    logits = program(torch.tensor([prompt]), torch.arange(len(prompt)))
    made = [int(logits[0, -1].argmax())]
    began = time.process_time()
    for i in range(len(prompt), len(prompt) + count):
        logits = program(torch.tensor([[made[-1]]]), torch.tensor([i]))
        made.append(int(logits[0, -1].argmax()))
    return made, time.process_time() - began


if __name__ == "__main__":
    main()
