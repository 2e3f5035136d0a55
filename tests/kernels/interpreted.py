"""Rung 1, run under TRITON_INTERPRET=1 by the tests: every kernel on small odd shapes against its reference.

Prints one JSON object: by case, SQNR in dB against the float32 reference (1000 where equal), or true where bits agree.
bf16 arithmetic is wrong in Triton's interpreter, so that bf16 is left to the compiled kernels.
"""

import json
import math

import panels
import torch

from llmq_kernels import (
    activation,
    attention,
    e2m1,
    fp8,
    grouped,
    grouped_int8,
    int8,
    kv,
    layout,
    product,
    routing,
    tune,
    weight_only,
)
from llmq_kernels.decode import decode

Config = tune.Config


def sqnr(found, wanted):
    wanted = wanted.double()
    noise = (wanted - found.double()).square().sum().item()
    return 10 * math.log10(wanted.square().sum().item() / noise) if noise else 1000.0


def make_weight(gen, bits, N, K, group, zero, order=False, dtype=torch.float16):
    G = 1 if group is None else K // group
    codes = torch.randint(0, 2**bits, (N, K), generator=gen, dtype=torch.uint8)
    scale = (torch.rand(N, G, generator=gen) * 0.02 + 0.005).to(dtype)
    zeros = torch.randint(0, 2**bits, (N, G), generator=gen) if zero else None
    g_idx = torch.arange(K)[torch.randperm(K, generator=gen)] // group if order else None
    return layout.pack(codes, scale, zeros, bits, g_idx=g_idx)


WEIGHT_ONLY = {
    # name: (bits, M, N, K, group, zero, order, config)
    "w4 g128 asym, N and K not of a tile, split": (4, 5, 100, 384, 128, True, False, Config(8, 64, 2, 4, 2)),
    "w4 g32 sym, K of 5 groups": (4, 3, 64, 160, 32, False, False, Config(16, 64, 1, 4, 2)),
    "w4 g64 asym, act-order": (4, 2, 33, 192, 64, True, True, Config(8, 64, 1, 4, 2)),
    "w4 channel asym, M beyond a tile": (4, 17, 64, 160, None, True, False, Config(8, 64, 2, 4, 2)),
    "w4 g96 sym": (4, 1, 64, 288, 96, False, False, Config(16, 64, 1, 4, 2)),
    "w4 more splits than tiles divide": (4, 1, 64, 640, 128, True, False, Config(16, 64, 4, 4, 2)),
    "w8 channel sym": (8, 3, 64, 200, None, False, False, Config(8, 64, 1, 4, 2)),
    "w8 g32 asym": (8, 3, 70, 96, 32, True, False, Config(16, 64, 1, 4, 2)),
    "w8 g64 asym": (8, 2, 64, 192, 64, True, False, Config(16, 64, 2, 4, 2)),
    "w2 g64 asym": (2, 3, 64, 320, 64, True, False, Config(8, 64, 1, 4, 2)),
    "w3 g64 asym": (3, 3, 50, 320, 64, True, False, Config(16, 64, 1, 4, 2)),
    "w3 channel sym": (3, 1, 64, 544, None, False, False, Config(8, 64, 1, 4, 2)),
}


