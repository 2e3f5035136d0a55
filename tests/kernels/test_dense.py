"""The library's product of panels: of what it is made, and when the tuner is offered it."""

import pytest
import torch
import torch.nn.functional as F

from llmq_kernels import dense, e2m1, int8, tune, weight_only
from llmq_kernels.layout import PackedWeight


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("N", "K", "cache"), [(70, 48, 1 << 20), (300, 64, 64 * 64 * 4 * 2), (1000, 40, 1)])
def test_panels_are_half_the_cache_one_block_and_the_whole_product(monkeypatch, N, K, cache, with_bias):
    monkeypatch.setattr(dense, "l2_cache", lambda device: cache)
    W, x = torch.randn(N, K), torch.randn(5, K, requires_grad=True)
    bias = torch.randn(N, requires_grad=True) if with_bias else None
    panels = []

    def decode(out, first):
        panels.append((first, len(out), out.data_ptr()))
        out.copy_(W[first : first + len(out)])

    y = dense.product(x, N, decode, bias)
    torch.testing.assert_close(y, F.linear(x, W, bias))
    assert not y.requires_grad
    firsts, rows, blocks = zip(*panels, strict=True)
    assert firsts == tuple(sum(rows[:i]) for i in range(len(rows))) and sum(rows) == N
    assert all(first % dense.ROWS == 0 for first in firsts)
    assert len(set(blocks)) == 1
    assert max(rows) <= max(dense.ROWS, cache // 2 // (K * 4))
    assert rows[0] - rows[-1] <= dense.ROWS * len(rows)


@pytest.mark.parametrize(("cache", "panels"), [(50 << 20, 9), (40 << 20, 12), (4 << 20, 112), (1 << 40, 1)])
def test_even_panels_of_a_large_layer(cache, panels):
    """28672 x 4096 in fp16: 224 MB, of which each panel is at most half the cache."""
    rows = dense.panel_rows(28672, 4096, 2, cache)
    assert -(-28672 // rows) == panels and rows * 4096 * 2 <= cache // 2 and rows % 64 == 0


def integers(bits):
    empty = torch.empty(0, device="meta")
    return PackedWeight(empty, empty, None, 4096, 4096, bits, 128, True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_tuner_is_offered_the_library_from_33_tokens_on_and_last_until_512(bits):
    w = integers(bits)
    assert tune.LIBRARY not in weight_only.configs(32, w, asm=True)
    for M, place in ((33, -1), (512, -1), (513, 0), (4096, 0)):
        configs = weight_only.configs(M, w, asm=True)
        assert configs[place] == tune.LIBRARY and configs.count(tune.LIBRARY) == 1 and len(configs) > 1


def test_nothing_else_multiplies_many_tokens_with_e2m1():
    words = torch.empty(1024, 4096, device="meta")
    w = e2m1.E2M1Weight(words, words, 4096, 4096, 16, False)
    assert e2m1.configs(33, w, asm=True) == [tune.LIBRARY] and tune.LIBRARY not in e2m1.configs(32, w, asm=True)


def test_int8_products_of_the_library_are_offered_where_cuda_has_them(monkeypatch):
    assert tune.LIBRARY not in int8.configs(16, 4096)
    assert all(tune.LIBRARY in int8.configs(M, 4096) for M in (17, 64, 4096))
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert tune.LIBRARY not in int8.configs(64, 4096)


def test_int8_sums_of_the_library_keep_to_multiples_of_8(monkeypatch):
    w = int8.pack(torch.randint(-128, 128, (70, 200), dtype=torch.int8), torch.ones(70))
    q = F.pad(torch.randint(-128, 128, (20, 200), dtype=torch.int8), (0, 56))
    product, shapes = torch._int_mm, []
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: (shapes.append((a.shape, b.shape)), product(a, b))[1])
    sums = int8._library_sums(q, w)
    assert torch.equal(sums, q[:, :200].int() @ w.q[:70, :200].int().t()) and sums.is_contiguous()
    assert shapes == [((20, 256), (256, 72))]
