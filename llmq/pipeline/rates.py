"""How fast this machine does what a run does, from a probe of some seconds at the model's shapes.

    rates = probe(plan, Path("out"), seconds=3)
    rates["products"]            float32 flops a second, of 256 rows times [K, K]

Each kind of operations.py is done once to warm up and then again until its share of the time has passed: products of a
block's linears, those of few rows where the model writes its own text, a Cholesky factor, the column loop and the walk
over 256 rows, a fit of each grid, packing, a checksum, a part of the checkpoint read, a file written beside OUT and
synced. K is 2048 at most, on a GPU 8192.
Not here: what is counted (operations.py), machines that are not there (machines.py).
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import chain
from math import exp, log
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from llmq.algorithms._hessian import cholesky
from llmq.algorithms._sweep import round_columns
from llmq.algorithms._walk import Walk, descend_codes
from llmq.pipeline.plan import Plan
from llmq.types import Grid, LinearSpec, LlmqError, QTensor
from llmq.verify.decode import fields

_ROWS, _TOKENS, _SWEEPS = 256, 512, 3
_WIDEST, _WIDEST_GPU = 2048, 8192
_VALUES = 2**22  # more than a cache holds
_PASSED = 2**25  # weights that are, for products of few rows
_KINDS = 12  # that share the time
_MOST = 2**26  # bytes that are read and written
MEASURED_ONCE = {"text": 3e5, "linears": 1e3, "starts": 1.0}
"""What is not probed: how many tokens of text are cut in a second, linears of no size solved, starts made."""


class Rates(dict[str, float]):
    """Amounts a second by kind; "fits" is the mean over the plan's grids, weighed by how many weights are on each."""

    def seconds(self, amounts: Mapping[str, float]) -> dict[str, float]:
        """Return how long each kind takes."""
        return {kind: amount / self[kind] for kind, amount in amounts.items() if amount}


NOMINAL = Rates(
    MEASURED_ONCE
    | {
        "forward": 5e10, "writing": 2e10, "statistics": 5e10, "products": 5e10, "factor": 2e10, "columns": 2e10,
        "looks": 7e7, "passes": 2e9, "fits": 3e7, "packing": 5e8, "decoding": 3e8, "digest": 1e9, "read": 1e9,
        "write": 5e8,
    }
)  # fmt: skip
"""About what one core of 2020 does: good enough to tell whether a probe is worth its time."""
Clock = Callable[[], float]
Kind = tuple[str, float, Callable[[], object]]
"""A kind of work, how much of it is done at a go, and the go."""


def probe(plan: Plan, beside: Path, seconds: float = 3.0, clock: Clock = time.perf_counter) -> Rates:
    """Return the rates of this machine. beside: a folder on OUT's disk. clock: what tells the time, in seconds.

    Kinds for which no time is left are taken to be as far from `NOMINAL` as the others are in the mean.
    """
    until = clock() + seconds
    found: dict[str, float] = {}
    weights = _by_grid(plan)
    fits: list[tuple[float, float]] = []  # seconds a value, and the weights of whose grid they are
    for kind, amount, act in chain(_computed(plan), _fits(plan, weights), _on_disk(plan, beside)):
        if clock() < until or not found:
            rate = _rate(amount, act, seconds / (2 * _KINDS), clock)  # the first go is not counted, and takes as long
            name, _, number = kind.partition(" ")
            fits += [(1 / rate, weights[int(number)][1])] if number else []
            found |= {} if number else {name: rate}
    if fits:
        found["fits"] = sum(n for _, n in fits) / sum(each * n for each, n in fits)
    ratio = fmean(log(rate / NOMINAL[kind]) for kind, rate in found.items())
    missing = {kind: NOMINAL[kind] * exp(ratio) for kind in NOMINAL if kind not in (*found, *MEASURED_ONCE)}
    return Rates(MEASURED_ONCE | missing | found)


def _rate(amount: float, act: Callable[[], object], seconds: float, clock: Clock) -> float:
    """Return how much is done in a second."""
    act()
    start, done = clock(), 0.0
    while not done or clock() < start + seconds:
        act()
        done += amount
    return done / max(clock() - start, 1e-9)


def _width(plan: Plan) -> int:
    """Return the columns that are probed: those of the widest linear, up to what takes long."""
    return max((_columns(plan, s) for s in plan.matrices.values()), default=256)


def _columns(plan: Plan, linear: LinearSpec) -> int:
    """Return how many columns of a linear are probed: whole groups of them."""
    most = _WIDEST if plan.device.type == "cpu" else _WIDEST_GPU
    size = linear.scheme.weight.granularity.group_size or 256  # of ggml's largest blocks too
    return linear.K if most >= linear.K else max(size, most - most % size)


