"""What the back-ends for GPUs share: whether the Triton kernels can run here, and their errors in a user's words.

The kernels are a package of their own, `llmq_kernels`. It is imported when a weight is first prepacked for a GPU and
not before: importing llmq imports no triton, and a machine without one never asks for it.
AMD's GPUs are devices of type "cuda" too. Which GPUs: those that docs/kernels.md has compiled the kernels for, and
their kin: NVIDIA from compute capability 8.0 (async copies, bfloat16), AMD's CDNA 2 to 4 (matrix instructions).
Not here: the back-ends (triton_weight_only.py, triton_w8a8.py), the kernels (kernels/llmq_kernels).
"""

import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmq.types import LlmqError

DEVICES = frozenset({"cuda"})
"""The types of devices that the back-ends for GPUs take."""
_CAPABILITY = (8, 0)
_AMD = ("gfx90a", "gfx942", "gfx950")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def refuses_device(device: torch.device, devices: frozenset[str]) -> str | None:
    """Return why the kernels cannot run on `device`, None where they can; `devices` are the types a back-end takes."""
    if device.type not in devices:
        return f"it runs on a GPU, not on {device.type}"
    for package in ("triton", "llmq_kernels"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed: pip install {'triton' if package == 'triton' else 'llmq-quant'}"
    return refuses_gpu(device) if device.type == "cuda" else None


def refuses_gpu(device: torch.device) -> str | None:
    """Return what a GPU, or the machine around it, lacks to run Triton kernels, None where nothing."""
    if not torch.cuda.is_available():
        return "torch sees no GPU here"
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        architecture = found.gcnArchName.partition(":")[0]
        if architecture not in _AMD:
            return f"{found.name} is {architecture}; the kernels are made for {', '.join(_AMD)}"
    elif (found.major, found.minor) < _CAPABILITY:
        return f"{found.name} has compute capability {found.major}.{found.minor}; the kernels need 8.0"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):  # as Triton looks for one
        return "Triton needs a C compiler at its first launch and finds none: install gcc"
    return None


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
