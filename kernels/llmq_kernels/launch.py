"""What every launch shares: the dtypes, whether inline PTX may be used, the compile options."""

from __future__ import annotations

import torch
from triton import knobs

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
# a * b + c in one rounding wherever the source writes it; Triton's default changes between 3.9 and 3.10.
OPTIONS = {"enable_fp_fusion": True}


def uses_asm() -> bool:
    """Say whether kernels may contain PTX: not on AMD, and not in Triton's interpreter."""
    return torch.version.hip is None and not knobs.runtime.interpret


def on(device: torch.device) -> torch.cuda.device:
    """Return a context in which kernels are launched on `device`, which need not be the current one."""
    return torch.cuda.device(device)
