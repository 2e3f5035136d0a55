"""Codes as ONNX's operators store them: decoded here by their definition, in plain integers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmq.grids.int import Int
from llmq.grids.nvfp4 import Nvfp4
from llmq.onnx.packing import in_order, integers, n_bits, pack, require_held
from llmq.types import LinearSpec, LlmqError, Params, QTensor, Scheme


def solved(bits, K, G, *, sym=True, N=6, g_idx=None):
    draw = torch.Generator().manual_seed(bits * K + G)
    codes = torch.randint(0, 2**bits, (N, K), generator=draw).to(torch.uint8)
    zero = torch.full((N, G), 2 ** (bits - 1)) if sym else torch.randint(0, 2**bits, (N, G), generator=draw)
    scale = torch.randn(N, G, generator=draw).half()
    return QTensor(codes, Params(scale, zero.int()), Int(bits=bits, sym=sym, group=K // G), g_idx)


def unpacked(words, bits, n):
    """Return the integers of a row of bytes, by a string of bits with the last byte first."""
    text = "".join(f"{int(word):08b}" for word in reversed(words.tolist()))
    return [int(text[len(text) - (i + 1) * bits : len(text) - i * bits], 2) for i in range(n)]


@settings(max_examples=25)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 40))
def test_low_bits_come_first(bits, n):
    codes = torch.randint(0, 2**bits, (3, n)).to(torch.uint8)
    words = pack(codes, bits)
    assert words.shape == (3, -(-n * bits // 8))
    assert [unpacked(row, bits, n) for row in words] == codes.tolist()


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("bits", "held"), [(2, 2), (3, 4), (4, 4), (6, 8), (8, 8)])
@pytest.mark.parametrize(("K", "G"), [(192, 1), (100, 1), (96, 2), (256, 2)])
def test_matmulnbits_means_the_same_weight(bits, held, K, G, sym):
    q = solved(bits, K, G, sym=sym)
    made = n_bits(q, "w")
    N, count = made.scales.shape
    assert made.bits == held and count == -(-K // made.block) and made.block in (16, 32, 64, 128)
    codes = torch.tensor([[unpacked(word, held, made.block) for word in row] for row in made.words])
    middle = torch.full((N, count), 2 ** (held - 1))
    zeros = middle if made.zeros is None else torch.tensor([unpacked(row, held, count) for row in made.zeros])
    values = (codes - zeros[..., None]) * made.scales.float()[..., None]
    assert torch.equal(values.reshape(N, -1)[:, :K], q.dequantize())
    assert (made.zeros is None) == (sym and bits == held)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(("bits", "held"), [(2, 4), (3, 4), (4, 4), (7, 8), (8, 8)])
@pytest.mark.parametrize("G", [1, 4])
def test_dequantizelinear_means_the_same_weight(bits, held, G, sym):
    q = solved(bits, 96, G, sym=sym)
    made = integers(q)
    assert made.kind == f"{'' if sym else 'U'}INT{held}" and made.block == (0 if G == 1 else 24)

    def whole(stored, shape):
        values = torch.tensor(unpacked(stored, held, torch.Size(shape).numel())).reshape(shape)
        return torch.where(values >= 2 ** (held - 1), values - 2**held, values) if sym else values

    scales = made.scales.float().reshape(G, -1)
    zeros = 0 if made.zeros is None else whole(made.zeros, scales.shape).repeat_interleave(96 // G, 0)
    values = (whole(made.values, (96, 6)) - zeros) * scales.repeat_interleave(96 // G, 0)
    assert torch.equal(values.T, q.dequantize())
    assert (made.zeros is None) == (sym and held == 4)


def test_groups_in_the_order_of_the_activations_become_an_order_of_the_input():
    g_idx = torch.randperm(64, generator=torch.Generator().manual_seed(1)) % 2
    q = solved(4, 64, 2, g_idx=g_idx.int())
    plain, order = in_order(q, "w")
    x = torch.randn(3, 64)
    assert plain.g_idx is None and torch.allclose(x[:, order] @ plain.dequantize().T, x @ q.dequantize().T, atol=1e-5)
    assert in_order(solved(4, 64, 2, g_idx=torch.arange(64).int() // 32), "w")[1] is None


def test_what_no_operator_holds_is_refused_by_name():
    with pytest.raises(LlmqError, match="w: its groups have different numbers of columns"):
        in_order(solved(4, 64, 2, g_idx=torch.tensor([0] * 40 + [1] * 24).int()), "w")
    with pytest.raises(LlmqError, match="w: groups of 24 columns, but MatMulNBits has blocks of 16, .*--to onnx:qdq"):
        n_bits(solved(4, 96, 4), "w")
    with pytest.raises(LlmqError, match="w: ONNX's .* hold integer codes, not Nvfp4; decode it"):
        require_held(LinearSpec("w", 4, 32, Scheme(Nvfp4())), blocks=False)
    odd = LinearSpec("w", 4, 96, Scheme(Int(group=24)))
    with pytest.raises(LlmqError, match="w: groups of 24 columns"):
        require_held(odd, blocks=True)
    require_held(odd, blocks=False)
