"""What the Triton back-ends share: a kernel called, its errors in a user's words.

A kernel's function is called as it is, and as an operator where torch.compile or fake tensors look on (llmq_kernels'
`linear`). Not here: which GPUs can run the kernels (llmq/gpu.py).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmq.types import LlmqError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def run(name: str, function: Callable[..., Tensor], x: Tensor, *args: Any) -> Tensor:
    """Return `function(x, *args)`, of the kernels. Raises LlmqError, for the linear `name`, where it cannot."""
    if x.dtype not in _FLOATS:
        raise LlmqError(
            f"{name}: its activations are {x.dtype}, and a GPU's kernels take float16, bfloat16 and float32; load the "
            "model with dtype=torch.bfloat16, or with backend='reference'"
        )
    try:
        return function(x, *args)
    except ValueError as e:
        from llmq_kernels.errors import KernelError

        if not isinstance(e, KernelError):
            raise
        raise LlmqError(f"{name}: {e} (backend='reference' does without the kernel)") from e
