"""Quantized keys and values: what a code means, append-only growth, attention against softmax in float64."""

from __future__ import annotations

import pytest
import torch

import llmq_kernels.kv
from llmq.runtime.kv import RUN, KVGrid, Store, attend, dequantize, quantize

GRIDS = {f"{bits}_{axis}": KVGrid(bits, axis) for bits in (8, 4, 2) for axis in ("token", "channel")}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def states(T: int, dtype: torch.dtype = torch.float32, D: int = 32, seed: int = 0) -> torch.Tensor:
    """Keys with outlier channels that are not centred, as real ones are."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, T, D, generator=random)
    return (x * torch.logspace(-1, 1, D) + torch.linspace(-3, 3, D)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GRIDS)
def test_no_value_is_further_than_half_a_step(name, dtype):
    grid = GRIDS[name]
    x = states(2 * RUN, dtype)
    packed = quantize(x, grid)
    y = dequantize(packed, grid, torch.float32)
    dim = 2 if grid.axis == "channel" else 3
    scale = packed.scale.float()  # one with a zero in its lowest bits is off by less than 2^-15
    scale = scale.repeat_interleave(RUN, dim=2) if grid.axis == "channel" else scale
    edge = 2**-7 * x.float().abs().amax(dim, keepdim=True)  # the rounding of scale and low, at the ends of the range
    assert ((y - x.float()).abs() <= scale / 2 + edge).all()
    assert packed.codes.dtype == (torch.int8 if grid.bits == 8 else torch.uint8)
    assert packed.codes.shape[3] == 32 * grid.bits // 8
    short = torch.float16 if dtype == torch.float16 else torch.bfloat16
    assert packed.scale.dtype == (torch.float32 if packed.low is None else short)
    assert (packed.low is None) == (name not in ("4_channel", "2_channel"))


@pytest.mark.parametrize("name", GRIDS)
def test_fewer_bits_are_worse_and_all_zeros_stay_zero(name, decibel):
    grid, x = GRIDS[name], states(2 * RUN)
    got = decibel(dequantize(quantize(x, grid), grid, torch.float32), x)
    assert {8: 38, 4: 17, 2: 4}[grid.bits] < got < {8: 60, 4: 30, 2: 18}[grid.bits]
    zeros = torch.zeros_like(x)
    assert torch.equal(dequantize(quantize(zeros, grid), grid, torch.float32), zeros)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", ["outliers", "above zero", "all zeros", "one far off", "tiny"])
def test_codes_and_scales_are_those_of_the_kernels_bit_for_bit(kind, bits, dtype):
    """Their reference, which tests/kernels holds against the kernels themselves, on cases where a half bin matters."""
    x = {
        "outliers": states(7, D=64),
        "above zero": states(7, D=64).abs() + 3,
        "all zeros": torch.zeros(2, 3, 7, 64),
        "one far off": states(7, D=64) * 1e-3 + 50 * (torch.arange(64) == 5),
        "tiny": states(7, D=64) * 1e-12,
    }[kind].to(dtype)
    words, params = llmq_kernels.kv.quantize_reference(x, bits, sym=bits == 8)
    packed = quantize(x, KVGrid(bits))
    mask, fields = 2**bits - 1, 16 // bits
    theirs = torch.cat([(words.int() >> bits * j) & mask for j in range(fields)], dim=-1)
    ours = packed.codes.int() + 128 if bits == 8 else torch.cat([packed.codes & 15, packed.codes >> 4], dim=-1).int()
    assert torch.equal(ours, theirs)
    assert torch.equal(packed.scale.view(torch.int32)[..., 0], params)
    want = llmq_kernels.kv.dequantize(words, params, 64, bits, sym=bits == 8)
    assert torch.equal(dequantize(packed, KVGrid(bits), torch.float32), want)


def test_channels_suit_keys_with_outlier_channels():
    """Per token, the channels of the smallest keys are lost in the steps of the largest."""
    x = states(2 * RUN)

    def error(grid: KVGrid) -> float:
        e = dequantize(quantize(x, grid), grid, torch.float32) - x
        return float((e.square().sum(2) / x.var(2)).mean())

    assert error(GRIDS["4_channel"]) < 0.2 * error(GRIDS["4_token"])


@pytest.mark.parametrize("shape", [(1,), (3, 1, 1)])
def test_static_scales_are_used_as_given(shape):
    scale = torch.full(shape, 0.1)
    grid = KVGrid(8, "token", scale)
    x = states(7)
    y = dequantize(quantize(x, grid), grid, torch.float32)
    assert torch.equal(y, (x / 0.1).round().clamp(-128, 127) * 0.1)


@pytest.mark.parametrize("name", GRIDS)
def test_what_is_stored_never_changes(name):
    grid, x = GRIDS[name], states(8 * RUN)
    store, seen = Store(grid), []
    for start in range(0, 8 * RUN, RUN):
        store.append(x[:, :, start : start + RUN])
        seen.append(store.decode(torch.float32))
    for early in seen:
        assert torch.equal(early, seen[-1][:, :, : early.shape[2]])
    assert torch.equal(seen[-1], dequantize(quantize(x, grid), grid, torch.float32))
    assert torch.equal(store.decode(torch.float32, RUN, 3 * RUN), seen[-1][:, :, RUN : 3 * RUN])


def test_the_store_is_as_small_as_its_bits():
    T, D = 64 * RUN, 64
    float_bytes = 2 * 2 * 3 * T * D
    for name, most in {"8_token": 0.5315, "4_token": 0.2815, "4_channel": 0.2815}.items():
        store = Store(GRIDS[name])
        for _ in range(T // RUN):
            store.append(states(RUN, D=D))
        assert store.nbytes <= most * float_bytes, name


def exact(q, k, v, scaling, mask):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1).double() for t in (k, v))
    return ((q.double() @ k.transpose(2, 3) * scaling).masked_fill(~mask, -torch.inf).softmax(-1) @ v).nan_to_num(0)


@pytest.mark.parametrize("sizes", [(50,), (16, 16, 18), (1, 48, 1)])
@pytest.mark.parametrize("Q", [1, 5])
def test_attention_by_tiles_is_attention(Q, sizes, decibel):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 6, Q, 32), torch.randn(2, 3, 50, 32), torch.randn(2, 3, 50, 32)
    mask = torch.rand(2, 1, Q, 50) < 0.5
    mask[..., :16] = False  # a whole tile that is not seen
    mask[0, 0, 0] = False  # a query that sees nothing
    got = attend(q, zip(k.split(sizes, 2), v.split(sizes, 2), strict=True), 0.2, lambda a, b: mask[..., a:b])
    want = exact(q, k, v, 0.2, mask)
    assert decibel(got, want) > 120
    assert torch.equal(got[0, :, 0], torch.zeros(6, 32))
    added = torch.zeros(2, 1, Q, 50).masked_fill(~mask, torch.finfo(torch.float32).min)
    again = attend(q, zip(k.split(sizes, 2), v.split(sizes, 2), strict=True), 0.2, lambda a, b: added[..., a:b])
    assert decibel(again[1], want[1]) > 120


def test_attention_to_everything(decibel):
    q, k, v = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 9, 16), torch.randn(1, 2, 9, 16)
    got = attend(q, iter([(k, v)]), 0.25, lambda a, b: None)
    assert decibel(got, exact(q, k, v, 0.25, torch.ones(1, 1, 3, 9, dtype=torch.bool))) > 120
    with pytest.raises(ValueError, match="nothing"):
        attend(q, iter([]), 0.25, lambda a, b: None)
