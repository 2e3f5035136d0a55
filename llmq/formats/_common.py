"""What the integer formats share: refusals made before any work, and what their warnings have in common.

Every refusal is one line: the module, the reason, the remedy.
Not here: a peer's config and tensors (_reading.py), bytes (_bits.py and the format files).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llmq.grids.int import Int  # the vocabulary of every integer format, hence the one import from a sibling folder
from llmq.types import LinearSpec, LlmqError

_IN_BLOCK = re.compile(r".*?\.\d+\.(.+)")
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def int_grid(spec: LinearSpec, method: str) -> Int:
    """Return the integer grid of `spec`. Raises LlmqError for any other kind of grid."""
    grid = spec.scheme.weight
    if not isinstance(grid, Int):
        raise LlmqError(f"{spec.name}: {method} holds integer grids, not {type(grid).__name__}; use --format gguf")
    return grid


def groups(spec: LinearSpec) -> int:
    """Return G. Raises LlmqError, with the group sizes that would do, where the group does not divide K."""
    size = spec.scheme.weight.group_size or spec.K
    if spec.K % size:
        fitting = ", ".join(str(g) for g in range(32, spec.K + 1, 32) if spec.K % g == 0)
        remedy = f"--group-size takes {fitting} there" if fitting else "say --group-size channel"
        raise LlmqError(f"{spec.name}: group size {size} does not divide K = {spec.K}; {remedy}, or --skip the module")
    return spec.K // size


def describe(grid: Int) -> str:
    """Return a grid in words: `4-bit asymmetric, group size 128`."""
    symmetry = "symmetric" if grid.sym else "asymmetric"
    return f"{grid.bits}-bit {symmetry}, " + (f"group size {grid.group_size}" if grid.group_size else "per channel")


def uniform(linears: Sequence[LinearSpec], method: str) -> Int:
    """Return the one grid of a checkpoint whose config has room for one.

    Raises LlmqError where there is no linear, where two differ in bits, group size or symmetry, and where an
    activation is quantized.
    """
    if not linears:
        raise LlmqError(f"no linear is left to quantize, and {method} cannot say so; skip fewer modules")
    first = linears[0]
    grid = int_grid(first, method)
    for spec in linears:
        other = int_grid(spec, method)
        if (other.bits, other.sym, other.group_size) != (grid.bits, grid.sym, grid.group_size):
            raise LlmqError(
                f"{spec.name}: {describe(other)}, but {first.name}: {describe(grid)}, and transformers does not load "
                f"{method} checkpoints that mix schemes; use --format compressed-tensors"
            )
        if spec.scheme.activation is not None:
            raise LlmqError(f"{spec.name}: {method} holds no quantized activations; use --format compressed-tensors")
    return grid


def group_size_warnings(grid: Int, readers: Mapping[str, Sequence[int]]) -> list[str]:
    """Return a warning for each reader that does not take the grid's group size; per channel they all take."""
    if grid.group_size is None:
        return []
    return [
        f"group size {grid.group_size} is not read by {reader} (it takes {', '.join(map(str, sizes))} and per channel)"
        for reader, sizes in readers.items()
        if grid.group_size not in sizes
    ]


def fused_warnings(linears: Sequence[LinearSpec]) -> list[str]:
    """Return a warning where q, k, v or gate, up of one block differ in scheme or are quantized only in part."""
    schemes: dict[str, dict[str, Any]] = {}
    for spec in linears:
        parent, _, leaf = spec.name.rpartition(".")
        schemes.setdefault(parent, {})[leaf] = spec.scheme
    unlike = [
        f"{parent}: {', '.join(fused)}"
        for parent, of in schemes.items()
        for fused in _FUSED
        if any(leaf in of for leaf in fused) and any(of.get(leaf) != of.get(fused[0]) for leaf in fused)
    ]
    if not unlike:
        return []
    more = f" (and {len(unlike) - 1} more)" if len(unlike) > 1 else ""
    return [f"{unlike[0]}{more} are not quantized alike: runtimes that fuse them, such as vLLM, refuse the checkpoint"]


def head_warnings(linears: Sequence[LinearSpec], method: str) -> list[str]:
    """Return a warning where the output head is quantized, in a format whose config says so to few readers."""
    if all(block_path(s.name) for s in linears):
        return []
    return [
        f"transformers computes rubbish from a quantized output head in {method}, silently: it makes the head up; "
        "GPTQModel, vLLM and llmq read it, and transformers does from --format compressed-tensors"
    ]


def block_path(name: str) -> str | None:
    """Return a linear's name inside its decoder block, `mlp.up_proj`; None for one outside, such as `lm_head`."""
    match = _IN_BLOCK.fullmatch(name)
    return match and match[1]


def kept_in_blocks(linears: Sequence[LinearSpec], skipped: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """Return how to say which linears of the blocks are quantized: (names to quantize, rules of those to leave).

    Where every block keeps the same ones the names are relative to the block, otherwise they are full. The rules are
    GPTQModel's `dynamic`: `"-:" + regex` leaves what the regex matches from its start.
    """
    names = [s.name for s in linears if block_path(s.name)]
    left = [name for name in skipped if block_path(name)]
    paths, left_paths = (list(dict.fromkeys(str(block_path(n)) for n in some)) for some in (names, left))
    if set(paths).isdisjoint(left_paths):
        return paths, {f"-:.*\\.{re.escape(path)}$": {} for path in left_paths}
    return names, {f"-:{re.escape(name)}$": {} for name in left}
