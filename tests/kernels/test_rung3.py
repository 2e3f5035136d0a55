"""Rung 3: the kernels' own host code, with every launch simulated on the PTX compiled for sm_80.

Checked of each: the answer, against float64 rounded once; no race, no uninitialised read, no access out of bounds;
the sectors that the weights cost against their packed bytes; shared-memory wavefronts against the fewest possible,
frozen at what was measured. That the simulator sees faults is shown on these kernels too, at the end.
"""

from __future__ import annotations

import re

import pytest
import torch
from llmq_kernels import int8, weight_only
from llmq_kernels.layout import dequantize, pack
from llmq_kernels.tune import Config
from ptxsim import PtxError
from ptxsim.launch import SimulatedKernel

HALF = {torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Half a unit in the last place, relative: rounding the answer once."""
FLOAT32_SUM = 2e-6
"""Error of a float32 sum, relative to the sum of magnitudes, with room for splits and groups."""
CONFLICTS = {"W4A16": 1.0, "W8A16": 1.0, "W2A16": 1.0, "W3A16": 1.0, "W8A8": 1.0}
"""Wavefronts per ideal wavefront of any kind of shared access: none of these kernels has a bank conflict."""
SECTORS = 1.05


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def simulated(monkeypatch, module, *names, mutate=lambda ptx: ptx):
    """Put simulated kernels in place of the module's; return the list that their launches go to."""
    launches: list = []
    for name in names:
        monkeypatch.setattr(module, name, SimulatedKernel(getattr(module, name), launches, mutate))
    return launches


def weight(bits, group, N, K, dtype, *, zero, g_idx=None):
    draw = generator(bits)
    G = K // group if group else 1
    codes = torch.randint(0, 2**bits, (N, K), generator=draw, dtype=torch.uint8)
    scale = (torch.rand(N, G, generator=draw) * 0.02 + 0.005).to(dtype)
    zeros = torch.randint(0, 2**bits, (N, G), generator=draw, dtype=torch.int32) if zero else None
    return pack(codes, scale, zeros, bits, g_idx=g_idx)


def assert_close(y, x, W, bias=None):
    """Compare with x W^T + bias in float64, allowing one rounding of the answer and a float32 sum."""
    want = x.double() @ W.double().t()
    room = FLOAT32_SUM * (x.double().abs() @ W.double().abs().t())
    if bias is not None:
        want = want + bias.double()
    excess = (y.double() - want).abs() - want.abs() * HALF[y.dtype] - room
    assert excess.max() <= 0, f"off by {excess.max():.2e} more than rounding"


def assert_sound(launches, name):
    for launched in launches:
        assert not launched.run.faults, (launched.name, launched.run.faults)
        for kind, waves in launched.run.wavefronts.items():
            assert waves.actual <= CONFLICTS[name] * waves.ideal, (launched.name, kind, waves)


def assert_weights_read_once(launched, w, m_tiles=1):
    words, params = (launched.run.traffic(n) for n in ("w_ptr", "param_ptr"))
    packed = w.words.numel() * w.words.element_size() + w.params.numel() * w.params.element_size()
    assert (words.sectors + params.sectors) * 32 <= SECTORS * packed * m_tiles
    assert words.distinct * 32 == w.words.numel() * w.words.element_size()


def run_weight_only(monkeypatch, w, x, config, bias=None, **how):
    launches = simulated(monkeypatch, weight_only, "weight_only_kernel", "sum_splits_kernel", **how)
    return weight_only.launch(x, w, bias, config), launches


DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


@DTYPES
@pytest.mark.parametrize("zero", [False, True], ids=["sym", "asym"])
def test_w4a16_decode(monkeypatch, dtype, zero):
    """Two splits of four tiles each: the pipeline fills, runs and drains; a second kernel adds the splits."""
    w = weight(4, 128, 256, 1024, dtype, zero=zero)
    x = torch.randn(5, 1024, generator=generator()).to(dtype)
    config = weight_only.configs(5, w)[0]
    assert config.split_k == 2
    y, launches = run_weight_only(monkeypatch, w, x, config)
    assert [launched.name for launched in launches] == ["weight_only_kernel", "sum_splits_kernel"]
    assert_close(y, x, dequantize(w))
    assert_sound(launches, "W4A16")
    assert_weights_read_once(launches[0], w)
    tensor_cores = "f16.f16" if dtype == torch.float16 else "bf16.bf16"
    assert launches[0].run.executed[f"mma.sync.aligned.m16n8k16.row.col.f32.{tensor_cores}.f32"]
    assert not any(op.startswith("cvt.rn") and ".s" in op for op in launches[0].run.executed), "codes by conversion"


@pytest.mark.parametrize(
    ("group", "N", "K", "M"),
    [(32, 136, 160, 3), (0, 200, 96, 1), (64, 128, 320, 16)],
    ids=["g32 tails", "channel tails", "g64"],
)
def test_w4a16_shapes_that_do_not_fit(monkeypatch, group, N, K, M):
    """N past a tile, K past a tile, one split, a bias: what is padded must not show."""
    w = weight(4, group, N, K, torch.float16, zero=True)
    x = torch.randn(M, K, generator=generator()).half()
    bias = torch.randn(N, generator=generator(1)).half()
    y, launches = run_weight_only(monkeypatch, w, x, Config(16, 128, 1, 4, 4), bias)
    assert_close(y, x, dequantize(w), bias)
    assert_sound(launches, "W4A16")


def test_w4a16_act_order(monkeypatch):
    g_idx = torch.randperm(256, generator=generator(9)) // 64
    w = weight(4, 64, 128, 256, torch.float16, zero=True, g_idx=g_idx)
    x = torch.randn(2, 256, generator=generator()).half()
    y, launches = run_weight_only(monkeypatch, w, x, Config(16, 128, 1, 4, 4))
    assert_close(y, x[:, w.order], dequantize(w))
    assert_sound(launches, "W4A16")


def test_w4a16_batch_of_many_tiles_reads_weights_once_per_tile(monkeypatch):
    w = weight(4, 128, 128, 256, torch.float16, zero=True)
    x = torch.randn(70, 256, generator=generator()).half()
    config = weight_only.configs(70, w)[0]
    y, launches = run_weight_only(monkeypatch, w, x, config)
    assert_close(y, x, dequantize(w))
    assert_sound(launches, "W4A16")
    assert_weights_read_once(launches[0], w, m_tiles=-(-70 // config.BM))


@DTYPES
@pytest.mark.parametrize("bits", [8, 3, 2])
def test_other_bits(monkeypatch, dtype, bits):
    w = weight(bits, 64, 128, 512, dtype, zero=bits != 8)
    x = torch.randn(4, 512, generator=generator()).to(dtype)
    y, launches = run_weight_only(monkeypatch, w, x, Config(16, 128, 1, 4, 4))
    assert_close(y, x, dequantize(w))
    assert_sound(launches, f"W{bits}A16")
    assert_weights_read_once(launches[0], w)


@DTYPES
@pytest.mark.parametrize("splits", [1, 2])
def test_w8a8(monkeypatch, dtype, splits):
    """int32 sums are exact, so the answer must equal the reference to the last bit."""
    draw = generator()
    codes = torch.randint(-128, 128, (200, 640), generator=draw, dtype=torch.int8)
    w = int8.pack(codes, torch.rand(200, generator=draw) * 0.01 + 0.001)
    x = torch.randn(5, 640, generator=draw).to(dtype)
    bias = torch.randn(200, generator=draw).to(dtype)
    launches = simulated(monkeypatch, int8, "quantize_kernel", "int8_kernel", "sum_int32_kernel")
    q, scale = int8.quantize(x, w.q.shape[1])
    want_q, want_scale = int8.quantize_reference(x)
    assert torch.equal(q[:, :640], want_q) and torch.equal(scale, want_scale) and not q[:, 640:].any()
    y = int8.launch(q, scale, w, bias, Config(16, 128, splits, 4, 4), dtype)
    want = int8.reference(x, w, bias=bias)
    assert (y - want).abs().max() <= want.abs().max() * HALF[dtype]
    assert_sound(launches, "W8A8")
    product = launches[1].run
    assert product.executed["mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"]
    assert product.traffic("w_ptr").sectors * 32 <= SECTORS * w.q.numel()


# The simulator's own proof, on the kernel that matters most.

MUTATIONS = {
    "barrier before the copies": (r"\tbar\.sync \t0;(?=[^$]*cp\.async\.c[ag]\.)", -1, "", "fault"),
    "barriers after the waits": (r"(wait_group \t\d+;\n)\tbar\.sync \t0;", None, r"\1", "fault"),
    "every wait": (r"\tcp\.async\.wait_group \t\d+;", None, "", "fault"),
    "waits one stage short": (
        r"(cp\.async\.wait_group \t)([1-9]\d*)", None, lambda m: m[1] + str(int(m[2]) + 5), "fault"),
    "a commit": (r"\tcp\.async\.commit_group;", -1, "", "fault"),
    "nibble mask": (r"0x000F000F", 0, "0x000F001F", "answer"),
    "lop3 table": (r"0xEA", -1, "0xFA", "answer"),
    "shift": (r"(shr\.b32 t, \S+,) 8;", 0, r"\1 4;", "answer"),
    "swapped lanes": (r"(ldmatrix\S+ \{%r\d+), (%r\d+), (%r\d+)", 0, r"\1, \3, \2", "answer"),
    "swapped fragment": (r"(mma\S+ \{[^}]*\}, \{[^}]*\}, \{) (%r\d+), (%r\d+)", 0, r"\1 \3, \2", "answer"),
    "another mma": (r"f32\.f16\.f16\.f32", 0, "f32.bf16.bf16.f32", "answer"),
    "predicate of the store": (r"@(%p\d+) st\.global", 0, r"@!\1 st.global", "error"),
    "offset of a copy": (r"(cp\.async\.cg\S+ \[ %r\d+ \+ 0 \], \[ %rd\d+ \+) 0", 1, r"\1 16", "answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_w4a16_kernel_is_caught(monkeypatch, name):
    pattern, which, replacement, expected = MUTATIONS[name]

    def mutate(ptx):
        found = list(re.finditer(pattern, ptx))
        assert found, f"nothing matches {pattern}"
        for match in reversed(found) if which is None else [found[which]]:
            new = replacement(match) if callable(replacement) else match.expand(replacement)
            ptx = ptx[: match.start()] + new + ptx[match.end() :]
        return ptx

    w = weight(4, 128, 128, 1024, torch.float16, zero=True)
    x = torch.randn(5, 1024, generator=generator()).half()
    try:
        y, (launched,) = run_weight_only(monkeypatch, w, x, Config(16, 128, 1, 4, 4), mutate=mutate)
    except PtxError:
        assert expected == "error"
        return
    if launched.run.faults:
        assert expected == "fault"
        return
    with pytest.raises(AssertionError, match="more than rounding"):
        assert_close(y, x, dequantize(w))
    assert expected == "answer"
