"""Every GGUF type of a real model in llama.cpp: that it loads, speaks, and tokenizes as Hugging Face's tokenizer does.

    python scripts/check_gguf.py MODEL [--types Q4_K_M ...] [--out DIR]

MODEL is a float checkpoint. The F16 file's log-probabilities are compared with transformers' in float32 on the same
float16 weights. Prints a row for each; ends with status 1 where anything disagrees.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import _measure as measure
import torch
from _llama_cpp import LlamaCpp
from transformers import AutoModelForCausalLM, AutoTokenizer

TYPES = [
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "IQ4_XS",
    "Q2_0", "MXFP4", "NVFP4", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K",
]  # fmt: skip
PROMPT = "The capital of France is"
TEXTS = [
    "def f(x):\n\treturn x**2  # café", "👩‍👩‍👧‍👦 and 🏳️‍🌈!", "東京都は日本の首都です。", "  two leading spaces",
    "1234567890 3.14159 1,000,000", "<|im_start|>user\nHi<|im_end|>\n", "don't WON'T I'll", "a\r\n\r\nb\u00a0c\u200bd",
    "\n\n\n \t x", "ÀÉÎõü ß ﬁ Ǆ", "https://example.org/a?b=c&d=%20",
]  # fmt: skip
MOST = 0.02  # largest difference of a log-probability: llama.cpp rounds activations to float16 for float16 weights


def main() -> None:
    """Write, load, ask, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--out", type=Path, help="folder for the files, one at a time (default: a temporary one)")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    print(f"{measure.machine()}\n| type | MB | CPU s | tokenizes alike | after {PROMPT!r} |\n|---|---|---|---|---|")
    failed = False
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        for kind in args.types:
            file = Path(folder) / "model.gguf"
            taken = measure.llmq("quantize", args.model, file, "--type", kind, "--method", "rtn", "--overwrite")
            llama = LlamaCpp(file)
            alike = sum(llama.tokenize(t) == tokenizer(t)["input_ids"] for t in TEXTS)
            words = str(tokenizer.decode(llama.generate(llama.tokenize(PROMPT), 8))).replace("\n", "\\n")
            failed |= alike < len(TEXTS)
            size = f"{file.stat().st_size / 1e6:.1f}"
            print(f"| {kind} | {size} | {taken.cpu_seconds:.0f} | {alike} of {len(TEXTS)} | {words} |", flush=True)
            if kind == "F16":
                worst = _difference(llama, args.model, tokenizer)
                failed |= not worst < MOST
                print(f"F16: log-probabilities within {worst:.4f} of transformers'", flush=True)
    sys.exit(int(failed))


def _difference(llama: LlamaCpp, model: Path, tokenizer: object) -> float:
    """Return the largest difference between the log-probabilities of llama.cpp and of transformers after the prompt."""
    ids = llama.tokenize(PROMPT)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float16).float()
    with torch.inference_mode():
        expected = reference(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    found = llama.log_probabilities(ids, len(expected))
    return max(abs(expected[i].item() - p) for i, p in found.items())


if __name__ == "__main__":
    main()
