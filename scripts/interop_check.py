"""Load GPTQ and AWQ checkpoints with stock transformers and GPTQModel's kernels, and compare logits with stored ones.

Each CHECKPOINT folder holds `interop/reference_logits.safetensors`, or as the golden ones do `logits.safetensors`,
with `input_ids` and `logits`. The exit status is 0 only if every checkpoint's relative RMS error stays below the
threshold. Runs in the environment that scripts/interop.sh builds, not in llmq's own.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # without it GPTQModel 7.7.0 does not start on two cores

REFERENCES = ("interop/reference_logits.safetensors", "logits.safetensors")


def reference(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the stored input ids and logits of a checkpoint."""
    for name in REFERENCES:
        if (folder / name).is_file():
            tensors = load_file(folder / name)
            return tensors["input_ids"], tensors["logits"].float()
    raise SystemExit(f"{folder}: has none of {', '.join(REFERENCES)}")


def peer_logits(folder: Path, input_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, str]:
    """Return the logits of stock transformers, and the classes of the quantized layers that computed them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu").eval()
    kernels = {type(module).__name__ for module in model.modules() if hasattr(module, "qweight")}
    if not kernels:
        raise SystemExit(f"{folder}: no layer was loaded quantized")
    with torch.no_grad():
        return model(input_ids).logits.float(), "+".join(sorted(kernels))


def main() -> None:
    """Check every checkpoint, then print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--threshold", type=float, default=2e-2, help="relative RMS error (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    args = parser.parse_args()
    lines, failures = [], 0
    for folder in args.checkpoints:
        input_ids, expected = reference(folder)
        actual, kernels = peer_logits(folder, input_ids, getattr(torch, args.dtype))
        if actual.shape != expected.shape:
            raise SystemExit(f"{folder}: logits {tuple(actual.shape)}, expected {tuple(expected.shape)}")
        error = ((actual - expected).norm() / expected.norm()).item()
        passed = error < args.threshold  # False for nan
        failures += not passed
        lines.append(f"{'PASS' if passed else 'FAIL'} {error:.2e} {folder.name} ({kernels})")
    print("\n".join(lines))  # at the end: GPTQModel logs a lot while it loads
    print(f"{len(lines) - failures} passed, {failures} failed")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
