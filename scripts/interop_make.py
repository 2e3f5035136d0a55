"""Write the checkpoints that scripts/interop_check.py reads with the peers, and llmq's own logits for each.

    python scripts/interop_make.py WORKDIR

A random two-block Llama (no download) is quantized in every GPTQ and AWQ variant; WORKDIR/<variant>/interop/ holds
`reference_logits.safetensors` with 64 seeded ids and the logits of `llmq.load`, float32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

import llmq

FLOAT = Path(__file__).resolve().parent.parent / "tests/golden/float"
SMALL = {"group_size": 32, "samples": 32, "seq_len": 64}
VARIANTS = {
    "gptq_w4g32": {"format": "gptq"},
    "gptq_w4g32_desc_act": {"format": "gptq", "method": "gptq:desc_act=true"},
    "gptq_w8_channel": {"format": "gptq", "bits": 8, "group_size": "channel"},
    "gptq_w3g32": {"format": "gptq", "bits": 3},
    "gptq_v2_w4g32_asym": {"format": "gptq:checkpoint_format=gptq_v2", "sym": False},
    "awq_w4g32_asym": {"format": "awq", "method": "awq,rtn", "sym": False},
    "awq_w4g32_sym": {"format": "awq", "method": "awq,gptq"},
}


def main() -> None:
    """Make every variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    args = parser.parse_args()
    ids = torch.randint(0, 128, (1, 64), generator=torch.Generator().manual_seed(0))
    text = args.workdir / "calibration.txt"
    text.write_text("The quick brown fox jumps over the lazy dog; it did so twice in 1999. " * 400)
    for name, options in VARIANTS.items():
        out = args.workdir / name
        llmq.quantize(FLOAT, out, device="cpu", calib=text, **SMALL | options)
        with torch.no_grad():
            logits = llmq.load(out, dtype=torch.float32)(ids).logits
        (out / "interop").mkdir()
        save_file({"input_ids": ids, "logits": logits.contiguous()}, out / "interop/reference_logits.safetensors")
        print(f"{out}: written")
    text.unlink()


if __name__ == "__main__":
    main()
