"""Unsigned codes to int32 words and back, along the last dim, least significant bit first, no bit unused.

Code i of a row takes bits `i*b .. i*b + b-1` of the row's bit string; word r is bits `32r .. 32r + 31`.

    4 bits   |c7|c6|c5|c4|c3|c2|c1|c0|                          one word, highest bit left
    3 bits   |.10|c9| ... |c1|c0|  |.21|c20| ... |c11|10'|  |c31| ... |c22|21'|
              c10 and c21 straddle words: their low bits (.10, .21) end one word, the rest begins the next

Words are handled as bytes in the machine's little-endian order (x86, ARM and every GPU): a few codes fill a few bytes
exactly (two 4-bit codes one byte, eight 3-bit codes three), so that nothing wider than a byte is ever allocated and
the sign bit of a word is a bit like any other.
Not here: which dim is packed, in which order, and what a code means (gptq.py, awq.py, compressed_tensors.py).
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def width(n: int, bits: int) -> int:
    """Return how many int32 words hold `n` codes."""
    return -(-n * bits // 32)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes `[..., n]` of 1 to 8 bits into int32 words `[..., width(n, bits)]`; unused high bits are 0.

    Raises ValueError for a code above `2**bits - 1`, which would spill into its neighbour.
    """
    if codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
    n = codes.shape[-1]
    per, size = _unit(bits)
    units = -(-n // per)
    units_of_codes = _resize(codes, units * per).unflatten(-1, (units, per))
    out = codes.new_zeros(*codes.shape[:-1], units, size)
    for i in range(per):
        byte, shift = divmod(i * bits, 8)
        code = units_of_codes[..., i]
        out[..., byte] |= code << shift
        if shift + bits > 8:
            out[..., byte + 1] |= code >> (8 - shift)
    in_bytes = _resize(out.flatten(-2), 4 * width(n, bits))
    return in_bytes.reshape(-1).view(torch.int32).view(*codes.shape[:-1], width(n, bits))


def unpack_words(words: Tensor, bits: int, n: int) -> Tensor:
    """Unpack int32 words `[..., width(n, bits)]` into uint8 codes `[..., n]`, contiguous and not aliasing `words`."""
    per, size = _unit(bits)
    units = -(-n // per)
    in_bytes = words.reshape(-1).view(torch.uint8).view(*words.shape[:-1], 4 * words.shape[-1])
    in_bytes = _resize(in_bytes, units * size).unflatten(-1, (units, size))
    out = in_bytes.new_empty(*words.shape[:-1], units, per)
    for i in range(per):
        byte, shift = divmod(i * bits, 8)
        code = in_bytes[..., byte] >> shift
        if shift + bits > 8:
            code |= in_bytes[..., byte + 1] << (8 - shift)
        torch.bitwise_and(code, 2**bits - 1, out=out[..., i])
    return out.flatten(-2)[..., :n].contiguous()


def _unit(bits: int) -> tuple[int, int]:
    """Return the fewest codes that fill whole bytes, and how many bytes."""
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def _resize(x: Tensor, n: int) -> Tensor:
    """Cut the last dim of `x` to `n`, or extend it with zeros."""
    return x if x.shape[-1] == n else pad(x, (0, n - x.shape[-1]))
