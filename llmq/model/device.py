"""Where a model is: the processor or a GPU, by the name that a user gives."""

import torch

from llmq.errors import LlmqError, one_line


def device_of(name: torch.device | str | None) -> torch.device:
    """Return the device of a name; "auto" and None are cuda where there is one, else cpu.

    Raises LlmqError for one that torch does not know or that cannot be used here.
    """
    if name is None or name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ImportError) as e:  # no such name; torch built without it; a plug-in's (hpu)
        raise LlmqError(f"device {str(name)!r} cannot be used here ({one_line(e)}); say cpu, cuda or auto") from e
    if device.type == "meta":
        raise LlmqError("device 'meta' holds no weights; say cpu, cuda or auto")
    return device
