"""A decoder as nodes: the order of its parts, in whichever dialect.

    embedding -> blocks: x + attention(norm(x)), x + mlp(norm(x)) -> norm -> head

with norms behind a part, multipliers and caps where the architecture has them. The residual stream is kept as a sum
that is not yet taken (`Stream`), since one operator of a dialect may add and normalize at once.
Not here: what a part is made of (dialect.py, genai.py, qdq.py), what the model is (architecture.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmq.onnx.dialect import Dialect
from llmq.onnx.weights import Weights
from llmq.types import LlmqError, QTensor

_EMBEDDING, _HEAD = "model.embed_tokens", "lm_head"


class Stream:
    """The residual stream: `x`, and what is still to be added to it."""

    def __init__(self, dialect: Dialect, x: str) -> None:
        self._dialect, self._x, self._more = dialect, x, ""

    def add(self, y: str) -> None:
        """Add the output of a part."""
        self._x, self._more = self.value(), y

    def value(self) -> str:
        """Return the stream."""
        if self._more:
            self._x = self._dialect.graph.node("Add", [self._x, self._more], f"{self._more}.stream")
            self._more = ""
        return self._x

    def normed(self, gain: str, name: str) -> str:
        """Return an RMSNorm of the stream."""
        if not self._more:
            return self._dialect.norm(self._x, gain, name)
        normed, self._x = self._dialect.add_norm(self._x, self._more, gain, name)
        self._more = ""
        return normed


class Decoder:
    """Writes a model's nodes.

    tied: whether the head is the embedding. rounded: whether both then, or the head alone, have 8 bits.
    """

    def __init__(self, dialect: Dialect, weights: Weights, *, tied: bool, rounded: bool = False) -> None:
        self._dialect, self._weights, self._tied, self._rounded = dialect, weights, tied, rounded
        self._graph, self._model = dialect.graph, dialect.model

    def write(self) -> None:
        """Add all nodes, from input_ids to logits. Raises LlmqError for a tensor that none of them reads, by name."""
        model, dialect = self._model, self._dialect
        ids = self._graph.input("input_ids", torch.int64, ["batch", "seq"])
        self._graph.output("logits", self._graph.io, ["batch", "seq", int(model.config.vocab_size)])
        for name, table in model.tables.items():
            self._graph.constant(f"{name}.cos", table.cos.to(self._graph.io))
            self._graph.constant(f"{name}.sin", table.sin.to(self._graph.io))
        dialect.begin()
        rows = self._embedding()
        embedded = dialect.embed(ids, rows) if isinstance(rows, Tensor) else dialect.embed_rounded(ids, rows)
        stream = Stream(dialect, dialect.times(embedded, model.embedding, "embedded.scaled"))
        for i in range(model.blocks):
            self._block(stream, i)
        self._logits(self._normed(stream, "model.norm"), None if isinstance(rows, Tensor) else rows)
        if left := self._weights.left():
            raise LlmqError(
                f"tensor {left[0]} has no place in an ONNX graph of {model.config.model_type}; it would be lost"
            )

    def _embedding(self) -> Tensor | QTensor:
        """Return the embedding: as it is packed, or rounded where the head shares it and is to have 8 bits."""
        weight = self._weights.table(_EMBEDDING)
        if isinstance(weight, QTensor):
            return self._dialect.table(weight)
        return self._dialect.eight_bits(weight, "embedding") if self._tied and self._rounded else weight

    def _logits(self, x: str, rounded: QTensor | None) -> None:
        """Add the head, and what is done to what it gives. rounded: the embedding, where it has 8 bits."""
        dialect, model = self._dialect, self._model
        if self._tied:
            raw = dialect.tied(x) if rounded is None else dialect.tied_rounded(x, rounded)
        else:
            raw = self._own_head(x)
        raw = dialect.times(raw, model.logits, "head.scaled")
        raw = dialect.capped(raw, model.last_cap, "head.capped") if model.last_cap else raw
        self._graph.node("Identity", [raw], "logits")

    def _own_head(self, x: str) -> str:
        linear = self._weights.linear(_HEAD)
        if not self._rounded or isinstance(linear.weight, QTensor):
            return self._dialect.linear(x, linear, "head")
        return self._dialect.solved(x, self._dialect.eight_bits(linear.weight, _HEAD), linear, "head")

    def _block(self, stream: Stream, i: int) -> None:
        family, at = self._model.family, f"model.layers.{i}"
        self._part(stream, self._attention(self._before(stream, at, family.before), i), at, family.behind)
        self._part(stream, self._mlp(self._before(stream, at, family.before_mlp), f"{at}.mlp"), at, family.behind_mlp)

    def _before(self, stream: Stream, at: str, norm: str) -> str:
        return self._normed(stream, f"{at}.{norm}") if norm else stream.value()

    def _part(self, stream: Stream, y: str, at: str, norm: str) -> None:
        """Add what a part gives to the stream, normalized and multiplied where the architecture says so."""
        if norm:
            y = self._dialect.norm(y, self._gain(f"{at}.{norm}"), f"{at}.{norm}")
        stream.add(self._dialect.times(y, self._model.residual, f"{y}.scaled"))

    def _normed(self, stream: Stream, name: str) -> str:
        return stream.normed(self._gain(name), name)

    def _gain(self, module: str) -> str:
        """Add what a norm multiplies by."""
        name = f"{module}.weight"
        weight = self._weights.tensor(name)
        return self._dialect.floats(name, 1 + weight.float() if name in self._model.shifted else weight)

    def _linear(self, x: str, module: str) -> str:
        return self._dialect.linear(x, self._weights.linear(module), module)

    def _attention(self, x: str, i: int) -> str:
        at, model = f"model.layers.{i}.self_attn", self._model
        if self._weights.has(f"{at}.qkv_proj"):
            q, k, v = self._split(self._linear(x, f"{at}.qkv_proj"), [model.heads, *[model.kv_heads] * 2])
        else:
            q, k, v = (self._linear(x, f"{at}.{name}_proj") for name in "qkv")
        q = self._headed(q, f"{at}.q_norm", model.heads)
        k = self._headed(k, f"{at}.k_norm", model.kv_heads)
        return self._linear(self._dialect.attend(i, q, k, v, f"{at}.heads"), f"{at}.o_proj")

    def _split(self, x: str, heads: list[int]) -> list[str]:
        """Return q, k and v of what a fused linear gives."""
        sizes = self._graph.numbers("qkv_channels", *(n * self._model.head_dim for n in heads))
        names = [f"{x}.{part}" for part in "qkv"]
        self._graph.node("Split", [x, sizes], names, axis=-1)
        return names

    def _headed(self, x: str, norm: str, heads: int) -> str:
        """Return q or k normalized, over each head or over all of them, as wide as the gain is; or as it is."""
        if not self._weights.has(norm):
            return x
        gain, one = self._gain(norm), self._weights.tensor(f"{norm}.weight").numel() == self._model.head_dim
        return self._dialect.heads_norm(x, gain, heads, norm) if one else self._dialect.norm(x, gain, norm)

    def _mlp(self, x: str, at: str) -> str:
        if self._weights.has(f"{at}.gate_up_proj"):
            both = self._linear(x, f"{at}.gate_up_proj")
            gate, up = f"{both}.gate", f"{both}.up"
            self._graph.node("Split", [both], [gate, up], axis=-1, num_outputs=2)
        else:
            gate, up = self._linear(x, f"{at}.gate_proj"), self._linear(x, f"{at}.up_proj")
        opened = self._dialect.activation(gate, f"{gate}.opened")
        return self._linear(self._graph.node("Mul", [opened, up], f"{at}.inner"), f"{at}.down_proj")