def weight_only_cases():
    gen = torch.Generator().manual_seed(0)
    for name, (bits, M, N, K, group, zero, order, config) in WEIGHT_ONLY.items():
        w = make_weight(gen, bits, N, K, group, zero, order)
        x, bias = torch.randn(M, K, generator=gen).half(), torch.randn(N, generator=gen).half()
        yield name, sqnr(weight_only.launch(x, w, bias, config), weight_only.reference(x.float(), w, bias))
        yield f"{name}: decoded", decoded_alike(w, decode, layout.dequantize(w))
    for zero in (True, False):
        w, x = make_weight(gen, 4, 64, 192, 32, zero, dtype=torch.float32), torch.randn(3, 192, generator=gen).half()
        y = weight_only.launch(x, w, None, Config(8, 64, 1, 4, 2), torch.float32)
        yield f"float32 scales, zeros {zero}", sqnr(y, weight_only.reference(x.float(), w))
        yield f"float32 scales, zeros {zero}: decoded", decoded_alike(w, decode, layout.dequantize(w))
    w = make_weight(gen, 4, 100, 192, 64, True, order=True)
    bias = torch.randn(100, generator=gen).half()
    for dtype, bound in ((torch.float16, "rounded"), (torch.float32, "float32")):
        x = torch.randn(1, 513, 192, generator=gen).to(dtype)
        found = weight_only.linear(x, w, bias.to(dtype))
        yield f"513 tokens, {bound}", sqnr(found, weight_only.reference(x.float(), w, bias.float()))
    w = make_weight(gen, 4, 64, 512, 128, True)
    x = torch.randn(2, 512, generator=gen).half()
    runs = [weight_only.launch(x, w, None, Config(16, 64, 4, 4, 2)) for _ in range(2)]
    yield "split-K twice", torch.equal(*runs)
    yield "no tokens", list(weight_only.launch(x[:0], w, None, Config(16, 64, 1, 4, 2)).shape) == [0, 64]


def decoded_alike(w, decode, wanted):
    """Decode the whole weight, and what is behind its first 64 rows, in every dtype."""
    for dtype in (torch.float16, torch.float32):
        for first in range(0, w.N, 64):
            found = torch.full((w.N - first, w.K), torch.nan, dtype=dtype)
            decode(w, found, first)
            if not torch.equal(found, wanted[first:].to(dtype)):
                return False
    return True


def joined_alike(module, weights, *given):
    """Multiply by weights joined into one, by their parts, and by each as it was; split over K and not."""
    whole, parts = getattr(module, "join", layout.join)(weights)
    for config in (Config(8, 64, 2, 4, 2), Config(16, 64, 1, 4, 2)):
        y, begin = module.launch(*given, whole, None, config, torch.float32), 0
        for w, part in zip(weights, parts, strict=True):
            alone, as_part = (module.launch(*given, each, None, config, torch.float32) for each in (w, part))
            if not torch.equal(y[:, begin : begin + w.N], alone) or not torch.equal(as_part, alone):
                return False
            begin += w.Np
    return True


def join_cases():
    gen = torch.Generator().manual_seed(7)
    x = torch.randn(3, 320, generator=gen).half()
    for bits, zero in ((4, True), (3, False)):
        weights = [make_weight(gen, bits, N, 320, 64, zero) for N in (70, 128, 33)]
        yield f"joined, {bits} bits", joined_alike(weight_only, weights, x)
    floats = [
        e2m1.pack(torch.randint(0, 16, (N, 320), generator=gen, dtype=torch.uint8),
                  torch.randint(1, 127, (N, 20), generator=gen).to(torch.uint8), e8m0=False, factor=0.01)
        for N in (40, 64)
    ]  # fmt: skip
    yield "joined, e2m1", joined_alike(e2m1, floats, x)
    ints = [
        int8.pack(torch.randint(-128, 128, (N, 320), generator=gen).to(torch.int8), torch.rand(N, generator=gen))
        for N in (70, 64)
    ]
    yield "joined, int8", joined_alike(int8, ints, *activation.quantize(x, 384))
    _, parts = layout.join([make_weight(gen, 4, N, 320, 64, True) for N in (70, 64)])
    yield "joined: decoded", all(decoded_alike(p, decode, layout.dequantize(p)) for p in parts)


