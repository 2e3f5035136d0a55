"""Plain ONNX, opset 23, no operator of any vendor: what TensorRT, OpenVINO, QNN and SNPE take as well as onnxruntime.

    linears     DequantizeLinear of INT4, UINT4, INT8 or UINT8 in blocks along K, then MatMul
    attention   RotaryEmbedding by position_ids, then Attention with a cache and a mask of booleans
    norms       RMSNormalization

A query sees a key where the mask has it, it does not lie behind the query, and the window reaches it. So rows of a
batch may be padded on either side, as position_ids say; a query always sees itself, so that one that is padding divides
by no 0.
Source: onnx docs/Operators.md.
Not here: rounded inputs (inputs.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from llmq.onnx.dialect import Dialect
from llmq.types import QTensor


class Qdq(Dialect):
    """See the module."""

    opsets: ClassVar[Mapping[str, int]] = {"": 23}
    ir_version = 11
    inputs: ClassVar[list[str]] = ["input_ids", "attention_mask", "position_ids"]

    def begin(self) -> None:
        """See `Dialect.begin`: a mask `[batch, 1, seq, total]` for every window."""
        graph, node = self.graph, self.graph.node
        mask = graph.input("attention_mask", torch.int64, ["batch", "total"])
        graph.input("position_ids", torch.int64, ["batch", "seq"])
        first, one, zero = graph.index("second", 1), graph.index("index_one", 1), graph.index("index_zero", 0)
        total = node("Gather", [node("Shape", [mask], "mask_shape"), first], "total_length", axis=0)
        new = node("Gather", [node("Shape", ["input_ids"], "ids_shape"), first], "new_length", axis=0)
        keys = node("Range", [zero, total, one], "keys")
        queries = node("Range", [node("Sub", [total, new], "past_length"), total, one], "query_row")
        queries = node("Unsqueeze", [queries, graph.numbers("one", 1)], "queries")
        node("Equal", [keys, queries], "itself")
        kept = node("Unsqueeze", [node("Cast", [mask], "mask_kept", to=9), graph.numbers("inner", 1, 2)], "kept")
        node("And", [node("LessOrEqual", [keys, queries], "before"), kept], "seen")
        for window in dict.fromkeys(self.model.windows):
            self._mask(window)

    def _mask(self, window: int) -> None:
        node, seen = self.graph.node, "seen"
        if window:
            edge = node("Sub", ["queries", self.graph.index(f"window_{window}", window)], f"edge_{window}")
            seen = node("And", [seen, node("Greater", ["keys", edge], f"near_{window}")], f"seen_{window}")
        node("Or", [seen, "itself"], f"mask_{window}")

    def norm(self, x: str, gain: str, name: str) -> str:
        """See `Dialect.norm`."""
        eps = float(self.model.config.rms_norm_eps)
        return self.graph.node("RMSNormalization", [x, gain], name, axis=-1, epsilon=eps)

    def add_norm(self, x: str, y: str, gain: str, name: str) -> tuple[str, str]:
        """See `Dialect.add_norm`."""
        total = self.graph.node("Add", [x, y], f"{name}.sum")
        return self.norm(total, gain, name), total

    def attend(self, block: int, q: str, k: str, v: str, name: str) -> str:
        """See `Dialect.attend`."""
        model = self.model
        q, k = self._turned(block, q, model.heads), self._turned(block, k, model.kv_heads)
        past, present = self.cache(block)
        attributes = {"q_num_heads": model.heads, "kv_num_heads": model.kv_heads, "scale": model.scale}
        if model.cap:
            attributes["softcap"] = model.cap
        inputs = [q, k, v, f"mask_{model.windows[block]}", *past]
        return self.graph.node("Attention", inputs, [name, *present], **attributes)

    def _turned(self, block: int, x: str, heads: int) -> str:
        turn = self.model.turns[block]
        if not turn:
            return x
        channels = self.model.tables[turn].channels
        attributes = {"num_heads": heads, "interleaved": int(self.model.family.neighbours)}
        if channels != self.model.head_dim:
            attributes["rotary_embedding_dim"] = channels
        inputs = [x, f"{turn}.cos", f"{turn}.sin", "position_ids"]
        return self.graph.node("RotaryEmbedding", inputs, f"{x}.turned", **attributes)

    def packed(self, x: str, q: QTensor, bias: str, name: str) -> str:
        """See `Dialect.packed`."""
        return self.product(x, self.decoded(q, name), bias, name)

    def embed_rounded(self, ids: str, q: QTensor) -> str:
        """See `Dialect.embed_rounded`: rows of codes and of scales are looked up, then decoded."""
        codes = self.graph.constant("embedding.codes", (q.codes.to(torch.int16) - 128).to(torch.int8))
        scales = self.scales("embedding.scales", q.params.scale)
        zeros = self.graph.constant("embedding.zeros", torch.zeros(q.params.scale.shape, dtype=torch.int8))
        rows = [self.graph.node("Gather", [t, ids], f"{t}.rows", axis=0) for t in (codes, scales, zeros)]
        return self.graph.node("DequantizeLinear", rows, "embedded", **self._blocks(q, axis=2))

    def tied_rounded(self, x: str, q: QTensor) -> str:
        """See `Dialect.tied_rounded`."""
        inputs = ["embedding.codes", "embedding.scales", "embedding.zeros"]
        rows = self.graph.node("DequantizeLinear", inputs, "head.rows", **self._blocks(q, axis=1))
        return self.graph.node("MatMul", [x, self.graph.node("Transpose", [rows], "head.decoded", perm=[1, 0])], "head")

    def _blocks(self, q: QTensor, axis: int) -> dict[str, int]:
        return {"axis": axis, "block_size": q.codes.shape[1] // q.params.scale.shape[1]}
