"""Quantize a model with GPTQModel and report what that cost: the peer figure that llmq's own GPTQ is compared with.

Runs in an environment with `gptqmodel` (see tests/golden/README.md), not in llmq's own. The calibration text is
tokenised without special tokens and its first SAMPLES * SEQ_LEN ids become SAMPLES rows of SEQ_LEN ids. Every setting
without an option here keeps GPTQModel's default. The last line printed is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # without it GPTQModel 7.7.0 does not start on a two-core machine


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", type=Path, help="float checkpoint folder, with its tokenizer")
    parser.add_argument("out", type=Path, help="folder for the quantized checkpoint")
    parser.add_argument("--calib", type=Path, required=True, help="UTF-8 text file")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=1, help="GPTQModel's default is 1")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--mse", type=float, default=0.0, help="GPTQModel's scale search, off (0) by default")
    parser.add_argument("--desc-act", action="store_true")
    return parser.parse_args()


def calibration_rows(src: Path, text_file: Path, samples: int, seq_len: int) -> list[dict]:
    """Return the first samples * seq_len token ids of the text, cut into rows."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(src)
    ids = tokenizer(text_file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    if len(ids) < samples * seq_len:
        raise SystemExit(f"{text_file} has {len(ids)} tokens, {samples * seq_len} are needed")
    rows = [ids[i * seq_len : (i + 1) * seq_len] for i in range(samples)]
    return [{"input_ids": row, "attention_mask": [1] * seq_len} for row in rows]


def main() -> None:
    """Quantize, save, and print the report."""
    args = parse_args()
    started = time.perf_counter()
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    imported = time.perf_counter()
    config = QuantizeConfig(bits=args.bits, group_size=args.group_size, mse=args.mse, desc_act=args.desc_act)
    rows = calibration_rows(args.src, args.calib, args.samples, args.seq_len)
    src, out = str(args.src.resolve()), str(args.out.resolve())
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):  # GPTQModel leaves logs/ behind
        model = GPTQModel.load(src, config)
        loaded = time.perf_counter()
        model.quantize(rows, batch_size=args.batch_size)
        quantized = time.perf_counter()
        model.save(out)
        saved = time.perf_counter()
    report = {
        "settings": {key: value for key, value in vars(args).items() if key not in ("src", "out", "calib")},
        "import_s": round(imported - started, 2),
        "load_s": round(loaded - imported, 2),
        "quantize_s": round(quantized - loaded, 2),
        "save_s": round(saved - quantized, 2),
        "total_s": round(saved - started, 2),
        "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("gptqmodel", "torch", "transformers")},
        "python": platform.python_version(),
        "config": repr(config),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
