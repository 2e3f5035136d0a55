"""Weights in narrow floats, decoded: a code of 8 or 4 bits for each value, a scale for each block of them.

    FP8      codes float8 [..., N, K]     w = code * scale
    FP4      codes bytes [..., N, K/2]    two E2M1 codes a byte, the even column in the low half
                                          0 0.5 1 1.5 2 3 4 6, and from code 8 on their negatives

    scale    [..., ceil(N/n), ceil(K/k)] for blocks of n x k, those at the edges cut short:
             a float, or E8M0 (a byte b, or torch's own dtype): 2^(b - 127), 255 is no number
    global   [1], of NVFP4: compressed-tensors divides the scales by it, modelopt multiplies them

The product is taken in float32, where E4M3 times a bfloat16 scale is exact, and rounded once.
Source: compressed-tensors 0.20 (`NVFP4PackedCompressor`, `MXFP4PackedCompressor`, `NaiveQuantizationCompressor`),
transformers 5.23 (`Fp8Dequantize`, `convert_moe_packed_tensors`), which the tests hold it against bit for bit; OCP
Microscaling Formats 1.0 for E2M1 and E8M0.
Not here: which tensors of a checkpoint belong together (decoding.py), integers (formats/).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.guard.reading import Entry

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
_PAIRS = torch.stack([_E2M1.repeat(16), _E2M1.repeat_interleave(16)], dim=1)  # of the codes of a byte, [256, 2]
_AT_ONCE = 2**24  # weights in float32 at a time
_DAMAGED = "the checkpoint is damaged or was cast; download it again"
Block = tuple[int, int]


@dataclass(frozen=True)
class Scaled:
    """How the values of one weight are made of its parts: codes, scales and, of NVFP4, a global scale.

    name: of the format. shape: of the weight as it is stored, `[..., N, K]`. block: rows and columns that share a
    scale. whole: what the global scale does to the others. transposed: whether the weight is read as `[..., K, N]`.
    """

    name: str
    shape: tuple[int, ...]
    block: Block
    whole: Literal["divides", "multiplies"] | None = None
    transposed: bool = False

    def __str__(self) -> str:
        """Return the format and what shares a scale, for the record."""
        (N, K), (n, k) = self.shape[-2:], self.block
        shared = {(1, K): "a scale per row", (N, K): "one scale", (N, 1): "a scale per column"}.get(self.block)
        shared = None if self.name.endswith("FP4") else shared  # whose groups are its own, however many fill a row
        return f"{self.name}, {shared or (f'groups of {k}' if n == 1 else f'blocks of {n} x {k}')}"

    def decode(self, parts: Sequence[Entry], tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the weight. parts: where its tensors lie, for messages; tensors: what they hold.

        Raises LlmqError for a scale that is not finite, or is 0 above codes that are not.
        """
        (*many, N, K), (n, k) = self.shape, self.block
        E, codes, scale = prod(many), tensors[0], _values(tensors[1], parts[1])
        if self.whole:
            scale = self._with_whole(scale, tensors[2], parts[2])
        scale = scale.reshape(-1, -(-N // n), -(-K // k)).expand(E, -1, -1)
        out = torch.empty(E, *((K, N) if self.transposed else (N, K)), dtype=dtype)
        for matrix, code_NC, scale_GG in zip(out, codes.reshape(E, N, -1), scale, strict=True):
            self._fill(matrix.T if self.transposed else matrix, code_NC, scale_GG, parts[1].name)
        return out.reshape(*many, *out.shape[1:])

    def _fill(self, W_NK: Tensor, code_NC: Tensor, scale_GG: Tensor, name: str) -> None:
        """Decode one matrix, some rows at a time. scale_GG: `[ceil(N/n), ceil(K/k)]`."""
        N, K = W_NK.shape
        n, k = min(self.block[0], N), min(self.block[1], K)
        step, even = max(n, _AT_ONCE // K // n * n), K // k * k
        holes = bool((scale_GG == 0).any())
        for at in range(0, N, step):
            code_nK = _values_of(code_NC[at : at + step])
            scale_nG = scale_GG[at // n : -(-(at + step) // n)].repeat_interleave(n, 0)[: len(code_nK)]
            blocks = code_nK[:, :even].unflatten(1, (-1, k)), scale_nG[:, : even // k, None]
            cut_short = code_nK[:, even:], scale_nG[:, even // k :]
            for code, scale in (blocks, cut_short):
                if holes and bool(((scale == 0) & (code != 0)).any()):
                    raise LlmqError(f"{name} holds a scale of 0 above weights that are not 0: {_DAMAGED}")
                code.mul_(scale)
            W_NK[at : at + step] = code_nK

    def _with_whole(self, scale: Tensor, stored: Tensor, part: Entry) -> Tensor:
        """Return the scales with the global one in them."""
        (whole,) = _values(stored, part).flatten()
        if whole == 0:
            raise LlmqError(f"{part.name} is 0, no scale: {_DAMAGED}")
        return scale / whole if self.whole == "divides" else scale * whole


def block_of(scale: tuple[int, ...], shape: tuple[int, ...], blocks: Iterable[Block]) -> Block | None:
    """Return the block of which scales of that shape are one each, None where there is none, or more than one.

    shape: of the weight, `[..., N, K]`. blocks: those that the config names. One row, one matrix and, in a tensor of
    several matrices, one column can share a scale without its saying so.
    """
    *many, N, K = shape
    lead, found = tuple(many), dict[Block, Block]()
    for n, k in (*blocks, (1, K), (N, K), *([(N, 1)] if many else [])):
        if scale == (*lead, -(-N // n), -(-K // k)) or (n == 1 and k >= K and scale == (*lead, N)):
            found.setdefault((min(n, N), min(k, K)), (n, k))
    if not found and prod(scale) == 1:
        return N, K
    return next(iter(found.values())) if len(found) == 1 else None


def _values(stored: Tensor, part: Entry) -> Tensor:
    """Return scales in float32. Raises LlmqError for one that is not finite."""
    if stored.dtype in (torch.uint8, torch.float8_e8m0fnu):
        exponent = stored.view(torch.uint8).int()
        bits = torch.where(exponent == 0, 2**22, exponent << 23)  # 2^-127 is a subnormal
        values = torch.where(exponent == 255, torch.nan, bits.view(torch.float32))
    else:
        values = stored.float()
    good = values.isfinite()
    if not bool(good.all()):
        at = (~good).nonzero()[0].tolist()
        raise LlmqError(f"{part.name}: the scale at {at} is {values[tuple(at)].item()}: {_DAMAGED}")
    return values


def _values_of(code_NC: Tensor) -> Tensor:
    """Return the values of codes, float32 `[N, K]`: of FP8 `[N, K]`, or of packed E2M1 codes, bytes `[N, K/2]`."""
    if code_NC.is_floating_point():
        return code_NC.float()
    return _PAIRS.index_select(0, code_NC.view(torch.uint8).flatten().int()).reshape(len(code_NC), -1)
