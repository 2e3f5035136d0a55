"""The tensors of a packed linear as a file has them, held against what its format promises.

Not here: the promise (`Format.layout`), what the words mean (formats/).
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from llmq.types import LinearSpec, LlmqError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_ANY_INTEGER = {("g_idx", torch.int32), ("weight_shape", torch.int64), ("weight_zero_point", torch.int8)}


def checked(
    tensors: Mapping[str, Tensor], layout: Mapping[str, Tensor], spec: LinearSpec, derived: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Return the tensors of `layout`, in its order, as they are stored; they may be on the meta device.

    derived: those that follow from the rest, so that they may be missing.
    Raises LlmqError that names the first one missing or of another shape or dtype. Peers store scales in the dtype of
    their model and integers that are not packed in any width, so those are as good; `[]` is as good as `[1]`.
    """
    found = {}
    for name, expected in layout.items():
        if name not in tensors:
            if name in derived:
                continue
            there = ", ".join(sorted(tensors)) or "nothing"
            raise LlmqError(
                f"{spec.name}.{name} is missing (there is {there}): the checkpoint is incomplete or its config is not "
                "its own; download or quantize it again"
            )
        t = found[name] = tensors[name]
        scalar = {tuple(t.shape), tuple(expected.shape)} == {(), (1,)}
        if (t.shape != expected.shape and not scalar) or t.dtype not in _dtypes(name, expected):
            is_, wanted = (f"{x.dtype} {list(x.shape)}" for x in (t, expected))
            raise LlmqError(
                f"{spec.name}.{name} is {is_}, not {wanted}: the checkpoint's config is not its own (bits and "
                "group_size there), or its writer packs in another way"
            )
    return found


def _dtypes(name: str, expected: Tensor) -> tuple[torch.dtype, ...]:
    if expected.is_floating_point():
        return _FLOATS if expected.dtype.itemsize > 1 else (expected.dtype,)
    return _INTEGERS if (name, expected.dtype) in _ANY_INTEGER else (expected.dtype,)
