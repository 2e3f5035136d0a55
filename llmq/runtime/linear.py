"""The quantized linear: a drop-in for `nn.Linear` that computes from a packed weight.

    y = Q(x) @ W^T + bias

It is made with the tensors of the file as buffers, under the names they have on disk, and computes with the reference
(reference.py), decoding the weight at every forward. `prepack()`, which loading a checkpoint calls, hands the weight to
the first back-end that can run it (backends/); the tensors of the file are dropped and come back from the back-end,
bit for bit, whenever a `state_dict` is asked for. So a model is always its checkpoint, and never holds two copies.
A layer that is moved to another kind of device is prepacked anew there.

Not here: the tensors of the file (packed.py), replacing the linears of a model (integrations/).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmq.format import Format
from llmq.runtime import reference
from llmq.runtime.backends import Prepacked, choose
from llmq.runtime.packed import PackedWeight, leaves
from llmq.types import LinearSpec, QTensor


class QuantLinear(PackedWeight):
    """A drop-in for `nn.Linear` whose weight stays packed.

    The buffers are those of `fmt.layout(spec)` under their local names, and `bias` where there is one. They are created
    empty, see `PackedWeight`.

    fmt: the format that decodes the buffers.
    spec: name, shape `[N, K]` and scheme of the linear.
    bias: whether there is a `bias` `[N]`.
    device: where the empty buffers are made.
    stored: by local name, the tensors of the file that it is to be filled from, on the meta device; None is the layout,
        and a bias of torch's default dtype.
    """

    bias: Tensor | None
    prepacked: Prepacked | None

    def __init__(
        self,
        fmt: Format,
        spec: LinearSpec,
        bias: bool = False,
        *,
        device: torch.device | str = "meta",
        stored: Mapping[str, Tensor] | None = None,
    ) -> None:
        if stored is None:
            stored = fmt.layout(spec) | {"bias": torch.empty(spec.N, dtype=torch.get_default_dtype(), device="meta")}
        super().__init__(fmt, spec, stored, device)
        self.in_features, self.out_features = spec.K, spec.N
        self.prepacked = None
        self.register_buffer("bias", torch.empty_like(stored["bias"], device=device) if bias else None)

    @property
    def backend(self) -> str:
        """The name of the back-end that computes."""
        return "reference" if self.prepacked is None else self.prepacked.name

    def prepack(self) -> None:
        """Hand the weight to the first back-end that can run it; without one, and without data, nothing changes.

        Raises LlmqError where the buffers do not fit the spec or hold what no weight can have (see `unpack`).
        """
        if self.prepacked is not None or not self.loaded:
            return
        q = self.unpack()
        backend = choose(self.spec, q)
        if backend is not None:
            self.prepacked = backend(q, self.spec)
            for local in self._packed:
                setattr(self, local, None)

    def empty(self) -> None:
        """Forget the weight and the bias: the buffers are on the meta device, to be filled again."""
        self._release()
        super().empty()
        if self.bias is not None:
            self.bias = torch.empty_like(self.bias, device="meta")

    def undo_prepack(self) -> None:
        """Return to the tensors of the file and to the reference."""
        for local, t in self.file_tensors().items():
            setattr(self, local, t)
        self._release()

    def _release(self) -> None:
        if self.prepacked is not None:
            self.prepacked.leave()
        self.prepacked = None

    def file_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the file by their local names, without the bias."""
        if self.prepacked is not None:
            tensors = self.fmt.pack(self.prepacked.restore(), self.spec)
            return {local: tensors[local].to(dtype).reshape(shape) for local, (dtype, shape) in self._packed.items()}
        return super().file_tensors()

    def unpack(self) -> QTensor:
        """See `PackedWeight.unpack`."""
        return super().unpack() if self.prepacked is None else self.prepacked.restore()

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` `[..., K]` to `[..., N]` in the dtype of `x`."""
        bias, prepacked = self.bias, self.prepacked
        if prepacked is not None:
            return prepacked.affine(x, bias)
        return reference.linear(
            x, self.unpack(), self.spec.scheme.activation, None if bias is None else bias.to(x.dtype)
        )

    def extra_repr(self) -> str:
        """Describe the layer the way `nn.Linear` does."""
        grid = self.spec.scheme.weight
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"bits={grid.bits}, {grid.granularity}, format={self.fmt.quant_method}, backend={self.backend}"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.prepacked is not None:
            destination.update({prefix + local: t for local, t in self.file_tensors().items()})

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if self.prepacked is not None and any(prefix + local in state_dict for local in self._packed):
            self.undo_prepack()
        before = self.bias
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._changed(before)

    def _changed(self, before: Tensor | None) -> None:
        """Tell who holds the bias that it is another one."""
        if self.bias is not before and self.prepacked is not None:
            self.prepacked.leave()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """See `PackedWeight._apply`."""
        away = self.prepacked is not None and leaves(self.prepacked, fn)
        if away:
            self.undo_prepack()
        before = self.bias
        super()._apply(fn, recurse)
        self._changed(before)
        if away:
            self.prepack()
        return self
