"""Words against a string of zeros and ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmq.formats._bits import pack_words, unpack_words, width

WIDTHS = (2, 3, 4, 5, 6, 7, 8)


def words_by_string(codes: list[int], bits: int) -> list[int]:
    """Signed 32-bit words of the codes' bits, written out lowest bit first."""
    string = "".join(format(c, f"0{bits}b")[::-1] for c in codes)
    string += "0" * (-len(string) % 32)
    words = [int(string[i : i + 32][::-1], 2) for i in range(0, len(string), 32)]
    return [w - 2**32 if w >= 2**31 else w for w in words]


@st.composite
def rows_of_codes(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits, n = draw(st.sampled_from(WIDTHS)), draw(st.integers(1, 70))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=n, max_size=n)
    return bits, draw(st.lists(row, min_size=1, max_size=3))


@given(rows_of_codes())
def test_pack_equals_string_and_unpack_inverts_it(case: tuple[int, list[list[int]]]) -> None:
    bits, rows = case
    codes = torch.tensor(rows, dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32 and words.is_contiguous()
    assert words.shape[-1] == width(codes.shape[-1], bits)
    assert words.tolist() == [words_by_string(row, bits) for row in rows]
    back = unpack_words(words, bits, codes.shape[-1])
    assert back.dtype == torch.uint8 and back.is_contiguous() and torch.equal(back, codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_leading_dims_and_transposed_input(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (64, 3, 2), dtype=torch.uint8).permute(2, 1, 0)
    words = pack_words(codes, bits)
    assert words.shape == (2, 3, 2 * bits)
    assert torch.equal(unpack_words(words, bits, 64), codes)
    strided = words.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert torch.equal(unpack_words(strided, bits, 64), codes)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (3, 1, 32)])
@pytest.mark.parametrize("bits", WIDTHS)
def test_single_rows_and_words(bits: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    words = pack_words(codes, bits).t().contiguous().t() if len(shape) == 2 else pack_words(codes, bits)
    assert torch.equal(unpack_words(words, bits, shape[-1]), codes)


@pytest.mark.parametrize("bits", WIDTHS)
def test_sign_bit_is_a_bit(bits: int) -> None:
    words = pack_words(torch.full((1, 32), 2**bits - 1, dtype=torch.uint8), bits)
    assert words.tolist() == [[-1] * bits]
    assert unpack_words(words, bits, 32).tolist() == [[2**bits - 1] * 32]


def test_unpack_does_not_alias() -> None:
    words = pack_words(torch.arange(8, dtype=torch.uint8)[None], 8)
    unpack_words(words, 8, 8).zero_()
    assert unpack_words(words, 8, 8).tolist() == [list(range(8))]


def test_code_too_large() -> None:
    with pytest.raises(ValueError, match="code 8 does not fit 3 bits"):
        pack_words(torch.tensor([[1, 8]], dtype=torch.uint8), 3)