def e2m1_weight(gen, N, K, group, factor=0.013):
    codes = torch.randint(0, 16, (N, K), generator=gen, dtype=torch.uint8)
    scales = torch.randint(*((118, 130) if group == 32 else (0, 127)), (N, K // group), generator=gen)
    return e2m1.pack(codes, scales.to(torch.uint8), e8m0=group == 32, factor=factor)


EXPERTS = {
    # name: (bits, N by linear, K, group, zero, config)
    "experts w4 g64 asym, two linears, K split": (4, (70, 33), 320, 64, True, Config(8, 64, 2, 4, 2)),
    "experts w8 channel sym": (8, (40,), 200, None, False, Config(8, 64, 1, 4, 2)),
    "experts w3 channel asym": (3, (50,), 544, None, True, Config(8, 64, 1, 4, 2)),
    "experts w2 g64 sym": (2, (64,), 320, 64, False, Config(16, 64, 1, 4, 2)),
}


def grouped_cases():
    """Of six experts 1 has no pair, 2 has one, 4 more than a tile; one choice is nobody's."""
    gen = torch.Generator().manual_seed(5)
    index = torch.tensor([[4, 0], [0, 2], [4, 3], [3, 5], [4, 5], [5, 4], [4, 3], [0, 4], [4, 5], [4, 0], [4, 6]])
    plan = routing.plan(index, 6)
    for name, (bits, sizes, K, group, zero, config) in EXPERTS.items():
        rows = [[make_weight(gen, bits, N, K, group, zero) for N in sizes] for _ in range(6)]
        w = grouped.Routed(grouped.stack(rows)[0], plan)
        x, bias = torch.randn(11, K, generator=gen).half(), torch.randn(7, w.N, generator=gen).half()
        bias[6] = 0
        found = grouped.launch(x[:, None], w, bias, config, torch.float32)
        yield name, sqnr(found, grouped.reference(x[:, None].float(), w, bias))
        yield f"{name}: nobody's row", not found[-1, 1].any()
        if len(sizes) > 1:
            pairs = grouped.Routed(w.weight, plan.of_pairs)
            again = grouped.launch(x.repeat_interleave(2, 0)[:, None], pairs, bias, config, torch.float32)
            yield f"{name}: a row of x for each pair", torch.equal(again.view_as(found), found)
            yield f"{name}: one by one", alone_alike(x, index, rows, w, config)
    rows = [[e2m1_weight(gen, N, 208, 16, N * (e + 1) / 9999) for N in (70, 33)] for e in range(6)]
    w, x = grouped.Routed(grouped.stack(rows)[0], plan), torch.randn(11, 208, generator=gen).half()
    for config in (Config(8, 64, 2, 4, 2), Config(16, 64, 1, 4, 2)):
        found = grouped.launch(x[:, None], w, None, config, torch.float32)
        yield f"experts nvfp4 {config}", sqnr(found, grouped.reference(x[:, None].float(), w))
    for wide in (x.float() * 1e5, x):
        found = grouped.linear(wide, w.weight, plan)
        yield f"experts nvfp4 {wide.dtype}, rounded", sqnr(found, grouped.reference(wide[:, None].float(), w))
    for tokens, top, experts in ((1, 1, 1), (1, 8, 128), (700, 2, 6)):
        index = torch.randint(0, experts + 3, (tokens, top), generator=gen)
        found, wanted = routing.launch(index, experts), routing.reference(index, experts)
        yield f"plan of {tokens} tokens, {experts} experts", all(map(torch.equal, found, wanted))


def alone_alike(x, index, rows, w, config):
    """Multiply by each linear of each expert alone, the tokens that are sent to it."""
    found, begin = grouped.launch(x[:, None], w, None, config, torch.float32), 0
    for place, of_one in enumerate(zip(*rows, strict=True)):
        for e, each in enumerate(of_one):
            alone = weight_only.launch(x, each, None, config, torch.float32)
            for choice in (0, 1):
                mine = index[:, choice] == e
                if not torch.equal(found[mine, choice, begin : begin + each.N], alone[mine]):
                    return False
        begin += rows[0][place].Np
    return True


def grouped_int8_cases():
    """As above; each expert has the bits that it has alone. All sums of these floats are float32's, in any order."""
    gen = torch.Generator().manual_seed(9)
    config = Config(16, 64, 1, 4, 2)
    ints = [
        [int8.pack(torch.randint(-128, 128, (N, 200), generator=gen).to(torch.int8), torch.rand(N, generator=gen))
         for N in (70, 33)]
        for _ in range(6)
    ]  # fmt: skip
    x = torch.randn(11, 200, generator=gen).half()

    def of_ints(x, w, static, bias):
        return int8.launch(*activation.quantize(x, 256, static), w, bias, config, x.dtype)

    yield from grouped_codes_cases("w8a8", ints, x, torch.tensor([0.02]), config, of_ints)

    def eighths(N):
        codes = (torch.randint(-15, 16, (N, 208), generator=gen) / 8).to(fp8.E4M3).view(torch.uint8)
        return fp8.pack(codes, torch.rand(N, generator=gen))

    x = torch.randint(-14, 15, (11, 208), generator=gen).half() * 32
    x[:, 7] = 448
    x *= 0.5 ** (torch.arange(11) % 3)[:, None]  # scales of tokens: 1, 1/2, 1/4
    floats = [[eighths(64), eighths(48)] for _ in range(6)]
    yield from grouped_codes_cases("fp8", floats, x, torch.ones(1), config, fp8.reference)


def grouped_codes_cases(kind, rows, x, scale_of_all, config, alone):
    """Of six experts of which one is nobody's. alone: what multiplies with one weight."""
    gen = torch.Generator().manual_seed(10)
    index = torch.tensor([[4, 0], [0, 2], [4, 3], [3, 5], [4, 5], [5, 4], [4, 3], [0, 4], [4, 5], [4, 0], [4, 6]])
    w, plan = grouped_int8.stack(rows)[0], routing.plan(index, 6)
    bias, N = torch.randn(7, w.one.N, generator=gen).half(), rows[0][0].N
    bias[6] = 0
    for static in (None, scale_of_all):
        name = f"experts {kind} {'token' if static is None else 'static'}"
        q, scale = activation.Quantizing(x, 256, is_static=static is not None, e4m3=w.e4m3)(x, static)
        how = grouped_int8.How(x.dtype, static is not None, has_bias=True, e4m3=w.e4m3)
        found = grouped_int8.planned(11, w, plan, config, how)(q, scale, w, plan, bias)
        wanted = grouped_int8.reference(q, scale, w, plan, bias, x.dtype)
        yield f"{name}: rounded", sqnr(found, wanted)
        yield f"{name}: nobody's row", not found[-1, 1].any()
        yield f"{name}: chosen", torch.equal(grouped_int8.linear(x, w, plan, static, bias), found)
        again = x.repeat_interleave(2, 0)
        alike = grouped_int8.linear(again, w, plan.of_pairs, static, bias).view_as(found)
        yield f"{name}: a row of x for each pair", torch.equal(alike, found)
        for e in (0, 4):
            t, j = (index == e).nonzero(as_tuple=True)
            yield f"{name}: {e} alone", torch.equal(found[t, j, :N], alone(x[t], rows[e][0], static, bias[e, :N]))


E2M1 = {
    # name: (M, N, K, group, config)
    "e2m1 nvfp4, N and K not of a tile, split": (5, 100, 208, 16, Config(8, 64, 2, 4, 2)),
    "e2m1 nvfp4, M beyond a tile": (17, 64, 64, 16, Config(16, 64, 1, 4, 2)),
    "e2m1 mxfp4, K of 5 groups": (3, 70, 160, 32, Config(8, 64, 1, 4, 2)),
    "e2m1 mxfp4, more splits than tiles divide": (2, 64, 640, 32, Config(16, 64, 4, 4, 2)),
}


def e2m1_cases():
    gen = torch.Generator().manual_seed(3)
    for name, (M, N, K, group, config) in E2M1.items():
        w = e2m1_weight(gen, N, K, group)
        x, bias = torch.randn(M, K, generator=gen).half(), torch.randn(N, generator=gen).half()
        wanted = e2m1.reference(x.float(), w, bias)
        yield name, sqnr(e2m1.launch(x, w, bias, config, torch.float32), wanted)
        yield f"{name}: decoded", decoded_alike(w, e2m1.decode, e2m1.dequantize(w))
        many = torch.randn(product.FEW + 1, K, generator=gen).half()
        for rows in (many, many[:3], many[:3].float()):
            rounded = sqnr(e2m1.linear(rows, w), e2m1.reference(rows.float(), w))
            yield f"{name}: {len(rows)} tokens of {rows.dtype}, rounded", rounded


def int8_cases():
    gen = torch.Generator().manual_seed(1)
    for name, M, N, K, static, config in (
        ("w8a8, odd shapes", 5, 70, 200, False, Config(16, 64, 1, 4, 2)),
        ("w8a8 split", 3, 64, 384, False, Config(16, 64, 2, 4, 2)),
        ("w8a8 static", 18, 64, 128, True, Config(16, 64, 1, 4, 2)),
    ):
        w = int8.pack(
            torch.randint(-128, 128, (N, K), generator=gen).to(torch.int8), torch.rand(N, generator=gen) * 0.01
        )
        x, bias = torch.randn(M, K, generator=gen).half(), torch.randn(N, generator=gen).half()
        x[0] *= 30
        scale = torch.tensor([0.02]) if static else None
        q, x_scale = activation.quantize(x, w.q.shape[1], scale)
        wanted_q, wanted_scale = activation.quantize_reference(x, scale)
        yield f"{name}: codes", torch.equal(q[:, :K], wanted_q) and not q[:, K:].any()
        yield f"{name}: scales", torch.equal(x_scale, wanted_scale)
        found = int8.launch(q, x_scale, w, bias, config, torch.float32)
        wanted = int8.reference(x, w, scale, bias)
        yield name, sqnr(found, (wanted_q.double() @ w.q[:N, :K].double().t()) * wanted_scale.double()[:, None]
                         * w.scale[:N].double() + bias)  # fmt: skip
        yield f"{name}: rounded", sqnr(wanted, found)
        by_library = int8.launch(q, x_scale, w, bias, tune.LIBRARY, torch.float32)
        yield (
            f"{name}: by the library",
            torch.equal(by_library, int8.launch(q, x_scale, w, bias, config, torch.float32)),
        )
    zero_row = torch.zeros(1, 40).half()
    q, scale = activation.quantize(zero_row, 128)
    yield "w8a8, a row of zeros", not q.any() and scale.item() == torch.finfo(torch.float16).eps


def fp8_cases():
    """Of activations whose quotients meet every code, its neighbours' middles and what is beside them."""
    gen = torch.Generator().manual_seed(8)
    codes = torch.arange(0x7F, dtype=torch.uint8).view(fp8.E4M3).float()
    middles = (codes[1:] + codes[:-1]) / 2
    every = torch.cat([codes, middles, middles * (1 + 2**-20), middles * (1 - 2**-20), torch.tensor([1e4, 1e-9])])
    every = torch.cat([every, -every, torch.zeros(1024 - 2 * len(every))])
    rows = torch.stack([every, every.flip(0) * 0.37, torch.zeros(1024), torch.randn(1024, generator=gen)])
    w = fp8.pack(torch.randint(0, 0x7F, (48, 1024), generator=gen, dtype=torch.uint8), torch.rand(48, 1) * 0.01)
    bias = torch.randn(48, generator=gen)
    for dtype, x in ((torch.float32, rows), (torch.float16, rows.half())):
        for static in (None, torch.tensor([1.0])):
            name = f"fp8 {dtype} {'token' if static is None else 'static'}"
            q, scale = activation.Quantizing(x, 1024, is_static=static is not None, e4m3=True)(x, static)
            wanted_q, wanted_scale = fp8.quantize_reference(x, static)
            yield f"{name}: codes", torch.equal(q, wanted_q.view(torch.uint8))
            yield f"{name}: scales", torch.equal(scale, wanted_scale)
            found, wanted = fp8.compute(x, w, static, bias.to(dtype)), fp8.reference(x, w, static, bias.to(dtype))
            yield f"{name}: rounded", torch.equal(found, wanted) or sqnr(found, wanted)
    whole, parts = fp8.join([w, w])
    yield "joined, fp8", torch.equal(fp8.compute(x, whole)[:, 48:], fp8.compute(x, parts[0]))


def same(found, wanted):
    return all(
        torch.equal(getattr(found, n), getattr(wanted, n)) for n in ("k_words", "k_params", "v_words", "v_params")
    )


def kv_cases():
    gen = torch.Generator().manual_seed(2)
    B, H = 2, 2
    for name, bits, sym, D, GQ, TQ, parts in (
        ("kv8 sym, one token, grouped", 8, True, 64, 4, 1, 2),
        ("kv8 asym, D 80, three tokens", 8, False, 80, 3, 3, 1),
        ("kv4 asym, more rows than a program", 4, False, 64, 8, 3, 3),
        ("kv4 sym, D 128", 4, True, 128, 1, 1, 2),
    ):
        found = kv.empty(B, H, 150, D, bits, sym=sym, device="cpu")
        wanted = kv.empty(B, H, 150, D, bits, sym=sym, device="cpu")
        k, v = (torch.randn(B, 140, H, D, generator=gen).half().transpose(1, 2) for _ in range(2))
        k[0, 0, 3] = 0
        lengths = torch.zeros(B, dtype=torch.int32)
        for take in (slice(0, 137), slice(137, 140)):
            for x, words, params in ((k, found.k_words, found.k_params), (v, found.v_words, found.v_params)):
                kv.launch_append(x[:, :, take], words, params, lengths, None, bits, sym=sym)
            kv.append(wanted, k[:, :, take], v[:, :, take], lengths)
            lengths = lengths + take.stop - take.start
        yield f"{name}: cache", same(found, wanted) and bool(found.k_words[:, :, :140].any())
        lengths = torch.tensor([TQ + 30, 140], dtype=torch.int32)
        q = torch.randn(B, H * GQ, TQ, D, generator=gen).half()
        y = attention.launch(q, found, lengths, D**-0.5, parts)
        yield f"{name}: rounded", sqnr(y, attention.reference(q.float(), found, lengths, D**-0.5))
        for W in (TQ, max(1, TQ - 2)):  # all new tokens are in the window, or some are in the cache already
            window = tuple(torch.randn(B, H, W, D, generator=gen).half() for _ in range(2))
            y = attention.launch(q, found, lengths, D**-0.5, parts, window)
            wanted = attention.reference(q.float(), found, lengths, D**-0.5, window)
            yield f"{name}: window of {W}, rounded", sqnr(y, wanted)
    acc, top = torch.randn(B * H, 70, 3, 64, generator=gen), 9 * torch.randn(B * H, 70, 3, generator=gen)
    acc[:, 40:], top[:, 40:] = 1e9, -1e30  # hidden from every row
    stat = torch.stack([top, torch.rand(B * H, 70, 3, generator=gen) + 1], -1)
    y = torch.empty(B, H * 3, 1, 60, dtype=torch.float16)
    attention.merge_kernel[(B * H, 3)](acc, stat, y, 1, 70, GQ=3, D=60, DP=64)
    weight = torch.exp2(top - top.amax(1, keepdim=True)).double()
    wanted = (weight[..., None] * acc).sum(1) / (weight * stat[..., 1]).sum(1)[..., None]
    yield "merge of 70 chunks, rounded", sqnr(y, wanted[..., :60].reshape(y.shape))
    static = torch.tensor([0.01, 0.02])
    found = kv.empty(B, H, 16, 64, 8, sym=True, device="cpu")
    start = torch.tensor([0, 14], dtype=torch.int32)
    kv.launch_append(k[:, :, :5, :64], found.k_words, found.k_params, start, static, 8, sym=True)
    wanted = kv.quantize_reference(k[:, :, :5, :64], 8, sym=True, static=static)
    fits = torch.equal(found.k_words[0, :, :5], wanted[0][0]) and torch.equal(
        found.k_words[1, :, 14:], wanted[0][1, :, :2]
    )
    yield "kv8 static, and nothing beyond the end", fits and not found.k_words[1, :, :14].any()


if __name__ == "__main__":
    print(
        json.dumps(
            dict(
                [
                    *weight_only_cases(),
                    *join_cases(),
                    *grouped_cases(),
                    *grouped_int8_cases(),
                    *e2m1_cases(),
                    *int8_cases(),
                    *fp8_cases(),
                    *kv_cases(),
                    *panels.cases(),
                ]
            )
        )
    )
