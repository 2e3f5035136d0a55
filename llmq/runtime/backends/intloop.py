"""Weights of 2 to 8 bits, float activations, on a CPU: loops of our own, compiled by numba.

    few rows of x:   integer dot products of the codes and of x rounded to 16 bits, a scale for each segment
    many rows:       panels of W decoded to float32, exactly as the reference does, and multiplied by torch

A segment is 128 columns at most, within a group; the layout and the arithmetic are in _int_loops.py. 3-bit codes lie in
fields of 4 bits, those of 5 to 7 bits in fields of 8. Columns are sorted by group where the checkpoint has an
activation order, and x follows.
On AVX-512 torch's own products come first (int4pack.py, int8pack.py).
"""

import importlib.util

import torch
from torch import Tensor

from llmq.runtime.backends import Prepacked, _panels, avx512, by_group, in_file_order, one_op, refuses_weight_only
from llmq.types import LinearSpec, Params, QTensor

FEW = 64
"""The most rows that go to the integer product; the times of both sides are in docs/runtime.md."""
_FIELD = {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 7: 8, 8: 8}  # bits that a code takes


class IntLoop(Prepacked):
    """A weight for loops of our own. `words` int16 `[N, S, L]`, `scale` float32 and `zero` uint8 `[N or 1, G]`."""

    name = "intloop"
    rank = 4 if avx512() else 2  # there torch's products come first
    words: Tensor
    scale: Tensor
    zero: Tensor
    order: Tensor | None
    g_idx: Tensor | None

    @classmethod
    def refuses(cls, spec: LinearSpec, device: torch.device) -> str | None:
        """See `Prepacked.refuses`."""
        bits = spec.scheme.weight.bits
        if reason := refuses_weight_only(spec, device, bits, divisor=_columns(_FIELD[bits], 8)):
            return reason
        return None if importlib.util.find_spec("numba") else "numba is not installed"

    def __init__(self, q: QTensor, spec: LinearSpec) -> None:
        super().__init__(q, spec)
        codes, order = by_group(q)
        self.field = _FIELD[q.grid.bits]
        self.lanes = 16 if self.K // q.params.scale.shape[1] % _columns(self.field, 16) == 0 else 8
        zero = Params.of(q.params).zero.to(torch.uint8)
        self.scale_dtype = q.params.scale.dtype
        self.keep(
            words=self._pack(codes),
            scale=q.params.scale.float().contiguous(),
            zero=(zero[:1] if (zero == zero[:1]).all() else zero).contiguous(),
            order=order,
            g_idx=q.g_idx,
        )

    def _pack(self, codes: Tensor) -> Tensor:
        fields = codes.view(self.N, -1, 16 // self.field, self.lanes).unbind(2)
        words = torch.zeros(fields[0].shape, dtype=torch.int16)
        for q, field in enumerate(fields):
            words |= field.to(torch.int16) << self.field * q
        return words

    def forward(self, x: Tensor) -> Tensor:
        """See `Prepacked.forward`."""
        if self.order is not None:
            x = x.index_select(-1, self.order)
        return _linear(x, self.words, self.scale, self.zero, self.field)

    def restore(self) -> QTensor:
        """See `Prepacked.restore`."""
        mask = 2**self.field - 1
        fields = [(self.words >> shift & mask).to(torch.uint8) for shift in range(0, 16, self.field)]
        codes = in_file_order(torch.stack(fields, dim=2).view(self.N, self.K), self.order)
        zero = self.zero.to(torch.int32).expand(self.scale.shape).contiguous()
        return QTensor(codes, Params(self.scale.to(self.scale_dtype), zero), self.grid, self.g_idx)


def _columns(field: int, lanes: int) -> int:
    """Return the columns of a segment."""
    return 16 // field * lanes


@one_op("(Tensor x, Tensor words, Tensor scale, Tensor zero, int field) -> Tensor", lambda words, *_: words.shape[0])
def _linear(x: Tensor, words: Tensor, scale: Tensor, zero: Tensor, field: int) -> Tensor:
    """Return `x @ W^T` in the dtype of `x`."""
    K = words.shape[1] * _columns(field, words.shape[2])
    if x.shape[-1] != K:  # what follows hands addresses on
        raise ValueError(f"the weight has {K} columns, x {x.shape[-1]}")
    x_MK = x.reshape(-1, x.shape[-1]).float()
    product = dot_product if x_MK.shape[0] <= FEW else decoded_product
    return product(x_MK, words, scale, zero, field).to(x.dtype).reshape(*x.shape[:-1], words.shape[0])


def dot_product(x_MK: Tensor, words: Tensor, scale: Tensor, zero: Tensor, field: int) -> Tensor:
    """Return `x @ W^T` in float32 with `x` rounded to 16 bits."""
    M, N = x_MK.shape[0], words.shape[0]
    y_MN = torch.empty(M, N, dtype=torch.float32)
    if M:
        _run(field, (words, scale, zero, x_MK.contiguous(), y_MN), M, decoding=False)
    return y_MN


def decoded_product(x_MK: Tensor, words: Tensor, scale: Tensor, zero: Tensor, field: int) -> Tensor:
    """Return `x @ W^T` in float32, decoding some rows of W at a time."""
    M, N = len(x_MK), words.shape[0]

    def decode(rows: slice, W: Tensor) -> None:
        z = zero[rows] if zero.shape[0] == N else zero
        _run(field, (words[rows], scale[rows], z, W), M, decoding=True)

    return _panels.product(x_MK, N, decode)


def _run(field: int, tensors: tuple[Tensor, ...], M: int, decoding: bool) -> None:
    """Run a loop over all rows of the weight."""
    from llmq.runtime.backends import _int_loops, _team

    words, scale, zero = tensors[:3]
    sizes = (decoding, field, *words.shape, scale.shape[1], zero.shape[0], M)
    _team.run(_int_loops.one_thread, _int_loops.of_many, sizes, *tensors)
