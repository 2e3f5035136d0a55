"""What the integer formats share: refusals made before any work, and what runtimes do not take of any of them.

Every refusal is one line: the module, the reason, the remedy.
Not here: a peer's config and tensors (_reading.py), bytes (_bits.py and the format files).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from math import gcd
from typing import Any

from llmq.granularity import PerBlock, PerTensor
from llmq.grids.int import Int
from llmq.readers import Limit
from llmq.stored import StoredGrid
from llmq.types import AffineGrid, LinearSpec, LlmqError, Scheme

_LEAVE = "leave what does not fit float: --on-misfit skip"
_IN_BLOCK = re.compile(r".*?\.\d+\.(.+)")
_FUSED = (  # vLLM's packed_modules_mapping: attention, gated, of latent attention, of gated delta nets, of experts
    ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"), ("in_proj_b", "in_proj_a"), ("w1", "w3"),
)  # fmt: skip


def int_grid(spec: LinearSpec, method: str) -> AffineGrid:
    """Return the grid of `spec`, of 2 to 8 bits. Raises LlmqError for what is no integer grid, or has blocks."""
    grid = spec.scheme.weight
    if not isinstance(grid, AffineGrid) or not 2 <= grid.bits <= 8:
        remedy = "--format gguf" if isinstance(grid, StoredGrid) else "--weights int"
        raise LlmqError(f"{spec.name}: {method} holds integer grids, not {type(grid).__name__}; use {remedy}")
    if isinstance(grid.granularity, PerBlock):
        raise LlmqError(f"{spec.name}: {method} holds no {grid.granularity}; use scales per group or per channel")
    return grid


def by_rows(spec: LinearSpec) -> LinearSpec:
    """Return a linear with a scale for each row where it has one for all."""
    grid = spec.scheme.weight
    if not isinstance(grid, Int) or grid.granularity != PerTensor():
        return spec
    return replace(spec, scheme=replace(spec.scheme, weight=replace(grid, group="channel")))


def groups(spec: LinearSpec) -> int:
    """Return G. Raises LlmqError, with the group sizes that would do, where the group does not divide K."""
    refuse_misfits([spec], undivided)
    return spec.scheme.weight.granularity.groups(spec.K)


def undivided(spec: LinearSpec) -> str | None:
    """Return how the groups of a linear do not divide its K, None where they do."""
    try:
        spec.scheme.weight.granularity.groups(spec.K)
    except ValueError as e:
        return str(e)
    return None


def misfits(linears: Sequence[LinearSpec], misfit: Callable[[LinearSpec], str | None]) -> dict[str, str]:
    """Return which linears a file cannot hold, by their names, and why `misfit` says so."""
    return {s.name: why for s in linears if (why := misfit(s))}


def listed(found: Mapping[str, str]) -> str:
    """Return misfits as a list in words: a reason once, and names that differ by numbers alone as one."""
    alike: dict[str, dict[str, list[str]]] = {}
    for name, why in found.items():
        alike.setdefault(why, {}).setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), []).append(name)
    return "; ".join(f"{', '.join(map(_counted, paths, paths.values()))}: {why}" for why, paths in alike.items())


def _counted(path: str, names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{path} ({len(names)} linears)"


def refuse_none(linears: Sequence[LinearSpec]) -> None:
    """Raise LlmqError where no linear is quantized."""
    if not linears:
        raise LlmqError("no linear is left to quantize; skip fewer modules")


def refuse_misfits(linears: Sequence[LinearSpec], misfit: Callable[[LinearSpec], str | None]) -> None:
    """Raise LlmqError with all linears that a file cannot hold, and what would let it."""
    found = misfits(linears, misfit)
    if not found:
        return
    K = gcd(*(s.K for s in linears))
    fitting = ", ".join(str(g) for g in range(32, K + 1, 32) if K % g == 0)
    remedy = f"--group-size takes {fitting} there" if fitting else "say --group-size channel"
    if not misfits(linears, undivided):
        remedy = "use --format compressed-tensors"
    leave = "leave the experts float: --skip experts" if any(".experts." in n for n in found) else _LEAVE
    raise LlmqError(f"{listed(found)}; {remedy}, or {leave}")


def group_size(grid: AffineGrid) -> int:
    """Return the group size as GPTQ and AWQ write it: -1 for one scale a row, or for all."""
    return grid.granularity.group_size or -1


def describe(grid: AffineGrid) -> str:
    """Return a grid in words: `4-bit asymmetric, group size 128`."""
    return f"{grid.bits}-bit {'symmetric' if grid.sym else 'asymmetric'}, {grid.granularity}"


def uniform(linears: Sequence[LinearSpec], method: str) -> AffineGrid:
    """Return the one grid of a checkpoint whose config has room for one.

    Raises LlmqError where there is no linear, where two differ in bits, group size or symmetry, where an activation is
    quantized, and where one scale is for a whole tensor.
    """
    if not linears:
        raise LlmqError(f"no linear is left to quantize, and {method} cannot say so; skip fewer modules")
    first = linears[0]
    grid = int_grid(first, method)
    for spec in linears:
        other = int_grid(spec, method)
        if (other.bits, other.sym, group_size(other)) != (grid.bits, grid.sym, group_size(grid)):
            raise LlmqError(
                f"{spec.name}: {describe(other)}, but {first.name}: {describe(grid)}, and transformers does not load "
                f"{method} checkpoints that mix schemes; use --format compressed-tensors"
            )
        if spec.scheme.activation is not None:
            raise LlmqError(f"{spec.name}: {method} holds no quantized activations; use --format compressed-tensors")
        if other.granularity == PerTensor():
            raise LlmqError(
                f"{spec.name}: {method} holds scales per group or per channel; say --group-size channel, or use "
                "--format compressed-tensors"
            )
    return grid


def group_size_limits(grid: AffineGrid, taken: Mapping[str, Sequence[int]]) -> list[Limit]:
    """Return a limit for each reader that does not take the grid's group size; per channel they all take.

    taken: by a reader in words, the last of which is the runtime.
    """
    return [
        Limit(
            f"group size {size} is not read by {reader} (it takes {', '.join(map(str, sizes))} and per channel)",
            refuses=(reader.rpartition(" ")[2],),
        )
        for reader, sizes in taken.items()
        if (size := grid.granularity.group_size) is not None and size not in sizes
    ]


def fused_limits(linears: Sequence[LinearSpec], skipped: Sequence[str]) -> list[Limit]:
    """Return a limit where q, k, v or gate, up of one block differ in scheme or are quantized only in part.

    skipped: the other linears of the model, which tell a part that is left float from one that there is not.
    """
    schemes: dict[str, dict[str, Scheme | None]] = {}
    for name, scheme in (*((s.name, s.scheme) for s in linears), *((n, None) for n in skipped)):
        parent, _, leaf = name.rpartition(".")
        schemes.setdefault(parent, {}).setdefault(leaf, scheme)
    parts = [(parent, [n for n in fused if n in of], of) for parent, of in schemes.items() for fused in _FUSED]
    unlike = [f"{parent}: {', '.join(some)}" for parent, some, of in parts if any(of[n] != of[some[0]] for n in some)]
    if not unlike:
        return []
    more = f" (and {len(unlike) - 1} more)" if len(unlike) > 1 else ""
    say = f"{unlike[0]}{more} are not quantized alike: runtimes that fuse them, such as vLLM, refuse the checkpoint"
    return [Limit(say, refuses=("vLLM", "SGLang"), known="source")]


def tile_limits(linears: Sequence[LinearSpec]) -> list[Limit]:
    """Return a limit where weights do not fill the tiles of Marlin, vLLM's kernel for packed weights on NVIDIA.

    Source: vLLM's `verify_marlin_supports_shape`, vllm#9913, vllm#38222.
    """
    odd = next((s for s in linears if s.K % 128 or s.N % 64), None)
    if odd is None:
        return []
    say = (
        f"Marlin takes weights of a multiple of 64 rows and 128 columns, not {odd.N} x {odd.K} ({odd.name}): there a "
        "slower kernel runs them where there is one (4 and 8 bits, symmetric, in float16)"
    )
    return [Limit(say, notes=("vLLM", "SGLang"), told=False, known="source")]


def head_limits(linears: Sequence[LinearSpec], method: str) -> list[Limit]:
    """Return a limit where the output head is quantized, in a format whose config says so to few readers."""
    if all(block_path(s.name) for s in linears):
        return []
    say = (
        f"transformers computes rubbish from a quantized output head in {method}, silently: it makes the head up; "
        "GPTQModel, vLLM and llmq read it, and transformers does from --format compressed-tensors"
    )
    return [Limit(say, refuses=("transformers",))]


def of_experts(linears: Sequence[LinearSpec]) -> list[LinearSpec]:
    """Return the linears that are an expert's."""
    return [s for s in linears if re.search(r"\.experts\.\d+\.", s.name)]


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
