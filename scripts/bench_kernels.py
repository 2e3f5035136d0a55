"""Check every kernel against its reference on this machine's GPU, then time it.

    python scripts/bench_kernels.py [--models 8B 70B] [--jobs 8]

Prints, for the layers of Llama-3-8B and 70B and M tokens from 1 to 4,096: milliseconds, the bytes of the weight over
that time as a fraction of the measured copy bandwidth, and the speed-up over fp16 F.linear; beside it Marlin (vLLM),
GemLite and torchao where they are installed. A cell marked * takes more than 1.05 times what F.linear takes and the
packed and the decoded bytes at the copy's rate, which decoding in panels should not. Then a layer of 128 experts at
once, beside transformers' in bfloat16 and beside a launch for each expert. Every run is one of several in a CUDA graph,
of weights that the L2 cache does not hold. Configurations are tuned on first use and kept in ~/.cache/llmq_kernels.
What has not begun after `--minutes` is left out, and named. Ends with an error where a kernel is wrong, or where there
is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import _grouped
import torch
import torch.nn.functional as F
import triton
from _kernel_peers import PEERS
from torch import Tensor
from triton.runtime.errors import OutOfResources

from llmq_kernels import activation, attention, e2m1, fp8, int8, kv, layout, tune, weight_only

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
SHAPES = {  # output and input features: q/k/v fused, o, gate/up fused, down
    "8B": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "70B": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}
TIMED = ("W4 sym g128", "W4 asym g128", "W4 asym g32", "NVFP4", "MXFP4", "W8 sym channel", "W3 sym g128",
         "W2 sym g128", "W8A8")  # fmt: skip
CHECKED = ("W4 asym g128", "W4 sym g32", "W4 asym channel", "W8 sym channel", "W8 asym g64", "W3 asym g64",
           "W2 asym g64", "NVFP4", "MXFP4", "W8A8")  # fmt: skip
CHECK_M = (1, 17, 130, 600)
MODULES = {"Marlin": "vllm", "GemLite": "gemlite", "torchao": "torchao"}
BOUND_DB = {torch.float16: 65, torch.bfloat16: 47}  # rounding to 11 and to 8 bits, less a margin


@dataclass(frozen=True)
class Linear:
    """A quantized linear of random codes: as a user calls it, in one configuration, and what it must equal."""

    call: Callable[[Tensor, Tensor | None], Tensor]
    launch: Callable[[Tensor, Tensor | None, tune.Config], Tensor]
    reference: Callable[[Tensor, Tensor | None], Tensor]
    configs: Callable[[int], list[tune.Config]]
    nbytes: int


def make(name: str, N: int, K: int) -> Linear:
    """Return the linear `[N, K]` of a name such as "W4 asym g128"; W8A8 has int8 weights, symmetric per channel."""
    if name in ("NVFP4", "MXFP4"):
        return _e2m1(N, K, 32 if name == "MXFP4" else 16)
    if name == "W8A8":
        codes = torch.randint(-128, 128, (N, K), device="cuda").to(torch.int8)
        w8 = int8.pack(codes, torch.rand(N, device="cuda") / 99)

        def launch(x: Tensor, bias: Tensor | None, config: tune.Config) -> Tensor:
            return int8.launch(*activation.quantize(x, w8.q.shape[1]), w8, bias, config, x.dtype)

        return Linear(
            lambda x, bias: int8.linear(x, w8, bias=bias),
            launch,
            lambda x, bias: int8.reference(x, w8, bias=bias),
            lambda M: int8.configs(M, K),
            w8.q.nbytes,
        )
    width, kind, size = name.split()
    bits, G = int(width[1:]), 1 if size == "channel" else K // int(size[1:])
    levels = torch.randint(0, 2**bits, (N, K), dtype=torch.uint8, device="cuda")
    scale = (torch.rand(N, G, device="cuda") * 0.02 + 0.005).half()
    zero = torch.randint(0, 2**bits, (N, G), device="cuda") if kind == "asym" else None
    w = layout.pack(levels, scale, zero, bits)
    return Linear(
        lambda x, bias: weight_only.linear(x, w, bias),
        lambda x, bias, config: weight_only.launch(x, w, bias, config),
        lambda x, bias: weight_only.reference(x.float(), w, bias),
        lambda M: weight_only.configs(M, w),
        w.words.nbytes + w.params.nbytes,
    )


def _e2m1(N: int, K: int, group: int) -> Linear:
    """Return the linear of E2M1 codes and scales for so many columns, of E8M0 where they are 32."""
    codes = torch.randint(0, 16, (N, K), dtype=torch.uint8, device="cuda")
    e8m0 = group == 32
    scales = torch.randint(*((118, 124) if e8m0 else (1, 127)), (N, K // group), device="cuda")
    w = e2m1.pack(codes, scales.to(torch.uint8), e8m0=e8m0, factor=0.25 if e8m0 else 1e-4)
    return Linear(
        lambda x, bias: e2m1.linear(x, w, bias),
        lambda x, bias, config: e2m1.launch(x, w, bias, config),
        lambda x, bias: e2m1.reference(x.float(), w, bias),
        lambda M: e2m1.configs(M, w),
        w.words.nbytes + w.params.nbytes,
    )


def compile_ahead(shapes: Sequence[tuple[int, int]], jobs: int) -> None:
    """Compile in `jobs` processes, into Triton's cache, what will be checked and timed: 2 s a kernel, one by one."""
    tasks = [(name, 1000, 1536, M, dtype, True) for name in CHECKED for M in CHECK_M for dtype in BOUND_DB]
    tasks += [(name, 1024, K, M, torch.float16, False)
              for name in TIMED for M in (1, 16, 64, 256) for K in sorted({K for _, K in shapes})]  # fmt: skip
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(_launch_all, tasks))