def _computed(plan: Plan) -> Iterator[Kind]:
    """Yield kinds of computing, how much is done of each at a go, and the go."""
    K, device = _width(plan), plan.device
    draw = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device)

    X_TK, W_KK, W_NK = random(_TOKENS, K), random(K, K) * 0.02, random(_ROWS, K) * 0.02
    x, w = X_TK.to(plan.skeleton.dtype), W_KK.to(plan.skeleton.dtype)
    H_KK = X_TK.T @ X_TK / _TOKENS + torch.eye(K, device=device)
    yield "forward", 2 * _TOKENS * K * K, _done(device, lambda: x @ w)
    if rows := plan.writes():
        w_NK = torch.ones(_PASSED // K, K, dtype=x.dtype, device=device)
        yield "writing", 2 * rows * w_NK.numel(), _done(device, lambda: x[:rows] @ w_NK.T)
    yield "products", 2 * _ROWS * K * K, _done(device, lambda: W_NK @ H_KK)
    yield "statistics", 2 * _TOKENS * K * K, _done(device, lambda: W_KK.addmm_(X_TK.T, X_TK))
    yield from _loops(plan, W_NK, H_KK)
    yield "factor", K**3 / 3, _done(device, lambda: cholesky(H_KK.clone(), 0.01))
    values = random(_VALUES)
    yield "passes", 4 * _VALUES, _done(device, lambda: values.mul(2).add_(values).square_().sum())
    text = bytes(2**20)
    yield "digest", len(text), lambda: hashlib.sha256(text).digest()


def _loops(plan: Plan, W_NK: Tensor, H_KK: Tensor) -> Iterator[Kind]:
    """Yield the column loop and the walk, on the grid that most weights are on, then packing and unpacking."""
    usual = next((spec for spec, _ in _by_grid(plan)), None)
    if usual is None:
        return
    K, device = _columns(plan, usual), W_NK.device
    W_NK, H_KK = W_NK[:, :K].contiguous(), H_KK[:K, :K].contiguous()
    spec, grid = LinearSpec("probe", _ROWS, K, usual.scheme), usual.scheme.weight
    L_KK, _ = cholesky(H_KK.flip(0, 1).clone(), 0.01)
    if L_KK is None:
        raise LlmqError(f"{plan.device} cannot factor a matrix of 1 on its diagonal; its linear algebra is at fault")
    F_KK = L_KK.flip(0, 1) / L_KK.diagonal().flip(0)
    rounded = QTensor.rounded(W_NK, grid.plain())
    params, group_K, W_KN = rounded.params, rounded.group_K, W_NK.T.contiguous()
    codes = torch.zeros(1)

    def columns() -> None:
        nonlocal codes
        codes = round_columns(W_KN, W_KN.clone(), F_KK, grid, params, group_K)

    yield "columns", W_NK.numel() * K, _done(device, columns)
    columns()
    solved, order = codes.T.contiguous(), torch.arange(K, device=device)

    def walk() -> None:
        error = W_NK - grid.decode(solved, params.columns(K, group_K))
        gradient = error @ H_KK
        loss = (gradient * error).sum(1)
        moved = Walk(solved.clone(), gradient, loss, H_KK, order, group_K)
        if not descend_codes(moved, grid, params, _SWEEPS):
            for _ in range(_SWEEPS):
                columns()

    yield "looks", _SWEEPS * W_NK.numel(), _done(device, walk)
    q = QTensor(solved.to("cpu"), params.map(lambda p: p.to("cpu")), grid)
    form = plan.method.format
    yield "packing", W_NK.numel(), lambda: form.pack(q, spec)
    words = torch.zeros(_ROWS, K * 4 // 32, dtype=torch.int32).numpy()
    yield "decoding", W_NK.numel(), lambda: fields(words, 4, K)


def _by_grid(plan: Plan) -> list[tuple[LinearSpec, int]]:
    """Return the widest linear of each grid and how many weights are on it, the grid of most first."""
    found: dict[Grid, tuple[LinearSpec, int]] = {}
    for spec in plan.matrices.values():
        known, n = found.get(spec.scheme.weight, (spec, 0))
        found[spec.scheme.weight] = max(known, spec, key=lambda s: s.K), n + spec.N * spec.K
    return sorted(found.values(), key=lambda f: -f[1])


def _fits(plan: Plan, weights: list[tuple[LinearSpec, int]]) -> Iterator[Kind]:
    """Yield a fit to 256 rows for each grid, "fits" and its number."""
    weighs = bool(plan.method.needs([spec.scheme.weight for spec, _ in weights]))
    for i, (spec, _) in enumerate(weights):
        K, grid = _columns(plan, spec), spec.scheme.weight
        W_NK = torch.randn(_ROWS, K, device=plan.device) * 0.02
        weight = torch.ones(K, device=plan.device) if weighs else None
        if grid.wants_hessian:
            weight = torch.eye(K, device=plan.device)
        yield f"fits {i}", W_NK.numel(), _done(plan.device, partial(grid.fit, W_NK, weight))


def _on_disk(plan: Plan, beside: Path) -> Iterator[Kind]:
    """Yield a part of the checkpoint read, and a file written and synced."""
    largest = max(plan.source.entries().values(), key=lambda e: e.nbytes)
    size = min(_MOST, largest.nbytes)

    def read() -> None:
        with largest.file.open("rb") as f:
            f.seek(largest.start)
            f.read(size)

    yield "read", size, read
    content = bytes(min(_MOST, plan.bytes()))

    def write() -> None:
        with tempfile.TemporaryFile(dir=beside) as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())

    yield "write", len(content), write


def _done(device: torch.device, act: Callable[[], object]) -> Callable[[], object]:
    """Return a go that ends when the device has done it."""
    if device.type != "cuda":
        return act

    def waited() -> None:
        act()
        torch.cuda.synchronize(device)

    return waited
