"""Rotary embedding by value: what transformers rotates by, and the keys by which llama.cpp rotates the same.

Channel pair i of a head of d channels is turned by position * frequency_i, and its cosine and sine are multiplied by a
magnitude. llama.cpp has one formula, of base b, type, factor s, trained context n and one divisor f_i for each pair:

    frequency_i = b^(-2i/d) / f_i * (r_i + (1 - r_i) / s)        magnitude = attn_factor * (1 + 0.1 ln s if yarn else 1)

    type none     r_i = 1                   linear   r_i = 0
    type yarn     r_i = 1 - clamp((i - lo) / (hi - lo), 0, 1),   lo, hi = floor, ceil of d ln(n / (2 pi t)) / (2 ln b)
                  where t = 32 turns within n for lo and 1 for hi

Names of a config prove nothing (`mscale`, `truncate`, `beta_fast` are keys that change transformers' values and that no
such file can say), so the config's numbers only propose; what is written is what gives transformers' own values. Where
neither type does, the divisors (`rope_freqs.weight`) can say any frequencies, for the architectures that read them.
Longrope's two sets of frequencies are two tables of divisors, of which Phi's program takes the short one where it is
started with a context of at most n tokens, else the long one.
Source: llama.cpp `ggml/src/ggml.c` (ggml_rope_yarn_corr_dims), `ggml-cpu/ops.cpp` (rope_yarn), `src/llama-context.cpp`
(attn_factor); transformers' `modeling_rope_utils`. Not here: all other keys (architecture.py).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from llmq.errors import LlmqError, printable

_CLOSE = 1e-5  # relative. Both compute in float32, llama.cpp by up to d/2 = 128 products in a row: 128 * 2^-24 = 8e-6
_STILL = 1e30  # the divisor of a pair that is not turned, as llama.cpp's own converter writes it
_FAST, _SLOW = 32.0, 1.0  # turns; llama.cpp reads other values for architectures that are not written here
_LONGEST, _GREATEST = 2**40, 1e38  # positions; float32
_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
_REMEDY = "write another format, or take the scaling out of config.json and stay within the trained context"


@dataclass(frozen=True)
class Reads:
    """What an architecture reads of a rotary embedding, beside the base, the type and its numbers.

    divisors: `rope_freqs.weight`. table: that alone, which must be there, and no scaling by keys. partial: how many
    channels of a head are turned, the first ones. factors: two tables, for short and long contexts. blunt: whether
    yarn's ramp may have its ends rounded, as llama.cpp always does.
    """

    divisors: bool = False
    table: bool = False
    partial: bool = False
    factors: bool = False
    blunt: bool = False


@dataclass(frozen=True)
class Rotary:
    """llama.cpp's rotary embedding of `d` channels: the symbols of the module's formula, divisors float32 `[d/2]`.

    factors: divisors up to n tokens and beyond, where they are two. off: how far the frequencies are, relative, from
    transformers', where that was taken. log_multiplier: by how much of ln s yarn multiplies attention in place of
    cosine and sine, for the architecture that does (latent.py).
    """

    base: float
    d: int
    kind: str = "none"
    factor: float = 1.0
    context: int = 0
    attn_factor: float = 1.0
    divisors: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    off: float = 0.0
    log_multiplier: float | None = None

    @property
    def tables(self) -> dict[str, Tensor]:
        """The tensors of the file that say it beside the keys."""
        found = {} if self.divisors is None else {"rope_freqs.weight": self.divisors}
        return found | (dict(zip(_FACTORS, self.factors, strict=True)) if self.factors else {})

    def describe(self, writer: gguf.GGUFWriter) -> None:
        """Add the keys; the divisors are a tensor of the file."""
        writer.add_rope_dimension_count(self.d)
        writer.add_rope_freq_base(self.base)
        if self.kind != "none":
            writer.add_rope_scaling_type(gguf.RopeScalingType(self.kind))
            writer.add_rope_scaling_factor(self.factor)
        if self.kind == "yarn" or self.factors:
            writer.add_rope_scaling_orig_ctx_len(self.context)
        if self.log_multiplier is not None:
            writer.add_rope_scaling_yarn_log_mul(self.log_multiplier)
        if self.attn_factor != 1:
            writer.add_rope_scaling_attn_factors(self.attn_factor)

    def frequencies(self) -> Tensor:
        """Return what llama.cpp turns each pair of channels by at position 1, float64 `[d/2]`."""
        i = torch.arange(self.d // 2, dtype=torch.float64)
        plain = float(np.float32(self.base)) ** (-2 * i / self.d)
        if self.divisors is not None:
            plain = plain / self.divisors.double()
        kept = {"none": torch.ones_like(i), "linear": torch.zeros_like(i)}.get(self.kind)
        kept = self._ramp(i) if kept is None else kept
        return plain * (kept + (1 - kept) / float(np.float32(self.factor)))

    def magnitude(self) -> float:
        """Return what llama.cpp multiplies cosine and sine by."""
        turns = self.kind == "yarn" and self.log_multiplier is None
        return self.attn_factor * (1 + 0.1 * math.log(max(self.factor, 1)) if turns else 1)

    def _ramp(self, i: Tensor) -> Tensor:
        """Return the share of each pair that is not interpolated; in float32 as there, since it is floored."""
        with np.errstate(all="ignore"):
            turns = np.array([_FAST, _SLOW], np.float32) * np.float32(2 * math.pi)
            lo, hi = self.d * np.log(np.float32(self.context) / turns) / (2 * np.log(np.float32(self.base)))
        lo, hi = max(0.0, float(np.floor(lo))), min(self.d - 1.0, float(np.ceil(hi)))
        return 1 - ((i - lo) / max(0.001, hi - lo)).clamp(0, 1)


def rotary(embedding: Any, config: Any, d: int, reads: Reads, layer_type: str | None = None) -> Rotary:
    """Return the keys by which llama.cpp rotates as `embedding`, transformers' module, does heads of `d` channels.

    layer_type: of the blocks that are meant, where a config turns them by their type; None where it does not.
    Raises LlmqError where no keys do.
    """
    given, limit = dict(config.rope_parameters), config.max_position_embeddings
    given = given if layer_type is None else dict(given[layer_type])
    said = f"rope_parameters {printable(repr(given), 200)}"
    original = int(_number(given, "original_max_position_embeddings")) if reads.factors else 0
    seen = _values(embedding, limit, original, layer_type)
    _require_finite(seen, said)
    (wanted, magnitude), *others = seen
    d = 2 * len(wanted) if reads.partial else d
    if 2 * len(wanted) != d:
        raise LlmqError(f"{said} do not rotate the {d} channels of a head; {_REMEDY}")
    if any(not torch.equal(wanted, w) or m != magnitude for w, m in others):
        return _two(seen, original, _base(given, said), said)
    proposals = list(_proposals(given, limit, d, said))[: 1 if reads.table else None]
    for found in proposals:
        if _equal(found.frequencies(), wanted) and not reads.table:
            return _scaled(found, magnitude)
    if (
        reads.divisors or reads.table
    ):  # over the kind that the config names, so that a reader without the table is not far off
        found = next((p for p in proposals if p.kind == given["rope_type"]), proposals[0])
        found = replace(found, divisors=(found.frequencies() / wanted).clamp(max=_STILL).float())
        if _equal(found.frequencies(), wanted):
            return _scaled(found, magnitude)
    if reads.blunt and given.get("truncate") is False and proposals[-1].kind == "yarn":
        off = (proposals[-1].frequencies() / wanted - 1).abs().max().item()
        return replace(_scaled(proposals[-1], magnitude), off=off)
    raise LlmqError(f"llama.cpp has no keys that rotate as {said} say; {_REMEDY}")


def _values(embedding: Any, limit: int, original: int, layer_type: str | None) -> list[tuple[Tensor, float]]:
    """Return transformers' frequencies, float64 `[d/2]`, and magnitude, at growing lengths of text.

    original: of the lengths, one more that is looked at, and the next.
    """
    own, kinds = ("", ()) if layer_type is None else (f"{layer_type}_", (layer_type,))
    most, seen = min(limit, _LONGEST), []
    for length in (1, *((original, original + 1) if original else ()), most, 2 * most):
        embedding(torch.zeros(1), torch.tensor([[length - 1]]), *kinds)  # dynamic kinds set their frequencies here
        found = getattr(embedding, f"{own}inv_freq"), getattr(embedding, f"{own}attention_scaling")
        seen.append((found[0].double(), float(found[1])))
    return seen


def _require_finite(seen: list[tuple[Tensor, float]], said: str) -> None:
    if not all(torch.isfinite(w).all() and math.isfinite(m) for w, m in seen):
        raise LlmqError(f"{said} do not rotate by finite numbers; {_REMEDY}")


def _two(seen: list[tuple[Tensor, float]], original: int, base: float, said: str) -> Rotary:
    """Return what rotates by one set of frequencies up to `original` tokens and by another beyond.

    seen: at 1, `original` and `original` + 1 tokens, and at lengths beyond. Raises LlmqError where there are more.
    """
    (short, magnitude), again, *beyond = seen
    long = beyond[0][0]
    if not original or not torch.equal(short, again[0]) or any(not torch.equal(long, w) for w, _ in beyond):
        raise LlmqError(f"{said} rotate by the length of the text, which llama.cpp does not; {_REMEDY}")
    if any(m != magnitude for _, m in seen):
        raise LlmqError(f"{said} scale by the length of the text, which llama.cpp does not; {_REMEDY}")
    plain = Rotary(base, 2 * len(short), context=original)
    tables = [(plain.frequencies() / w).float() for w in (short, long)]
    return _scaled(replace(plain, factors=(tables[0], tables[1])), magnitude)


def _proposals(given: Mapping[str, Any], limit: int, d: int, said: str) -> Iterator[Rotary]:
    """Yield what the numbers of a config may mean to llama.cpp, the plainest first."""
    base, context = _base(given, said), _number(given, "original_max_position_embeddings")
    yield Rotary(base, d)
    factor = _number(given, "factor") or (limit / context if context else 0)
    if factor:
        yield Rotary(base, d, "linear", factor)
    if factor and 1 <= context < 2**32:
        yield Rotary(base, d, "yarn", factor, int(context))


def _base(given: Mapping[str, Any], said: str) -> float:
    if base := _number(given, "rope_theta"):
        return base
    raise LlmqError(f"{said} have no rope_theta above 0, the base of the frequencies; correct config.json")


def _number(given: Mapping[str, Any], key: str) -> float:
    value = given.get(key)
    return float(value) if isinstance(value, int | float) and 0 < value < _GREATEST else 0.0


def _scaled(found: Rotary, magnitude: float) -> Rotary:
    """Return `found` with the attn_factor that makes its magnitude transformers'."""
    attn_factor = magnitude / found.magnitude()
    return found if abs(attn_factor - 1) < _CLOSE else replace(found, attn_factor=attn_factor)


def _equal(found: Tensor, wanted: Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=_CLOSE, atol=1 / _STILL)
