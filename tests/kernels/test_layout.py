"""Prepacking loses nothing, in every bit width, and refuses what the kernel cannot take."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq_kernels import layout, tune, weight_only
from llmq_kernels.errors import KernelError


def make(bits, N, K, G, zero, seed=0, dtype=torch.float16):
    gen = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (N, K), generator=gen, dtype=torch.uint8)
    scale = (torch.randn(N, G, generator=gen).abs() + 1e-5).to(dtype)
    zeros = torch.randint(0, 2**bits, (N, G), generator=gen, dtype=torch.int32) if zero else None
    return codes, scale, zeros


@settings(max_examples=40)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    N=st.integers(1, 140),
    groups=st.integers(1, 7),
    group=st.sampled_from([32, 64, 96, 128]),
    zero=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_unpack_undoes_pack(bits, N, groups, group, zero, dtype):
    codes, scale, zeros = make(bits, N, groups * group, groups, zero, dtype=dtype)
    found_codes, found_scale, found_zero = layout.unpack(layout.pack(codes, scale, zeros, bits))
    assert torch.equal(found_codes, codes)
    assert torch.equal(found_scale, scale.float())
    assert torch.equal(found_zero, zeros if zero else torch.full_like(found_zero, 2 ** (bits - 1)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_padded_size_is_that_of_the_bits(bits):
    w = layout.pack(*make(bits, 128, 1024, 8, False), bits)
    assert w.words.numel() * 16 == 128 * 1024 * bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_without_zeros_are_kept_as_they_are(dtype):
    codes, scale, _ = make(4, 130, 256, 8, False, dtype=dtype)
    w = layout.pack(codes, scale, None, 4)
    assert torch.equal(w.params[:, :130], scale.t()) and w.params.is_contiguous()
    assert w.params.stride(0) == w.words.stride(0)


@pytest.mark.parametrize(("zero", "bits"), [(False, [4.5, 4.125]), (True, [4.625, 4.25])])
def test_groups_of_32_take_at_most_a_tenth_more_bytes_than_groups_of_128(zero, bits):
    """What memory says to 'at most 15 % slower': half scales of groups of 32 take half a bit, zeros an eighth."""
    packed = (layout.pack(*make(4, 128, 1024, 1024 // g, zero), 4) for g in (32, 128))
    size = [(w.words.nbytes + w.params.nbytes) * 8 / 128 / 1024 for w in packed]
    assert size == bits and bits[0] <= 1.1 * bits[1]


@pytest.mark.parametrize(("bits", "group", "sub"), [(2, 32, 32), (4, 32, 32), (4, 96, 32), (8, 32, 32), (8, 64, 64)])
def test_a_row_behind_every_tile_holds_the_zeros_of_its_fields(bits, group, sub):
    codes, scale, zeros = make(bits, 40, 7 * group, 7, True)
    w = layout.pack(codes, scale, zeros, bits)
    each = zeros.repeat_interleave(group // sub, 1)  # of every field
    rows = w.words.reshape(-1, sub + 1, 128)[:, sub, :40].int()
    fields = torch.stack([rows >> bits * j & 2**bits - 1 for j in range(16 // bits)], 1).flatten(0, 1).t()
    assert torch.equal(fields[:, : each.shape[1]], each) and not fields[:, each.shape[1] :].any()
    assert w.Kp == len(rows) * sub * 16 // bits
    assert torch.equal(w.params[:7, :40], scale.t()) and w.rest is None


@pytest.mark.parametrize(
    ("bits", "group", "dtype"), [(4, 128, torch.float16), (3, 32, torch.float16), (4, 32, torch.float32)]
)
def test_other_zeros_lie_in_the_low_bits_of_their_scales(bits, group, dtype):
    w = layout.pack(*make(bits, 40, 4 * group, 4, True, dtype=dtype), bits)
    assert w.params.dtype == torch.int32 and not w.zeros_beside
    assert w.words.shape[0] == w.Kp * bits // 16


def test_weights_whose_scales_differ_in_dtype_are_not_joined():
    codes, scale, _ = make(4, 40, 256, 4, False)
    with pytest.raises(KernelError, match="scales' dtype"):
        layout.join([layout.pack(codes, s, None, 4) for s in (scale, scale.float())])


def test_float32_scales_give_their_low_bits_to_zeros_and_get_them_back():
    codes, scale, zeros = make(4, 40, 256, 4, True, dtype=torch.float32)
    w = layout.pack(codes, scale, zeros, 4)
    found_codes, found_scale, found_zero = layout.unpack(w)
    assert w.rest is not None and torch.equal(found_scale, scale)
    assert torch.equal(found_codes, codes) and torch.equal(found_zero, zeros)
    cut = layout.unpack(layout.PackedWeight(w.words, w.params, None, 40, 256, 4, 64, True))[1]
    assert not torch.equal(cut, scale) and ((cut / scale - 1).abs() <= 2**-15).all()
    exact = (codes - zeros.repeat_interleave(64, 1)).float() * cut.repeat_interleave(64, 1)
    assert torch.equal(layout.dequantize(w), exact)
    assert layout.pack(codes, scale, None, 4).rest is None
    assert torch.equal(w.to("cpu").rest, w.rest)


def test_field_j_of_row_r_is_column_j_sub_plus_r():
    codes = torch.zeros(128, 256, dtype=torch.uint8)
    codes[7, 128 + 2 * 32 + 5] = 9  # tile 1, field 2, row 5
    words = layout.pack(codes, torch.ones(128, 2).half(), None, 4).words
    assert words[32 + 5, 7] == 9 << 8
    assert words.count_nonzero() == 1


def test_three_words_hold_five_codes_of_three_bits_each_and_a_bit_of_the_sixteenth():
    codes = torch.zeros(128, 512, dtype=torch.uint8)
    codes[7, 11 * 32 + 5] = 6  # field 11: the second of the third word
    codes[9, 15 * 32 + 5] = 5
    words = layout.pack(codes, torch.ones(128, 4).half(), None, 3).words.reshape(3, 32, 128)
    assert words[2, 5, 7] == 6 << 3
    assert words[:, 5, 9].tolist() == [-(2**15), 0, -(2**15)]
    assert words.count_nonzero() == 3


def test_act_order_sorts_the_columns_by_group():
    codes, scale, zeros = make(4, 40, 256, 4, True)
    g_idx = torch.arange(256)[torch.randperm(256, generator=torch.Generator().manual_seed(3))] // 64
    w = layout.pack(codes, scale, zeros, 4, g_idx=g_idx)
    wanted = (codes - zeros[:, g_idx]).float() * scale.float()[:, g_idx]
    x = torch.randn(5, 256)
    assert torch.equal(layout.dequantize(w), wanted[:, w.order])
    torch.testing.assert_close(x[:, w.order] @ layout.dequantize(w).t(), x @ wanted.t(), rtol=1e-5, atol=1e-3)


def test_natural_order_keeps_no_permutation():
    codes, scale, _ = make(4, 8, 128, 2, False)
    assert layout.pack(codes, scale, None, 4, g_idx=torch.arange(128) // 64).order is None


def test_a_zero_in_the_middle_everywhere_is_symmetric():
    codes, scale, zeros = make(4, 8, 128, 2, True)
    assert not layout.pack(codes, scale, torch.full_like(zeros, 8), 4).has_zero


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, s, z: (c, s, z, 5), "5-bit"),
        (lambda c, s, z: (c[:, :120], s, z, 4), "multiple of 32"),
        (lambda c, s, z: (c.int(), s, z, 4), "uint8"),
        (lambda c, s, z: (c + 8, s, z, 4), "beyond 4 bits"),
        (lambda c, s, z: (c, s, z + 8, 4), "a zero lies outside"),
        (lambda c, s, z: (c, s, z[:, :1], 4), "must be alike"),
        (lambda c, s, z: (c[:1].expand(2**26, 128), s[:1].expand(2**26, 2), None, 4), "32-bit offsets"),
    ],
)
def test_what_it_cannot_take_is_refused(change, message):
    with pytest.raises(KernelError, match=message):
        layout.pack(*change(*make(4, 8, 128, 2, True)))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("M", [1, 16, 17, 64, 65, 4096])
@pytest.mark.parametrize("N", [1, 128, 129, 1024])
@pytest.mark.parametrize("asm", [True, False])
def test_every_configuration_stays_within_the_padded_weight(bits, M, N, asm):
    w = layout.pack(*make(bits, N, 512, 4, False), bits)
    found = weight_only.configs(M, w, asm=asm, groups=asm)
    assert found
    assert (found[0].BM == 8) == (M == 1 and asm)  # AMD has no product of 8 tokens
    for config in set(found) - {tune.LIBRARY}:
        assert w.words.shape[1] % config.BN == 0
        assert 1 <= config.split_k <= 512 // layout.tile(bits, 128)


def test_uneven_groups_of_act_order_are_refused():
    codes, scale, zeros = make(4, 8, 128, 2, True)
    with pytest.raises(KernelError, match="equal groups"):
        layout.pack(codes, scale, zeros, 4, g_idx=torch.tensor([0] * 65 + [1] * 63))
