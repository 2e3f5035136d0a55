"""Codes to float inside registers: `code - zero` in fp16 or bf16, exactly, without an int-to-float conversion.

A float whose exponent makes one unit in the last place equal 1 holds a small integer in its low mantissa bits:

    fp16  0x6400 | (q << k)  =  1024 + q * 2^k      10 mantissa bits
    bf16  0x4300 | (q << k)  =   128 + q * 2^k       7 mantissa bits

so a field anywhere in the mantissa is masked, or-ed and brought back by one fma: `x * 2^-k - (base * 2^-k + zero)`.
Every step is exact, and the result is the integer `code - zero` itself. A word is shifted only for fields beyond the
mantissa: of the four nibbles of an int16, fp16 reads two from the word and two from the word shifted by 8. Of 16 codes
of 3 bits, each of three words holds five and one bit of the last; the words are shifted by 9, 8 and 7, so that these
bits lie side by side, and the last code costs two instructions more than the others.
Eight bits do not fit bf16's mantissa; there a byte is `16 * (high - zero_high) + (low - zero_low)`, also exact.

The words are int16 lanes; the inline PTX works on the two lanes of a 32-bit register at once (`lop3` is (a & b) | c).
Every function has a branch without assembly (ASM = False), which AMD compiles and Triton's interpreter runs.
Such magic numbers are described for Marlin (arXiv:2408.11743); the layout and the fields without shifts are ours.

Beside it, what a parameter word holds. Not here: where words come from (layout.py), what the results multiply
(weight_only.py, decode.py).
"""

import triton
import triton.language as tl
from triton import constexpr_function

from llmq_kernels.layout import FIELDS


@constexpr_function
def fields_of(bits):
    """Return how many sub-dots a tile has."""
    return FIELDS[bits]


@constexpr_function
def group_run(group, sub, fields):
    """Return how many neighbouring sub-dots share a scale."""
    if group == 0:
        return fields
    a, b = group // sub, fields
    while b:
        a, b = b, a % b
    return a


@constexpr_function
def _mantissa(dtype):
    return 10 if dtype == tl.float16 else 7


@constexpr_function
def _base(dtype):
    return 2 ** _mantissa(dtype)


