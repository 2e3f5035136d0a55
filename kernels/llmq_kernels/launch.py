"""What every launch shares: where kernels run, the dtypes, whether inline PTX may be used, the compile options."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from triton import knobs

DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
# a * b + c in one rounding wherever the source writes it; Triton's default changes between 3.9 and 3.10.
OPTIONS = {"enable_fp_fusion": True}


def uses_asm() -> bool:
    """Say whether kernels may contain PTX: not on AMD, and not in Triton's interpreter."""
    return torch.version.hip is None and not knobs.runtime.interpret


def runs_on(x: Tensor) -> bool:
    """Say whether an op computes `x` by its kernel, and not by its reference.

    So on GPUs; on the CPU only in Triton's interpreter, which is there to show what a kernel does, and not for
    bfloat16, whose arithmetic is wrong there.
    """
    return x.device.type != "cpu" or (knobs.runtime.interpret and x.dtype in (torch.float16, torch.float32))


def on(device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which kernels are launched on `device`, which need not be the current one."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)
