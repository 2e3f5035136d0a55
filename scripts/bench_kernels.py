"""Check every kernel against its reference on this machine's GPU, then time it.

    python scripts/bench_kernels.py [--quick]

Prints, for the layers of Llama-3-8B and 70B and M = 1, 4, 16, 64, 256: milliseconds, the bytes of the weight over that
time as a fraction of the measured copy bandwidth, and the speed-up over fp16 F.linear; beside it Marlin (vLLM), GemLite
and torchao where they are installed. The L2 cache is flushed before every run. Configurations are tuned on first use
and kept in ~/.cache/llmq_kernels. Ends with an error where a kernel is wrong, or where there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from _kernel_peers import PEERS
from torch import Tensor

from llmq_kernels import attention, int8, kv, layout, weight_only

TOKENS = (1, 4, 16, 64, 256)
SHAPES = {  # output and input features: q/k/v fused, o, gate/up fused, down
    "8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "70B": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}
MODULES = {"Marlin": "vllm", "GemLite": "gemlite", "torchao": "torchao"}
BOUND_DB = {torch.float16: 65, torch.bfloat16: 47}  # rounding to 11 and to 8 bits, less a margin


def sqnr(found: Tensor, wanted: Tensor) -> float:
    """Return the signal-to-noise ratio of `found` in dB."""
    wanted = wanted.double()
    noise = (wanted - found.double()).square().sum().item()
    return 10 * math.log10(wanted.square().sum().item() / noise) if noise else math.inf


def milliseconds(run: Callable[[], object], flush: Tensor, repeats: int = 30) -> float:
    """Return the median time of `run` with a cold L2 cache."""
    for _ in range(3):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        flush.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(b.elapsed_time(e) for b, e in events)


def copy_bandwidth(flush: Tensor) -> float:
    """Return the bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source), flush) * 1e3


def random_weight(N: int, K: int, bits: int, group: int, *, zero: bool) -> layout.PackedWeight:
    """Return a packed weight of random codes."""
    G = K // group if group else 1
    codes = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, device="cuda")
    scale = (torch.rand(N, G, device="cuda") * 0.02 + 0.005).half()
    zeros = torch.randint(0, 2**bits, (N, G), device="cuda") if zero else None
    return layout.pack(codes, scale, zeros, bits)


def checks() -> Iterator[tuple[str, float, float]]:
    """Yield (name, dB found, dB at least) of every kernel on odd shapes."""
    torch.manual_seed(0)
    for dtype, bound in BOUND_DB.items():
        for bits, group, zero in ((4, 128, True), (4, 32, False), (4, 0, True), (8, 0, False), (8, 64, True),
                                  (3, 64, True), (2, 64, True)):  # fmt: skip
            w = random_weight(1000, 1536, bits, group, zero=zero)
            for M in (1, 17, 130):
                x, bias = (
                    torch.randn(M, 1536, device="cuda", dtype=dtype),
                    torch.randn(1000, device="cuda", dtype=dtype),
                )
                wanted = weight_only.reference(x.float(), w, bias)
                found = weight_only.linear(x, w, bias)
                yield f"W{bits} g{group or 'channel'} M={M} {dtype}", sqnr(found, wanted), bound
                for config in weight_only.configs(M, w):  # not only the fastest must be right
                    again = weight_only.launch(x, w, bias, config)
                    yield f"W{bits} g{group or 'channel'} M={M} {dtype} {config}", sqnr(again, wanted), bound
        w8 = int8.pack(
            torch.randint(-128, 128, (1000, 1500), device="cuda").to(torch.int8), torch.rand(1000).cuda() / 99
        )
        for M in (1, 17, 130):
            x = torch.randn(M, 1500, device="cuda", dtype=dtype)
            q, scale = int8.quantize(x, w8.q.shape[1])
            q_ref, scale_ref = int8.quantize_reference(x)
            same = torch.equal(q[:, :1500], q_ref) and torch.equal(scale, scale_ref)
            yield f"W8A8 activation M={M} {dtype}", math.inf if same else 0.0, bound
            yield f"W8A8 M={M} {dtype}", sqnr(int8.linear(x, w8), int8.reference(x, w8)), bound
        yield from cache_checks(dtype, bound)


def cache_checks(dtype: torch.dtype, bound: float) -> Iterator[tuple[str, float, float]]:
    """Yield the checks of the key-value cache."""
    B, H, GQ, T = 2, 2, 4, 1100
    for bits, sym, D, TQ in ((8, True, 128, 1), (8, False, 80, 3), (4, False, 64, 1), (4, True, 128, 20)):
        cache = kv.empty(B, H, T, D, bits, sym=sym, device="cuda")
        k, v = (torch.randn(B, H, T, D, device="cuda", dtype=dtype) for _ in range(2))
        kv.append(cache, k, v, torch.zeros(B, dtype=torch.int32, device="cuda"))
        words, params = kv.quantize_reference(k, bits, sym=sym)
        same = torch.equal(cache.k_words[:, :, :T], words) and torch.equal(cache.k_params[:, :, :T], params)
        yield f"KV{bits} append D={D} {dtype}", math.inf if same else 0.0, bound
        q = torch.randn(B, H * GQ, TQ, D, device="cuda", dtype=dtype)
        lengths = torch.tensor([TQ + 5, T], dtype=torch.int32, device="cuda")
        wanted = attention.reference(q.float(), cache, lengths, D**-0.5)
        yield f"KV{bits} attention D={D} TQ={TQ} {dtype}", sqnr(attention.attend(q, cache, lengths), wanted), bound


