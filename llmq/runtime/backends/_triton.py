"""What the Triton back-ends share: a kernel called, its errors in a user's words.

Not here: which GPUs can run the kernels (llmq/gpu.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmq.types import LlmqError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def run(name: str, op: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """Return `op(x, *args)`, an operator of the kernels. Raises LlmqError, for the linear `name`, where it cannot."""
    from llmq_kernels.errors import KernelError

    if x.dtype not in _FLOATS:
        raise LlmqError(
            f"{name}: its activations are {x.dtype}, and a GPU's kernels take float16, bfloat16 and float32; load the "
            "model with dtype=torch.bfloat16, or with backend='reference'"
        )
    try:
        return op(x, *args)
    except KernelError as e:
        raise LlmqError(f"{name}: {e} (backend='reference' does without the kernel)") from e