def _launch_all(task: tuple[str, int, int, int, torch.dtype, bool]) -> None:
    name, N, K, M, dtype, has_bias = task
    x, linear = torch.randn(M, K, device="cuda", dtype=dtype), make(name, N, K)
    for _ in in_every_configuration(linear, x, torch.randn(N, device="cuda", dtype=dtype) if has_bias else None):
        pass


def in_every_configuration(linear: Linear, x: Tensor, bias: Tensor | None) -> Iterator[tuple[tune.Config, Tensor]]:
    """Yield every configuration that the device has the resources for, with its answer."""
    for config in linear.configs(len(x)):
        try:
            yield config, linear.launch(x, bias, config)
        except OutOfResources:
            continue


def sqnr(found: Tensor, wanted: Tensor) -> float:
    """Return the signal-to-noise ratio of `found` in dB."""
    wanted = wanted.double()
    noise = (wanted - found.double()).square().sum().item()
    return 10 * math.log10(wanted.square().sum().item() / noise) if noise else math.inf


def milliseconds(runs: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Return the median time of one of `runs`, which follow each other in a CUDA graph, as layers do in a server.

    They are of weights of their own, more together than the L2 cache holds, so that each comes from memory.
    """
    for run in runs:
        run()  # chooses the configuration, which a capture cannot
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    return statistics.median(tune.milliseconds(graph.replay, repeats)) / len(runs)


def copies(nbytes: int) -> int:
    """Return how many tensors of `nbytes` are three times the L2 cache, at least 4."""
    return max(4, math.ceil(3 * torch.cuda.get_device_properties().L2_cache_size / nbytes))


def copy_bandwidth() -> float:
    """Return the bytes per second, read and written, of a copy of 4 GiB."""
    source = torch.empty(1 << 32, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(tune.milliseconds(lambda: target.copy_(source), 10)) * 1e3


def checks() -> Iterator[tuple[str, float, float]]:
    """Yield (name, dB found, dB at least) of every kernel, in every configuration, on odd shapes."""
    torch.manual_seed(0)
    for dtype, bound in BOUND_DB.items():
        for name in CHECKED:
            linear, bias = make(name, 1000, 1536), torch.randn(1000, device="cuda", dtype=dtype)
            for M in CHECK_M:
                x = torch.randn(M, 1536, device="cuda", dtype=dtype)
                wanted, title = linear.reference(x, bias), f"{name} M={M} {dtype}"
                yield title, sqnr(linear.call(x, bias), wanted), bound
                for config, found in in_every_configuration(linear, x, bias):
                    yield f"{title} {config}", sqnr(found, wanted), bound
        for M in CHECK_M:
            x = torch.randn(M, 1500, device="cuda", dtype=dtype)
            q, scale = activation.quantize(x, 1536)
            q_ref, scale_ref = activation.quantize_reference(x)
            same = torch.equal(q[:, :1500], q_ref) and torch.equal(scale, scale_ref)
            yield f"W8A8 activation M={M} {dtype}", math.inf if same else 0.0, bound
            q, scale = activation.Quantizing(x, 1500, is_static=False, e4m3=True)(x, None)
            q_ref, scale_ref = fp8.quantize_reference(x)
            same = torch.equal(q, q_ref.view(torch.uint8)) and torch.equal(scale, scale_ref)
            yield f"FP8 activation M={M} {dtype}", math.inf if same else 0.0, bound
        yield from cache_checks(dtype, bound)
        yield from _grouped.checks(dtype, bound, sqnr)


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


def bench_layer(model: str, N: int, K: int, bandwidth: float) -> None:
    """Print the rows of one layer: a kernel a row, milliseconds (fraction of bandwidth, speed-up) for each M."""
    inputs = [torch.randn(M, K, device="cuda", dtype=torch.float16) for M in TOKENS]
    floats = [torch.randn(N, K, device="cuda", dtype=torch.float16) * 0.02 for _ in range(copies(2 * N * K))]
    base = times([lambda x, W=W: F.linear(x, W) for W in floats], inputs)  # type: ignore[misc]
    rows = [("fp16 F.linear", base, floats[0].nbytes)]
    for name in TIMED:
        linears = [make(name, N, K)]
        linears += [make(name, N, K) for _ in range(copies(linears[0].nbytes) - 1)]
        calls = [lambda x, each=each: each.call(x, None) for each in linears]  # type: ignore[misc]
        rows.append((name, times(calls, inputs), linears[0].nbytes))
    for name, make_peer in PEERS.items():
        if importlib.util.find_spec(MODULES[name]) is None:
            continue
        try:
            rows.append((name, times([make_peer(floats[0]) for _ in range(copies(N * K // 2))], inputs), 0))
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError) as e:
            print(f"{name} does not run: {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}")
    for name, found, size in rows:
        cells = []
        bound = (size + 2 * N * K) / bandwidth * 1e3
        for t, b in zip(found, base, strict=True):
            slow = "*" if size and t > 1.05 * (b + bound) else ""
            share = f"{size / t * 1e3 / bandwidth:.0%}, " if size else ""
            cells.append(f"{t:.4f} ({share}{b / t:.2f}x){slow}")
        print(f"| {model} {N}x{K} | {name} | " + " | ".join(cells) + " |", flush=True)


def times(calls: Sequence[Callable[[Tensor], object]], inputs: Sequence[Tensor]) -> list[float]:
    """Return the milliseconds of one of `calls` on each input."""
    return [milliseconds([partial(call, x) for call in calls]) for x in inputs]


def bench_attention(bandwidth: float) -> None:
    """Print attention of one new token at Llama-3-8B's head shape against fp16 scaled_dot_product_attention."""
    H, GQ, D = 8, 4, 128
    for T in (2048, 8192, 32768):
        q = torch.randn(1, H * GQ, 1, D, device="cuda", dtype=torch.float16)
        size = 4 * H * T * D
        floats = [torch.randn(2, 1, H, T, D, device="cuda", dtype=torch.float16) for _ in range(copies(size))]
        attention_of = partial(F.scaled_dot_product_attention, enable_gqa=True)
        base = milliseconds([partial(attention_of, q, *kv_) for kv_ in floats])
        print(f"| attention T={T} | fp16 | {base:.4f} ({size / base * 1e3 / bandwidth:.0%}, 1.00x) |")
        lengths = torch.full((1,), T, dtype=torch.int32, device="cuda")
        for bits in (8, 4):
            caches = [
                kv.empty(1, H, T, D, bits, sym=bits == 8, device="cuda") for _ in range(copies(size * bits // 16))
            ]
            for i, cache in enumerate(caches):
                kv.append(cache, *floats[i % len(floats)], torch.zeros_like(lengths))
            t = milliseconds([partial(attention.attend, q, cache, lengths) for cache in caches])
            packed = 2 * (caches[0].k_words.nbytes + caches[0].k_params.nbytes)
            share = f"{packed / t * 1e3 / bandwidth:.0%}"
            print(f"| attention T={T} | int{bits} | {t:.4f} ({share}, {base / t:.2f}x) |", flush=True)


def main() -> None:
    """Check, then time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=list(SHAPES), help="whose layers are timed")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further layer after so many")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    if not torch.cuda.is_available():
        sys.exit("bench_kernels.py needs a GPU, and torch sees none here")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}", flush=True)
    shapes = [shape for model in options.models for shape in SHAPES[model]]
    compile_ahead(shapes, options.jobs)
    wrong = 0
    count = 0
    for name, found, bound in checks():
        count += 1
        if not found >= bound:  # NaN is wrong too
            wrong += 1
            print(f"WRONG: {name}: {found:.1f} dB, expected {bound}")
    print(f"{count - wrong} of {count} checks against the references passed")
    bandwidth = copy_bandwidth()
    print(
        f"measured copy bandwidth {bandwidth / 1e12:.2f} TB/s; cells: ms (weight bytes / time / bandwidth, speed-up)\n"
    )
    print("| layer | kernel | " + " | ".join(f"M={M}" for M in TOKENS) + " |\n|" + "---|" * (2 + len(TOKENS)))
    for model in options.models:
        for N, K in SHAPES[model]:
            if time.monotonic() < end:
                bench_layer(model, N, K, bandwidth)
            else:
                print(f"{model} {N}x{K}: no time left")
    if time.monotonic() < end:
        for line in _grouped.rows(bandwidth, milliseconds, copies):
            print(line, flush=True)
    else:
        print("experts: no time left")
    print("\n| cache | kernel | M=1 |\n|---|---|---|")
    bench_attention(bandwidth)
    sys.exit(f"{wrong} checks failed" if wrong else 0)


if __name__ == "__main__":
    main()
