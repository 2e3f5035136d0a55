"""A packed weight as a module: the tensors of the file as buffers, under the names that they have on disk.

A buffer keeps the dtype it was stored in whatever happens to the model: rounding scales to the model's dtype would
change every weight.
Not here: what is computed from it (linear.py, embedding.py), bits on disk (formats/).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llmq.format import Format
from llmq.runtime import reference
from llmq.types import LinearSpec, QTensor


class PackedWeight(nn.Module):
    """The tensors of one matrix as a file holds them.

    They are created empty: fill them by `load_state_dict` (with `assign=True` when the module is on the meta device).

    fmt: the format that decodes them. spec: name, shape `[N, K]` and scheme.
    stored: by local name, the tensors of the file that they are to be filled from, on the meta device; its bias apart.
    device: where they are made.
    """

    def __init__(
        self, fmt: Format, spec: LinearSpec, stored: Mapping[str, Tensor], device: torch.device | str = "meta"
    ) -> None:
        super().__init__()
        self.fmt, self.spec = fmt, spec
        self._packed = {local: (t.dtype, t.shape) for local, t in stored.items() if local != "bias"}
        for local, (dtype, shape) in self._packed.items():
            self.register_buffer(local, torch.empty(shape, dtype=dtype, device=device))

    @property
    def loaded(self) -> bool:
        """Whether the buffers have data: none does on the meta device."""
        return not self.get_buffer(next(iter(self._packed))).is_meta

    def empty(self) -> None:
        """Forget the weight: the buffers are on the meta device, to be filled again."""
        for local, (dtype, shape) in self._packed.items():
            setattr(self, local, torch.empty(shape, dtype=dtype, device="meta"))

    def file_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the file by their local names, without the bias."""
        return {local: self.get_buffer(local) for local in self._packed}

    def unpack(self) -> QTensor:
        """Return the weight's codes `[N, K]` and parameters.

        Raises LlmqError, naming the tensor, where the buffers do not fit the spec, a scale is 0 or not finite, or a
        column's group is not there.
        """
        return self.fmt.unpack(self.file_tensors(), self.spec)

    def dequantize(self) -> Tensor:
        """Return the weight of the checkpoint, float32 `[N, K]`."""
        return reference.decode(self.unpack(), torch.float32)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Let `.to()`, `.half()` and the like move the buffers but never change their dtype."""

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        return super()._apply(move, recurse)


def leaves(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> bool:
    """Say whether `fn`, which `.to()` applies to every buffer, moves a module to another kind of device."""
    device = next(module.buffers()).device
    return fn(torch.empty(0, device=device)).device.type != device.type
