"""Stored words back to codes, scales, zeros and weights, bit by bit, by numpy alone.

Written from the formats' descriptions and sharing nothing with the code that packs (llmq/formats), so that a mistake
there cannot repeat itself here. All three formats keep codes of b bits as one string of bits, the lowest bit of the
lowest word first, along one axis; they differ in the axis, and in what stands beside:

    gptq             qweight [K*b/32, N] along K         qzeros [G, N*b/32] along N, less one in v1   scales [G, N]
                     g_idx [K]
    awq              qweight [K, N/8] along N            qzeros [G, N/8] along N                      scales [G, N]
                     both with the eight columns of a word in the order 0 2 4 6 1 3 5 7
    pack-quantized   weight_packed [N, K*b/32] along K   weight_zero_point [N*b/32, G] along N
                     weight_scale [N, G]
    int-quantized    weight int8 [N, K]                  weight_zero_point int8 [N, G]   weight_scale [N, G]

    w[n, k] = scale[n, g] * (code[n, k] - zero[n, g]),  g = g_idx[k], else k // (K / G)

Not here: which linear is stored how (packing.py), GGUF (gguf.py; its package decodes).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from llmq.verify.bits import fields
from llmq.verify.packing import Packing

Array = NDArray
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # nibble j of a word holds this one of its eight columns


@dataclass(frozen=True)
class Weight:
    """A decoded linear: codes uint8 `[N, K]`, scale float32 and zero int32 `[N, G]` or `[1, 1]`, g_idx int32 or None.

    stray: bits that belong to no code and are set.
    """

    codes: Array
    scale: Array
    zero: Array
    g_idx: Array | None = None
    stray: int = 0

    def values(self) -> Array:
        """Return the weight that a runtime multiplies with, float32 `[N, K]`."""
        N, K = self.codes.shape
        if self.g_idx is not None:
            return (self.codes.astype(np.float32) - self.zero[:, self.g_idx]) * self.scale[:, self.g_idx]
        grouped = self.codes.astype(np.float32).reshape(N, self.scale.shape[1], -1)
        grouped -= self.zero[..., None].astype(np.float32)
        grouped *= self.scale[..., None]
        return grouped.reshape(N, K)


def decode(stored: Mapping[str, Array], how: Packing, N: int, K: int) -> Weight:
    """Decode one linear from its tensors by local name; float ones are float32, `[1]` scales stay so in shape [1, 1].

    The tensors must have the shapes that `packing.shapes` says.
    """
    half = 2 ** (how.bits - 1)
    if how.method == "gptq":
        codes, stray = fields(stored["qweight"].T, how.bits, K)
        zero = _gptq_zeros(stored["qzeros"], how, N)
        return Weight(codes, stored["scales"].T, zero.T, stored.get("g_idx"), stray)
    if how.method == "awq":
        codes_KN, zero_GN = (_awq_fields(stored[name], N) for name in ("qweight", "qzeros"))
        return Weight(np.ascontiguousarray(codes_KN.T), stored["scales"].T, zero_GN.T.astype(np.int32))
    scale = stored["weight_scale"].reshape(1, 1) if how.per_tensor else stored["weight_scale"]
    stray = 0
    if how.method == "int-quantized":
        codes = (stored["weight"].astype(np.int16) + half).astype(np.uint8)
    else:
        codes, stray = fields(stored["weight_packed"], how.bits, K)
    zero = np.full(scale.shape, half, np.int32)
    if not how.sym and stored["weight_zero_point"].dtype == np.int8:
        zero = stored["weight_zero_point"].astype(np.int32).reshape(scale.shape) + half
    elif not how.sym:
        zero_GN, more = fields(stored["weight_zero_point"].T, how.bits, N)
        zero, stray = zero_GN.T.astype(np.int32), stray + more
    return Weight(codes, scale, zero, None, stray)


def _gptq_zeros(qzeros: Array, how: Packing, N: int) -> Array:
    """Return the zeros `[G, N]`. v1 subtracted a one from every field, by whole words, so that a zero of 0 borrowed.

    3-bit fields do not fill words: there the writer subtracts from each field, modulo 8.
    """
    if not how.less_one or 32 % how.bits:
        zero = fields(qzeros, how.bits, N)[0].astype(np.int32)
        return (zero + how.less_one) % 2**how.bits
    ones = sum(1 << shift for shift in range(0, 32, how.bits))
    whole = qzeros.view(np.uint32) + np.uint32(ones)
    return fields(whole.view(np.int32), how.bits, N)[0].astype(np.int32)


def _awq_fields(words: Array, n: int) -> Array:
    nibbles = fields(words, 4, n)[0].reshape(len(words), -1, 8)
    columns = np.empty_like(nibbles)
    columns[..., list(_AWQ_ORDER)] = nibbles
    return columns.reshape(len(words), n)
