"""The type of every tensor: llama.cpp's mixtures by its own names and rules.

A mixture such as Q4_K_M has a base type and gives more bits to the tensors that need them: attn_v (or attn_qkv),
ffn_down and attn_output in chosen blocks, and the head. With n blocks, "chosen" is the first eighth, the last eighth
and every third between. The rules look at the grouped-query ratio, tied embeddings, the 70B models and whether
importance is known.

Where the block of a type does not divide the row, llama.cpp takes a type of 32-column blocks in its place:

    Q2_0, Q2_K, Q3_K -> Q4_0    Q4_K -> Q5_0    Q5_K -> Q5_1    Q6_K -> Q8_0    IQ4_XS -> IQ4_NL    (else F16)

and Q8_0 for a head (or tied embedding) whose row the base type does not divide.
NVFP4 and MXFP4 for all linears are no mixtures of llama-quantize: embedding and head are as MXFP4_MOE has them (Q8_0),
beside NVFP4 Q6_K. IQ4_NL, of as many bits, stands in for NVFP4 where its block does not divide the row, and where a
program passes over the factor that lies beside such a tensor (`Model.factors`).
Source: llama.cpp `src/llama-quant.cpp` (`llama_tensor_get_type_impl`, `tensor_type_fallback`); tests hold lists that
`llama-quantize` printed. Not here: bytes of a type (grids/).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmq.gguf.kinds import FILE_TYPES, KINDS
from llmq.guard.patterns import Pattern
from llmq.types import LlmqError

_BASE = {  # mixture -> the type of most tensors
    "F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q5_0": "Q5_0",
    "Q5_1": "Q5_1", "Q2_K": "Q2_K", "Q3_K_S": "Q3_K", "Q3_K_M": "Q3_K", "Q3_K_L": "Q3_K", "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K", "IQ4_NL": "IQ4_NL", "IQ4_XS": "IQ4_XS",
    "Q2_0": "Q2_0", "MXFP4": "MXFP4", "MXFP4_MOE": "MXFP4", "NVFP4": "NVFP4",
}  # fmt: skip
_ALIAS = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}  # as llama-quantize reads them
_FALLBACK = {
    "Q2_0": "Q4_0", "Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL",
    "NVFP4": "IQ4_NL",
}  # fmt: skip
_EMBEDDING = {"Q2_0": "Q4_K", "NVFP4": "Q6_K", "MXFP4": "Q8_0", "MXFP4_MOE": "Q8_0"}
"""By mixture: what an embedding gets that is not the head too, where that is not the mixture's base."""
FLOATS = ("F32", "F16", "BF16")
_FLOAT = ("ssm_conv1d", "ffn_gate_inp")
_KEPT = "per_layer_model_proj.weight"  # in 16 bits, whatever the mixture
EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_FEW_BITS = ("Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "IQ4_XS", "Q4_K_S", "Q4_K_M")  # of 8 experts
TYPES = tuple(dict.fromkeys(_BASE.values()))
ALONE = tuple(kind for kind in TYPES if kind != "NVFP4")
"""Types of which a tensor is all in its rows."""
ROUNDED = tuple(kind for kind in TYPES if kind not in FLOATS)
"""Types that are not float."""


@dataclass(frozen=True)
class Model:
    """What the rules look at.

    gqa: query heads for every key-value head. large: the 70B models, whose attn_v is small beside the rest.
    tied: no output tensor. importance: whether activations (or an imatrix) weigh the errors.
    experts: of a block; with 8 of them (Mixtral) attention is small beside the rest.
    factors: the linears, by ggml's name within a block, whose product llama.cpp multiplies by a factor that lies beside
        them: those that can be NVFP4.
    """

    blocks: int
    gqa: int
    tied: bool
    large: bool
    importance: bool
    experts: int = 0
    factors: frozenset[str] = frozenset()


def mixture(name: str) -> str:
    """Return the mixture that `name` means. Raises LlmqError, with all names, for one that is not known."""
    known = _ALIAS.get(name.upper(), name.upper())
    if known not in _BASE:
        raise LlmqError(f"no GGUF type {name!r} (there are: {', '.join(_BASE)})")
    return known


def file_type(name: str) -> int:
    """Return the value of `general.file_type` for a mixture."""
    return FILE_TYPES["MXFP4_MOE" if name == "MXFP4" else name]


def qblock(kind: str) -> int:
    """Return how many columns a type stores together."""
    return KINDS[kind].columns


def always_float(name: str) -> bool:
    """Say whether llama.cpp computes with a tensor in float32 alone, whatever its shape."""
    return not name.endswith(".weight") or name.endswith("_norm.weight") or any(part in name for part in _FLOAT)


def type_of(name: str, shape: Sequence[int], mix: str, model: Model) -> str:
    """Return the type of one tensor, by ggml's name and its shape (`[N, K]` or `[N]`).

    K: the columns that stay together in the file, fewer than a row has where pieces of it are moved.
    """
    if len(shape) < 2 or always_float(name):
        return "F32"
    kind = _BASE[mix]
    if kind in FLOATS:
        return kind
    return fallback(_rule(name, shape[-1], mix, model), shape[-1])


def named(kind: str, option: str, known: Sequence[str] = ROUNDED) -> str:
    """Return the type of ggml that an option names. Raises LlmqError for one that is none of those it takes."""
    if kind.upper() not in known:
        raise LlmqError(f"{option} {kind!r} is no ggml type (there are: {', '.join(known)})")
    return kind.upper()


def fallback(kind: str, K: int) -> str:
    """Return `kind`, or what llama.cpp takes in its place for rows of K columns."""
    if K % qblock(kind) == 0:
        return kind
    kind = _FALLBACK.get(kind, kind)
    return kind if K % qblock(kind) == 0 else "F16"


def fitting(kind: str, name: str, K: int, factors: frozenset[str]) -> str:
    """Return `kind`, or what takes its place in a matrix of ggml's name and rows of K columns. factors: see `Model`."""
    return fallback(_FALLBACK[kind] if kind == "NVFP4" and leaf(name) not in factors else kind, K)


def assign(
    shapes: Mapping[str, Sequence[int]],
    mix: str,
    model: Model,
    overrides: Sequence[tuple[Pattern, str]] = (),
) -> dict[str, str]:
    """Return the type of every tensor, by ggml's names. Later overrides win, and reach matrices only.

    Raises LlmqError for one that matches no matrix and for one to a type that the row cannot hold.
    """
    types = {name: type_of(name, shape, mix, model) for name, shape in shapes.items()}
    for pattern, kind in overrides:
        reached = [n for n, shape in shapes.items() if pattern.search(n) and len(shape) > 1]
        if not reached:
            raise LlmqError(f"{pattern.said} matches no matrix; names look like {next(iter(shapes))}")
        for name in reached:
            K = shapes[name][-1]
            if kind == "NVFP4" and leaf(name) not in model.factors:
                raise LlmqError(
                    f"{name} cannot be NVFP4: llama.cpp passes over the factor that such a tensor needs there; take "
                    f"MXFP4 or {_FALLBACK[kind]}"
                )
            if K % qblock(kind):
                fitting = ", ".join(t for t in TYPES if K % qblock(t) == 0)
                raise LlmqError(
                    f"{name}: rows of {K} columns cannot be {kind}, whose blocks are {qblock(kind)} columns; take "
                    f"one of {fitting}"
                )
            types[name] = kind
    return types


def fallen_back(shapes: Mapping[str, Sequence[int]], types: Mapping[str, str], mix: str, model: Model) -> list[str]:
    """Return a warning where rows do not take the types of the mixture: how many tensors became what instead."""
    found: Counter[tuple[str, str]] = Counter()
    columns = set()
    for name, shape in shapes.items():
        if len(shape) < 2 or always_float(name) or types[name] != type_of(name, shape, mix, model):
            continue  # a vector, or what the user chose
        meant = _BASE[mix] if _BASE[mix] in FLOATS else _rule(name, 0, mix, model)  # every block divides 0 columns
        if types[name] != meant:
            found[types[name], meant] += 1
            columns.add(shape[-1])
    if not found:
        return []
    rows = ", ".join(map(str, sorted(columns)))
    (first, n), *others = [(f"{kind} in place of {meant}", n) for (kind, meant), n in found.most_common()]
    counts = ", ".join([f"{n} tensors are {first}", *(f"{n} are {said}" for said, n in others)])
    return [f"rows of {rows} columns are no multiple of a block: {counts}; the file is larger than {mix} says"]


def without_factor(shapes: Mapping[str, Sequence[int]], types: Mapping[str, str], mix: str, model: Model) -> list[str]:
    """Return a warning where a mixture of NVFP4 gives linears another type because llama.cpp reads no factor there."""
    inside = [n for n, shape in shapes.items() if n.startswith("blk.") and len(shape) > 1 and not always_float(n)]
    found = [n for n in inside if leaf(n) not in model.factors and types[n] == _FALLBACK["NVFP4"]]
    if mix != "NVFP4" or not found:
        return []
    said = f"{len(found)} tensors, e.g. {found[0]}, are {_FALLBACK[mix]} in place of {mix}"
    return [f"{said}: of these llama.cpp passes over the factor (.scale) without which {mix} means other weights"]


def _rule(name: str, K: int, mix: str, model: Model) -> str:
    base = _BASE[mix]
    if name == _KEPT:
        return "F16"
    if name == "output.weight" or (model.tied and name in EMBEDDINGS):
        return "Q8_0" if K % qblock(base) or base in ("Q8_0", "MXFP4") else "Q6_K"
    if name in EMBEDDINGS:
        return _EMBEDDING.get(mix, base)
    if mix == "MXFP4_MOE":
        return base if leaf(name).endswith("_exps") else "Q8_0"
    found = re.match(r"blk\.(\d+)\.(\w+)\.", name)
    rule = _RULES.get(found[2]) if found else None
    kind = base if found is None or rule is None else rule(int(found[1]), model.blocks, mix, model)
    return fitting(kind, name, 0, model.factors)  # every block divides 0 columns


def leaf(name: str) -> str:
    """Return what ggml calls a linear within its block: `ffn_up` of `blk.0.ffn_up.weight`."""
    return name.removesuffix(".weight").rpartition(".")[2]


def _chosen(block: int, n: int) -> bool:
    return block < n // 8 or block >= 7 * n // 8 or (block - n // 8) % 3 == 2


def _attn_v(block: int, n: int, mix: str, model: Model) -> str:
    if model.experts == 8:
        return "Q8_0"
    kind = _BASE[mix]
    if mix == "Q2_K":
        kind = "Q4_K" if model.gqa >= 4 else "Q3_K"
    elif mix == "Q3_K_M":
        kind = "Q5_K" if block < 2 else "Q4_K"
    elif mix == "Q3_K_L" or (mix in ("IQ4_NL", "IQ4_XS") and model.gqa >= 4) or (mix == "Q4_K_S" and block < 4):
        kind = "Q5_K"
    elif mix in ("Q4_K_M", "Q5_K_M") and _chosen(block, n):
        kind = "Q6_K"
    return "Q5_K" if model.large and kind in ("Q3_K", "Q4_K") else kind


def _attn_k(_block: int, _n: int, mix: str, model: Model) -> str:
    return "Q8_0" if model.experts == 8 else _BASE[mix]


def _attn_output(_block: int, _n: int, mix: str, model: Model) -> str:
    if model.experts == 8:
        return "Q5_K" if mix in _FEW_BITS else _BASE[mix]
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(mix, _BASE[mix])


def _ffn_down(block: int, n: int, mix: str, model: Model) -> str:
    kind, early = _BASE[mix], block < n // 8
    if mix == "Q2_K":
        kind = "Q3_K"
    elif mix == "Q3_K_M":
        kind = "Q5_K" if block < n // 16 else "Q4_K"
    elif mix == "Q3_K_L" or (mix == "Q4_K_S" and early):
        kind = "Q5_K"
    elif mix in ("Q4_K_M", "Q5_K_M") and _chosen(block, n):
        kind = "Q6_K"
    elif mix in ("IQ4_NL", "IQ4_XS") and early and not model.importance:
        kind = "Q5_K"
    elif mix in ("Q4_0", "Q5_0") and early and model.importance:
        kind = {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[mix]
    return kind


_RULES = {
    "attn_v": _attn_v, "attn_qkv": _attn_v, "attn_kv_b": _attn_v, "attn_k": _attn_k, "attn_output": _attn_output,
    "ffn_down": _ffn_down, "ffn_down_exps": _ffn_down, "ffn_down_shexp": _ffn_down,
}  # fmt: skip
"""By ggml's name of a linear: what makes v beside others is treated as v alone is."""
