"""The dialect of onnxruntime-genai: onnxruntime's own operators, which keep codes packed and a cache in place.

    linears     MatMulNBits: the weight is decoded in the kernel. accuracy_level 0 computes in the dtype of the graph;
                4 rounds every input to 8 bits, in blocks, and is about twice as fast
    attention   GroupQueryAttention: rotary embedding, cache, window and softmax in one node
    norms       SkipSimplifiedLayerNormalization adds to the residual stream and normalizes the sum

Rows of a batch are padded on the right, as onnxruntime-genai pads them: a row's length is the sum of its mask.
Source: onnxruntime docs/ContribOperators.md; the graphs of onnxruntime-genai's own builder.
Not here: genai_config.json (export/onnx.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from llmq.onnx.dialect import Dialect
from llmq.onnx.packing import NBits, n_bits
from llmq.types import QTensor

_OWN = "com.microsoft"


class GenAI(Dialect):
    """See the module."""

    opsets: ClassVar[Mapping[str, int]] = {"": 21, _OWN: 1}
    ir_version = 10

    def begin(self) -> None:
        """See `Dialect.begin`: from the mask, each row's last position, and the positions in all."""
        node, mask = self.graph.node, self.graph.input("attention_mask", torch.int64, ["batch", "total"])
        one = self.graph.numbers("one", 1)
        length = node("ReduceSum", [mask, one], "lengths", keepdims=0)
        node("Cast", [node("Sub", [length, one], "last_positions")], "seqlens_k", to=6)
        total = node(
            "Gather", [node("Shape", [mask], "mask_shape"), self.graph.index("second", 1)], "positions", axis=0
        )
        node("Cast", [total], "total_length", to=6)

    def norm(self, x: str, gain: str, name: str) -> str:
        """See `Dialect.norm`."""
        eps = float(self.model.config.rms_norm_eps)
        return self.graph.node("SimplifiedLayerNormalization", [x, gain], name, axis=-1, epsilon=eps, stash_type=1)

    def add_norm(self, x: str, y: str, gain: str, name: str) -> tuple[str, str]:
        """See `Dialect.add_norm`."""
        total, eps = f"{name}.sum", float(self.model.config.rms_norm_eps)
        op = f"{_OWN}.SkipSimplifiedLayerNormalization"
        self.graph.node(op, [x, y, gain], [name, "", "", total], epsilon=eps)
        return name, total

    def attend(self, block: int, q: str, k: str, v: str, name: str) -> str:
        """See `Dialect.attend`."""
        model, turn = self.model, self.model.turns[block]
        past, present = self.cache(block)
        tables = [f"{turn}.cos", f"{turn}.sin"] if turn else []
        attributes = {
            "num_heads": model.heads,
            "kv_num_heads": model.kv_heads,
            "scale": model.scale,
            "softcap": model.cap,
            "do_rotary": int(bool(turn)),
            "rotary_interleaved": int(model.family.neighbours),
            "local_window_size": model.windows[block] or -1,
        }
        inputs = [q, k, v, *past, "seqlens_k", "total_length", *tables]
        return self.graph.node(f"{_OWN}.GroupQueryAttention", inputs, [name, *present], **attributes)

    def packed(self, x: str, q: QTensor, bias: str, name: str) -> str:
        """See `Dialect.packed`."""
        made = n_bits(q, name)
        words = self.graph.constant(f"{name}.codes", made.words)
        scales = self.scales(f"{name}.scales", made.scales)
        zeros = "" if made.zeros is None else self.graph.constant(f"{name}.zeros", made.zeros)
        return self._n_bits([x, words, scales, zeros, "", bias], made, q, name)

    def _n_bits(self, inputs: list[str], made: NBits, q: QTensor, name: str) -> str:
        while not inputs[-1]:
            inputs.pop()
        N, K = q.codes.shape
        attributes = {"K": K, "N": N, "bits": made.bits, "block_size": made.block, "accuracy_level": self.level}
        return self.graph.node(f"{_OWN}.MatMulNBits", inputs, name, **attributes)

    def embed_rounded(self, ids: str, q: QTensor) -> str:
        """See `Dialect.embed_rounded`; the head reads the same two tensors."""
        made = n_bits(q, "embedding")
        codes = self.graph.constant("embedding.codes", q.codes)
        scales = self.scales("embedding.scales", made.scales)
        zeros = self.graph.constant("embedding.zeros", torch.full(made.scales.shape, 128, dtype=torch.uint8))
        by = {"bits": 8, "block_size": made.block, "gather_axis": 0, "quantize_axis": 1}
        return self.graph.node(f"{_OWN}.GatherBlockQuantized", [codes, ids, scales, zeros], "embedded", **by)

    def tied_rounded(self, x: str, q: QTensor) -> str:
        """See `Dialect.tied_rounded`."""
        made = n_bits(q, "embedding")
        shape = self.graph.numbers("head.shape", *made.words.shape)
        words = self.graph.node("Reshape", ["embedding.codes", shape], "head.codes")
        return self._n_bits([x, words, "embedding.scales"], made, q, "head")