def linears(N: int, K: int) -> Iterator[tuple[str, Callable[[Tensor], Tensor], float]]:
    """Yield (name, function of x, bytes of the weight) of our kernels for one layer."""
    for name, bits, group, zero in (("W4 sym g128", 4, 128, False), ("W4 asym g128", 4, 128, True),
                                    ("W8 channel", 8, 0, False), ("W3 g128", 3, 128, False),
                                    ("W2 g128", 2, 128, False)):  # fmt: skip
        w = random_weight(N, K, bits, group, zero=zero)
        yield name, lambda x, w=w: weight_only.linear(x, w), w.words.nbytes + w.params.nbytes  # type: ignore[misc]
    w8 = int8.pack(torch.randint(-128, 128, (N, K), device="cuda").to(torch.int8), torch.rand(N, device="cuda"))
    yield "W8A8", lambda x: int8.linear(x, w8), w8.q.nbytes


def bench_layer(model: str, N: int, K: int, flush: Tensor, bandwidth: float) -> None:
    """Print the rows of one layer: a kernel a row, milliseconds (fraction of bandwidth, speed-up) for each M."""
    W = torch.randn(N, K, device="cuda", dtype=torch.float16) * 0.02
    inputs = [torch.randn(M, K, device="cuda", dtype=torch.float16) for M in TOKENS]
    base = [milliseconds(lambda x=x: F.linear(x, W), flush) for x in inputs]  # type: ignore[misc]
    rows = [("fp16 F.linear", base, W.nbytes)]
    for name, run, size in linears(N, K):
        rows.append((name, [milliseconds(lambda x=x: run(x), flush) for x in inputs], size))  # type: ignore[misc] # noqa: B023
    for name, make in PEERS.items():
        if importlib.util.find_spec(MODULES[name]) is None:
            continue
        try:
            run = make(W)
            rows.append((name, [milliseconds(lambda x=x: run(x), flush) for x in inputs], 0))  # type: ignore[misc] # noqa: B023
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError) as e:
            print(f"{name} does not run: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
    for name, times, size in rows:
        cells = []
        for t, b in zip(times, base, strict=True):
            share = f"{size / t * 1e3 / bandwidth:.0%}, " if size else ""
            cells.append(f"{t:.4f} ({share}{b / t:.2f}x)")
        print(f"| {model} {N}x{K} | {name} | " + " | ".join(cells) + " |", flush=True)


def bench_attention(flush: Tensor, bandwidth: float) -> None:
    """Print attention of one new token at Llama-3-8B's head shape against fp16 scaled_dot_product_attention."""
    H, GQ, D = 8, 4, 128
    for T in (2048, 8192, 32768):
        q = torch.randn(1, H * GQ, 1, D, device="cuda", dtype=torch.float16)
        k, v = (torch.randn(1, H, T, D, device="cuda", dtype=torch.float16) for _ in range(2))
        base = milliseconds(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), flush)  # noqa: B023
        print(f"| attention T={T} | fp16 | {base:.4f} ({2 * k.nbytes / base * 1e3 / bandwidth:.0%}, 1.00x) |")
        lengths = torch.full((1,), T, dtype=torch.int32, device="cuda")
        for bits in (8, 4):
            cache = kv.empty(1, H, T, D, bits, sym=bits == 8, device="cuda")
            kv.append(cache, k, v, torch.zeros_like(lengths))
            t = milliseconds(lambda: attention.attend(q, cache, lengths), flush)  # noqa: B023
            size = 2 * (cache.k_words.nbytes + cache.k_params.nbytes)
            share = f"{size / t * 1e3 / bandwidth:.0%}"
            print(f"| attention T={T} | int{bits} | {t:.4f} ({share}, {base / t:.2f}x) |", flush=True)


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the checks, and the 8B layers only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_kernels.py needs a GPU, and torch sees none here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    wrong = 0
    count = 0
    for name, found, bound in checks():
        count += 1
        if found < bound:
            wrong += 1
            print(f"WRONG: {name}: {found:.1f} dB, expected {bound}")
    print(f"{count - wrong} of {count} checks against the references passed")
    flush = torch.empty(256 * 1024 * 1024, dtype=torch.uint8, device="cuda")
    bandwidth = copy_bandwidth(flush)
    print(
        f"measured copy bandwidth {bandwidth / 1e12:.2f} TB/s; cells: ms (weight bytes / time / bandwidth, speed-up)\n"
    )
    print("| layer | kernel | " + " | ".join(f"M={M}" for M in TOKENS) + " |\n|" + "---|" * (2 + len(TOKENS)))
    for model, shapes in SHAPES.items():
        if model == "8B" or not options.quick:
            for N, K in shapes:
                bench_layer(model, N, K, flush, bandwidth)
    print("\n| cache | kernel | M=1 |\n|---|---|---|")
    bench_attention(flush, bandwidth)
    sys.exit(f"{wrong} checks failed" if wrong else 0)


if __name__ == "__main__":
    main()