@constexpr_function
def _place(j, bits, dtype):
    """Return (shift, k): field j of a word of `bits`-bit fields lies at bit k of the word shifted right by `shift`.

    Of 3 bits, field j is field j % 5 of the word j // 5, and field 15 bit 15 of every word: at bit k of the first.
    """
    per_window = _mantissa(dtype) // bits
    if bits != 3:
        return j // per_window * per_window * bits, j % per_window * bits
    if j == 15:
        shift = _place(4, 3, dtype)[0]
        return shift, 15 - shift
    word, field = j // 5, j % 5
    window = field // per_window
    shift = window * per_window * 3 - (word if window == 4 // per_window else 0)
    return shift, field * 3 - shift


@constexpr_function
def _shift(j, bits, dtype):
    return _place(j, bits, dtype)[0]


@constexpr_function
def _scale(j, bits, dtype):
    """Return 2^-k."""
    return 2.0 ** -_place(j, bits, dtype)[1]


@constexpr_function
def _mask(j, bits, dtype):
    return (2**bits - 1) << _place(j, bits, dtype)[1]


@constexpr_function
def _magic_text(dtype):
    """Return the magic exponent of two lanes."""
    return "0x64006400" if dtype == tl.float16 else "0x43004300"


@constexpr_function
def _field_text(j, bits, dtype):
    """Return PTX for two lanes: $0 = magic | (($1 >> shift) & mask)."""
    lop3 = f"0x{_mask(j, bits, dtype) * 0x10001:08X}, {_magic_text(dtype)}, 0xEA;"
    shift = _shift(j, bits, dtype)
    if not shift:
        return f"lop3.b32 $0, $1, {lop3}"
    return f"{{ .reg .b32 t; shr.b32 t, $1, {shift}; lop3.b32 $0, t, {lop3} }}"


@constexpr_function
def _last_text(dtype):
    """Return PTX for two lanes: $0 = magic | bit 15 of each of the words $1, $2 and $3, at bits k, k + 1 and k + 2."""
    k = _place(15, 3, dtype)[1]
    text, found = "", _magic_text(dtype)
    for word, to in enumerate(("t", "t", "$0")):
        mask = f"0x{(1 << k + word) * 0x10001:08X}"
        text += f"shr.b32 u, ${word + 1}, {15 - k - word}; lop3.b32 {to}, u, {mask}, {found}, 0xEA; "
        found = to
    return f"{{ .reg .b32 t; .reg .b32 u; {text}}}"


@triton.jit
def _magic(field, dtype: tl.constexpr):
    """Return the float `base + field` of an int16 field that fits the mantissa."""
    if dtype == tl.float16:
        return (field | 0x6400).to(tl.float16, bitcast=True)
    else:
        return (field | 0x4300).to(tl.bfloat16, bitcast=True)


@triton.jit
def _zero(z, default: tl.constexpr, dtype: tl.constexpr):
    """Return `base + z`, or where z is None the constant `base + default`."""
    if z is None:
        return tl.full((), _base(dtype) + default, dtype)
    else:
        return _magic(z, dtype)


@triton.jit
def _field(w, j: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Return `base + 2^k * field j` of every int16 lane, by assembly."""
    text: tl.constexpr = _field_text(j, BITS, dtype)
    if dtype == tl.float16:
        return tl.inline_asm_elementwise(text, "=r,r", [w], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(text, "=r,r", [w], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def _last_field(w, w1, w2, dtype: tl.constexpr):
    """Return `base + 2^k * field 15` of three words of 3-bit fields, by assembly."""
    text: tl.constexpr = _last_text(dtype)
    if dtype == tl.float16:
        return tl.inline_asm_elementwise(text, "=r,r,r,r", [w, w1, w2], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return tl.inline_asm_elementwise(text, "=r,r,r,r", [w, w1, w2], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def _unscale(x, zero, j: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Return `code - zero` from `base + 2^k * code` and `base + zero`."""
    SCALE: tl.constexpr = _scale(j, BITS, dtype)
    if SCALE == 1.0:
        return x - zero
    else:
        return x * SCALE - (zero - (_base(dtype) - _base(dtype) * SCALE))


@constexpr_function
def zeros_beside(has_zero, params):
    """Return whether zeros lie in a row of words of every tile: where there are any and `params` holds floats."""
    return has_zero and params != tl.int32


@triton.jit
def scale_of(word, HAS_ZERO: tl.constexpr):
    """Return the float32 scale of a parameter: the upper 24 bits above an 8-bit zero point, all 32 bits, or a float."""
    if HAS_ZERO and word.dtype == tl.int32:
        return (word & ~0xFF).to(tl.float32, bitcast=True)
    elif word.dtype == tl.int32:
        return word.to(tl.float32, bitcast=True)
    else:
        return word.to(tl.float32)


@triton.jit
def zero_of(word):
    """Return the int16 zero point of a parameter word that has one."""
    return (word & 0xFF).to(tl.int16)


@triton.jit
def zero_field(zeros, j: tl.constexpr, BITS: tl.constexpr):
    """Return the int16 zero points that are field j of words of zeros."""
    return (zeros >> (BITS * j)) & (2**BITS - 1)


@triton.jit
def code_minus_zero(w, z, j: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Return `code - zero` of field j of an int16 tile; z: int16 zeros that broadcast, None for half of the codes."""
    if BITS == 8 and dtype == tl.bfloat16:
        return _byte_bf16(w, z, j, ASM)
    elif ASM:
        return _unscale(_field(w, j, BITS, dtype), _zero(z, 2 ** (BITS - 1), dtype), j, BITS, dtype)
    else:
        code = (w >> (BITS * j)) & (2**BITS - 1)
        return _magic(code, dtype) - _zero(z, 2 ** (BITS - 1), dtype)


@triton.jit
def code_minus_beside(w, zeros, j: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Return `code - zero` of field j of an int16 tile, whose zero is field j of the int16 words `zeros`, one a row.

    A thread has an even number of rows, which the assembly takes two at a time, as the first operand of tensor cores.
    """
    if ASM and not (BITS == 8 and dtype == tl.bfloat16):
        SCALE: tl.constexpr = _scale(j, BITS, dtype)
        return _field(w, j, BITS, dtype) * SCALE - (_field(zeros, j, BITS, dtype) * SCALE)[:, None]
    else:
        return code_minus_zero(w, zero_field(zeros, j, BITS)[:, None], j, BITS, dtype, ASM)


@triton.jit
def code3_minus_zero(w, w1, w2, z, j: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr):
    """Return `code - zero` of field j of three words of 3-bit codes; see `_place`."""
    if j < 15:
        return code_minus_zero(w if j < 5 else w1 if j < 10 else w2, z, j if ASM else j % 5, 3, dtype, ASM)
    elif ASM:
        return _unscale(_last_field(w, w1, w2, dtype), _zero(z, 4, dtype), j, 3, dtype)
    else:
        code = ((w >> 15) & 1) | ((w1 >> 14) & 2) | ((w2 >> 13) & 4)
        return _magic(code, dtype) - _zero(z, 4, dtype)


@triton.jit
def field_minus_zero(
    w, w1, w2, z, j: tl.constexpr, BITS: tl.constexpr, BESIDE: tl.constexpr, dtype: tl.constexpr, ASM: tl.constexpr
):
    """Return `code - zero` of field j of a tile; w1, w2: its other words of 3 bits. z: as for the function called."""
    if BITS == 3:
        return code3_minus_zero(w, w1, w2, z, j, dtype, ASM)
    elif BESIDE:
        return code_minus_beside(w, z, j, BITS, dtype, ASM)
    else:
        return code_minus_zero(w, z, j, BITS, dtype, ASM)


@triton.jit
def _byte_bf16(w, z, j: tl.constexpr, ASM: tl.constexpr):
    """Return `byte j - z` in bf16: (16 * high - 16 * high zero - 128) + (128 + low - low zero)."""
    if ASM:
        low = _field(w, 2 * j, 4, tl.bfloat16)
        high = _field(w, 2 * j + 1, 4, tl.bfloat16)
    else:
        low = _magic((w >> (8 * j)) & 0xF, tl.bfloat16)
        high = _magic((w >> (8 * j + 4)) & 0xF, tl.bfloat16)
    # Multiples of 16 up to 2496 are bf16 numbers, and so is every sum and difference below.
    if z is None:
        return (high * 16.0 - 2304.0) + low
    else:
        high_zero = _magic((z >> 4) & 0xF, tl.bfloat16) * 16.0 + 128.0
        return (high * 16.0 - high_zero) + (low - (_magic(z & 0xF, tl.bfloat16) - 128.0))
