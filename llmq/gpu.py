"""Whether the Triton kernels can run on a device, and what is said where they cannot.

The kernels are a package of their own, `llmq_kernels`. It is imported when one is first needed on a GPU and not before:
importing llmq imports no triton, and a machine without one never asks for it.
AMD's GPUs are devices of type "cuda" too. Which GPUs: those that docs/kernels.md has compiled the kernels for, and
their kin: NVIDIA from compute capability 8.0 (async copies, bfloat16), AMD's CDNA 2 to 4 (matrix instructions).
Not here: who calls them (algorithms/_sweep.py, runtime/), the kernels (kernels/llmq_kernels).
"""

import importlib.util
import logging
import os
import shutil
from functools import cache

import torch

log = logging.getLogger(__name__)
DEVICES = frozenset({"cuda"})
"""The types of devices that the kernels run on."""
_CAPABILITY = (8, 0)
_AMD = ("gfx90a", "gfx942", "gfx950")
_FP8 = (8, 9)
_AMD_FP8 = "gfx950"  # that of gfx942 has another bias


def runs_kernels(device: torch.device, what: str) -> bool:
    """Say whether the kernels run on `device`; for a GPU that cannot, log once that torch does `what`, and why."""
    reason = refuses_device(device, DEVICES)
    if reason is not None and device.type != "cpu":
        warn(what, reason)
    return reason is None


@cache
def warn(what: str, reason: str) -> None:
    """Log that `what` is done without the kernels, and why; once."""
    log.warning("%s by torch, without the Triton kernels: %s", what, reason)


def refuses_device(device: torch.device, devices: frozenset[str]) -> str | None:
    """Return why the kernels cannot run on `device`, None where they can; `devices` are the types allowed."""
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


def refuses_fp8(device: torch.device) -> str | None:
    """Return what a GPU lacks to multiply FP8 (E4M3 as files have it) by FP8 with torch, None where nothing."""
    if not torch.cuda.is_available() or not hasattr(torch, "_scaled_mm"):
        return "torch sees no GPU here, or has no _scaled_mm"
    found = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        architecture = found.gcnArchName.partition(":")[0]
        return None if architecture == _AMD_FP8 else f"{found.name} is {architecture}; torch's FP8 needs {_AMD_FP8}"
    if (found.major, found.minor) < _FP8:
        return f"{found.name} has compute capability {found.major}.{found.minor}; FP8 products need 8.9"
    return None
