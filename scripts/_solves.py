"""GPTQ's columns and descent's codes on a GPU: problems of real shapes, what they give, seconds, kernel launches.

A site's linears lie one below the other, as they are solved: q, k and v of Llama-2-7B are one matrix `[12288, 4096]`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from llmq.algorithms import _sweep, _walk
from llmq.algorithms._hessian import damped
from llmq.algorithms.descent import Descent
from llmq.algorithms.gptq import Gptq
from llmq.grids.int import Int
from llmq.minifloat import E2M1, E4M3
from llmq.pipeline.site import pieces
from llmq.stats import Hessian, Stats
from llmq.steps import Solved
from llmq.types import Lattice, QTensor
from llmq_kernels import panel

BLOCKS = {  # rows and columns of the sites of one block
    "7B": ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)),
    "70B": ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)),
}
GRID = Int(4, True, 128)


@dataclass
class Problem:
    """A weight, float32 `[N, K]`, the statistics of its input, and H with a prior and damped."""

    W_NK: Tensor
    stats: Stats
    H_KK: Tensor


def problem(N: int, K: int, device: str, tokens: int = 4096) -> Problem:
    """Return a problem of random numbers, the same on every device, whose inputs are correlated."""
    draw = torch.Generator().manual_seed(N + K)
    W_NK = (torch.randn(N, K, generator=draw) * 0.02).to(device)
    hessian = Hessian(tokens)
    X_TK = torch.randn(tokens, K, generator=draw)
    hessian.update((X_TK + torch.randn(tokens, 1, generator=draw) + 2 * X_TK.roll(1, 1)).to(device))
    H_KK = Descent().regularize(damped(hessian.mean(), Descent.damp), hessian.count)
    return Problem(W_NK, Stats({Hessian: hessian}), H_KK)


def gptq(of: Problem) -> QTensor:
    """Return the weight rounded by GPTQ."""
    return Gptq().solve(of.W_NK, GRID, of.stats).q


def descent(of: Problem, start: QTensor) -> QTensor:
    """Return it refined by one round of three sweeps, its scales as they are."""
    return Descent(rounds=1, scales=False).refine(of.W_NK, Solved(start, {}), of.stats).q


def loss(of: Problem, q: QTensor) -> float:
    """Return tr (W - Q) H (W - Q)^T, in float64."""
    E_NK = (of.W_NK - q.dequantize()).double()
    return float(((E_NK @ of.H_KK.double()) * E_NK).sum())


def by_torch(run: Callable[[], QTensor]) -> QTensor:
    """Return what `run` gives without the kernels."""
    off = partial(mock.patch.object, attribute="runs_kernels", return_value=False)
    with off(_sweep), off(_walk):
        return run()


def panels_alike(device: str) -> bool:
    """Say whether a panel on the device gives its reference on the CPU bit for bit: all that both kernels write."""
    found, wanted = (_panel(where) for where in (device, "cpu"))
    return all(torch.equal(a.cpu(), b) for a, b in zip(found, wanted, strict=True))


def _panel(device: str) -> list[Tensor]:
    draw = torch.Generator().manual_seed(0)
    P, N, G = panel.WIDTH, 1000, 2
    w, noise = torch.randn(2, P, N, generator=draw).to(device)
    X = torch.randn(2 * P, P, generator=draw)
    H, group = (X.T @ X / (2 * P)).to(device), (torch.arange(P) * G // P).to(device)
    scale = (torch.rand(G, N, generator=draw) * 0.2 + 0.02).to(device)
    zero = torch.randint(0, 16, (G, N), generator=draw).float().to(device)
    gradient, lost = noise.clone(), noise[0].abs()
    found = [gradient, lost]
    for levels in (None, E2M1.levels, E4M3.levels):
        values = (zero, *Lattice(scale, zero, scale / 3, 0.0, 15.0, levels).table(), 0.0, 15.0)
        error, step = torch.empty_like(w), torch.empty_like(w)
        code, new = (torch.empty_like(w, dtype=torch.uint8) for _ in range(2))
        panel.round_panel(w, w + noise / 9, H, group, scale, zero, scale / 3, *values[1:], error, code)
        panel.walk_panel(H, gradient, lost, code, group, scale, *values, step, new)
        found += [error, code, step, new]
    return found


def checked(device: str, N: int = 1024, K: int = 1024) -> Iterator[tuple[str, float]]:
    """Yield of each step a line on how many codes are as torch's on the device and the CPU's, and loss over the CPU's.

    Products in another order turn a tie now and then, and feedback turns others after it; what is lost stays the same.
    """
    here, there = problem(N, K, device), problem(N, K, "cpu")
    start = gptq(there)
    moved = QTensor(start.codes.to(device), start.params.map(lambda p: p.to(device)), start.grid)
    steps: dict[str, tuple[Callable[[], QTensor], Callable[[], QTensor]]] = {
        "gptq": (lambda: gptq(here), lambda: gptq(there)),
        "descent": (lambda: descent(here, moved), lambda: descent(there, start)),
    }
    for name, (run, on_cpu) in steps.items():
        found, wanted = run(), on_cpu()
        torchs, cpus = ((found.codes.cpu() == q.codes.cpu()).double().mean().item() for q in (by_torch(run), wanted))
        ratio = loss(here, found) / loss(there, wanted)
        yield f"{name}: {torchs:.2%} of the codes as by torch there, {cpus:.2%} as on the CPU; loss {ratio:.5f}", ratio


def launches(run: Callable[[], object]) -> int:
    """Return how many kernels and copies a GPU is given."""
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    return sum(e.device_type == DeviceType.CUDA for e in seen.events())


def seconds(run: Callable[[], object]) -> float:
    """Return the seconds until the GPU is done."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def timed(block: str) -> Iterator[str]:
    """Yield a row of Markdown for each site of a block, of one piece of its rows and of all of them.

    Seconds and launches, with the kernels and by torch.
    """
    for N, K in [(n, columns) for rows, columns in BLOCKS[block] for n in (rows // pieces(rows), rows)]:
        of = problem(N, K, "cuda")
        start = gptq(of)  # compiles the kernels, and factors H as often as it is called
        for name, run in (("gptq", partial(gptq, of)), ("descent", partial(descent, of, start))):
            cells = []
            for way in (run, partial(by_torch, run)):
                way()
                cells += [f"{seconds(way):.3f}", f"{launches(way)}"]
            yield f"| {block} {N}x{K} | {name} | {' | '.join(cells)} |"
