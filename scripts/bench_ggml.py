"""Our ggml encoders beside llama.cpp's own on the same weights: error and time.

    python scripts/bench_ggml.py path/to/libggml-base.so [--rows 384] [--columns 1536] [--seed 0]

Errors are ratios, ours over llama.cpp's: the squared error where neither is given an importance matrix, the squared
error weighed by it where both are. Times are CPU nanoseconds a weight, one thread, with importance: scale search,
rounding and packing. tests/golden/README.md says how to build the library.
"""

from __future__ import annotations

import argparse
import time

import torch
from _ggml import values_of
from make_golden_ggml import TYPES, UNWEIGHTED, Ggml, weights
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llmq import registry


def ours(kind: str, W_NK: Tensor, importance_K: Tensor | None) -> Tensor:
    """Return our stored rows."""
    grid = registry.load("grids", kind.lower())
    params = grid.fit(W_NK, importance_K)
    return grid.to_bytes(grid.nearest(W_NK, params.columns(W_NK.shape[1])), params)


def error(kind: str, rows: Tensor, W_NK: Tensor, importance_K: Tensor | None) -> float:
    """Return the squared error of stored rows, as other code decodes them."""
    square = (values_of(rows, kind) - W_NK).square()
    return float((square if importance_K is None else square * importance_K).sum())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", help="libggml-base.so, or .dylib or .dll")
    parser.add_argument("--rows", type=int, default=384)
    parser.add_argument("--columns", type=int, default=1536)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    ggml = Ggml(options.library)
    half, importance = weights(options.rows, options.columns, options.seed)
    W_NK = half.float()
    table = Table("type", "bits/weight", "plain", "weighted", "ns/weight", "llama.cpp")
    for kind in TYPES:
        bits = registry.load("grids", kind.lower()).bits_per_weight
        ratios, took = [], []
        for given in (None, None if kind in UNWEIGHTED else importance):
            began = time.process_time()
            mine = ours(kind, W_NK, given)
            between = time.process_time()
            theirs = ggml.quantize(kind, W_NK, given)
            took = [1e9 * t / W_NK.numel() for t in (between - began, time.process_time() - between)]
            ratios.append(f"{error(kind, mine, W_NK, given) / error(kind, theirs, W_NK, given):.3f}")
        weighted = "-" if kind in UNWEIGHTED else ratios[1]
        table.add_row(kind, f"{bits:.3f}", ratios[0], weighted, *(f"{t:.0f}" for t in took))
    Console().print(table)


if __name__ == "__main__":
    main()
