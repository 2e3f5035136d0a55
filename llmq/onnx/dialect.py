"""What both dialects share: embedding and head, float linears, quantized inputs, and what a dialect has to say itself.

A linear whose input has 8 bits too (W8A8) is the same in both: a rounded input (inputs.py) and a decoded weight.
Not here: the order of all this in a model (decoder.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from llmq.errors import LlmqError
from llmq.grids.int import Int
from llmq.onnx.architecture import Architecture
from llmq.onnx.graph import Dim, Graph
from llmq.onnx.inputs import rounded
from llmq.onnx.packing import in_order, integers
from llmq.onnx.weights import Linear
from llmq.types import Params, QTensor

EXACT, SCALES, HEAD = "values exact", "codes exact, scales rounded", "rounded to 8 bits"
DECODED, MINIMUM = "values exact, decoded to floats", "codes exact, minimum rounded"
_GROUP = 32  # columns that share a scale in a head that is rounded here


class Dialect(ABC):
    """Operators for the parts of a decoder; nodes are added to the graph, values are named by strings.

    level: the accuracy level of MatMulNBits. outcomes: what became of how many linears. falling: how many have scales
    below 0. rounds: how many round their inputs. inputs: what the graph is given beside the cache.
    """

    opsets: ClassVar[Mapping[str, int]]
    ir_version: ClassVar[int]
    inputs: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    def __init__(self, graph: Graph, model: Architecture, level: int = 0) -> None:
        self.graph, self.model, self.level = graph, model, level
        self.outcomes: Counter[str] = Counter()
        self.falling = self.rounds = 0

    @abstractmethod
    def begin(self) -> None:
        """Declare the inputs beside the cache, and compute what all blocks share."""

    @abstractmethod
    def norm(self, x: str, gain: str, name: str) -> str:
        """Return an RMSNorm over the last dimension."""

    @abstractmethod
    def add_norm(self, x: str, y: str, gain: str, name: str) -> tuple[str, str]:
        """Return the RMSNorm of x + y, and x + y."""

    @abstractmethod
    def attend(self, block: int, q: str, k: str, v: str, name: str) -> str:
        """Turn q and k, append k and v to the cache of the block, and attend. All are `[batch, seq, channels]`."""

    @abstractmethod
    def packed(self, x: str, q: QTensor, bias: str, name: str) -> str:
        """Return x times a linear in order whose weight alone is quantized, plus its bias ("" for none)."""

    def cache(self, block: int) -> tuple[list[str], list[str]]:
        """Declare what is kept of a block's keys and values: inputs and outputs `[batch, heads, positions, d]`."""
        model, parts = self.model, ("key", "value")

        def shape(positions: str) -> list[Dim]:
            return ["batch", model.kv_heads, positions, model.head_dim]

        past = [self.graph.input(f"past_key_values.{block}.{p}", self.graph.io, shape("past")) for p in parts]
        present = [f"present.{block}.{p}" for p in parts]
        for name in present:
            self.graph.output(name, self.graph.io, shape("total"))
        return past, present

    def floats(self, name: str, value: Tensor) -> str:
        """Add a float tensor in the graph's dtype. Raises LlmqError for numbers that it does not hold."""
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise LlmqError(f"{name} is {kind}, neither float nor packed; the checkpoint's config is not its own")
        if not torch.isfinite(value).all():
            raise LlmqError(f"{name} holds NaN or Inf; the checkpoint is damaged")
        own = value.to(self.graph.io)
        if not torch.isfinite(own).all():
            raise LlmqError(f"{name} holds numbers that {self._io} does not; say --to onnx:io=float32")
        return self.graph.constant(name, own)

    def linear(self, x: str, linear: Linear, name: str) -> str:
        """Return x times a linear, plus its bias. name: of the module, and of what it gives."""
        if isinstance(linear.weight, QTensor):
            self._count(linear.weight, exact=linear.exact)
            return self.solved(x, linear.weight, linear, name)
        return self.product(x, self.floats(f"{name}.weight", linear.weight.T), self._bias(linear, name), name)

    def solved(self, x: str, weight: QTensor, linear: Linear, name: str) -> str:
        """Return x times a quantized weight, with the bias and the rounding of inputs of a linear."""
        q, order = in_order(weight, name)
        if order is not None:
            x = self.graph.node("Gather", [x, self.graph.constant(f"{name}.order", order)], f"{name}.input", axis=-1)
        if linear.activation is None:
            return self.packed(x, q, self._bias(linear, name), name)
        self.rounds += 1
        x = rounded(self.graph, x, linear.activation, q.input, q.codes.shape[1], name)
        return self.product(x, self.decoded(q, name), self._bias(linear, name), name)

    def _bias(self, linear: Linear, name: str) -> str:
        return "" if linear.bias is None else self.floats(f"{name}.bias", linear.bias)

    def product(self, x: str, matrix: str, bias: str, name: str) -> str:
        """Return x times a matrix `[K, N]`, plus a bias ("" for none)."""
        if not bias:
            return self.graph.node("MatMul", [x, matrix], name)
        return self.graph.node("Add", [self.graph.node("MatMul", [x, matrix], f"{name}.product"), bias], name)

    def scales(self, name: str, value: Tensor) -> str:
        """Add the scales of a linear, in the graph's dtype; one that it holds no digit of is refused."""
        own = value.to(self.graph.io)
        if not torch.isfinite(own).all() or ((own == 0) & (value != 0)).any():
            raise LlmqError(f"{name} holds scales that {self._io} does not; say --to onnx:io=float32")
        return self.graph.constant(name, own)

    def decoded(self, q: QTensor, name: str) -> str:
        """Return the weight of a linear in order, decoded by the graph, `[K, N]`."""
        made = integers(q)
        N, K = q.codes.shape
        inputs = [
            self.graph.constant(f"{name}.codes", made.values, made.kind, (K, N)),
            self.scales(f"{name}.scales", made.scales),
        ]
        if made.zeros is not None:
            inputs.append(self.graph.constant(f"{name}.zeros", made.zeros, made.kind, made.scales.shape))
        by = {"axis": 0, "block_size": made.block} if made.block else {"axis": 1}
        return self.graph.node("DequantizeLinear", inputs, f"{name}.decoded", **by)

    def table(self, q: QTensor) -> Tensor | QTensor:
        """Return a packed embedding as `embed_rounded` takes it, else decoded, `[V, H]`."""
        plain = isinstance(q.params, Params) and q.grid.bits == 8 and q.g_idx is None
        if plain and bool((Params.of(q.params).zero == 128).all()):
            self._count(q)
            return q
        self.outcomes[DECODED] += 1
        return q.dequantize()

    def embed(self, ids: str, weight: Tensor) -> str:
        """Return the rows of a float embedding `[V, H]`."""
        return self.graph.node("Gather", [self.floats("embedding", weight), ids], "embedded", axis=0)

    def tied(self, x: str) -> str:
        """Return x times the float embedding."""
        matrix = self.graph.node("Transpose", ["embedding"], "head.weight", perm=[1, 0])
        return self.graph.node("MatMul", [x, matrix], "head")

    @abstractmethod
    def embed_rounded(self, ids: str, q: QTensor) -> str:
        """Return the rows of an embedding of 8 bits, symmetric."""

    @abstractmethod
    def tied_rounded(self, x: str, q: QTensor) -> str:
        """Return x times the embedding that `embed_rounded` was given."""

    def eight_bits(self, weight: Tensor, name: str) -> QTensor:
        """Round the embedding or head to 8 bits, symmetric. Raises LlmqError where no group divides its rows."""
        H = weight.shape[1]
        if H % _GROUP:
            raise LlmqError(f"{name}: rows of {H} columns are no multiple of {_GROUP}; say --to onnx:head=float")
        grid = Int(bits=8, group=_GROUP, restricted=True, scale_dtype=self.graph.io)
        self.outcomes[HEAD] += 1
        return QTensor.rounded(weight.float(), grid)

    def heads_norm(self, x: str, gain: str, heads: int, name: str) -> str:
        """Return an RMSNorm over each head."""
        shape = self.graph.numbers(f"by_{heads}_heads", 0, 0, heads, self.model.head_dim)
        apart = self.graph.node("Reshape", [x, shape], f"{name}.heads")
        normed = self.norm(apart, gain, f"{name}.normed")
        return self.graph.node("Reshape", [normed, self.graph.numbers("flat_heads", 0, 0, -1)], name)

    def activation(self, x: str, name: str) -> str:
        """Return the activation of the MLP."""
        node, kind = self.graph.node, self.model.activation
        if kind == "silu":
            return node("Mul", [x, node("Sigmoid", [x], f"{name}.sigmoid")], name)
        return node("Gelu", [x], name, approximate="tanh" if kind == "gelu_tanh" else "none")

    def capped(self, x: str, cap: float, name: str) -> str:
        """Return cap * tanh(x / cap)."""
        by = self.graph.scalar(f"{name}.cap", cap)
        small = self.graph.node("Tanh", [self.graph.node("Div", [x, by], f"{name}.divided")], f"{name}.tanh")
        return self.graph.node("Mul", [small, by], name)

    def times(self, x: str, factor: float, name: str) -> str:
        """Return x times a number."""
        return x if factor == 1 else self.graph.node("Mul", [x, self.graph.scalar(f"{name}.factor", factor)], name)

    @property
    def _io(self) -> str:
        return str(self.graph.io).removeprefix("torch.")

    def _count(self, q: QTensor, *, exact: bool = True) -> None:
        scale = q.params.scale
        kept = torch.equal(scale.to(self.graph.io).double(), scale.double())
        self.outcomes[SCALES if not kept else EXACT if exact else MINIMUM] += 1
        self.falling += bool((scale < 0).any())
