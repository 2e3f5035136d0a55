"""GGUF, the files of llama.cpp: every matrix in a ggml type of its own, all in one file with the tokenizer.

    weight   uint8 [N, row bytes]   the stored blocks of every row, one after another

A type's byte layout is its grid (grids/q4_k.py and so on), so packing is the grid's own. Which tensor gets which type
is a mixture (`--type Q4_K_M`), the file around the tensors is llmq/gguf/.
Not here: any of the bytes; biases and norms, which the container writes as float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmq.types import LinearSpec, LlmqError, QTensor, Scheme


@dataclass
class Gguf:
    """The GGUF format.

    pre: llama.cpp's name of the tokenizer's pre-tokenizer, where llmq cannot find it; None finds it.
    """

    pre: str | None = None
    quant_method: str = field(default="gguf", init=False)

    @property
    def derived(self) -> frozenset[str]:
        """See `Format.derived`."""
        return frozenset()

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return float16, whatever the model's dtype."""
        return torch.float16

    def check(self, linears: Sequence[LinearSpec]) -> list[str]:
        """Refuse what no GGUF tensor can hold. Raises LlmqError."""
        for spec in linears:
            grid = spec.scheme.weight
            if not hasattr(grid, "row_bytes"):
                raise LlmqError(
                    f"{spec.name}: GGUF holds ggml's types, not {type(grid).__name__} grids; say --type Q4_K_M"
                )
            if spec.scheme.activation is not None:
                raise LlmqError(f"{spec.name}: GGUF holds no quantized activations; use --format compressed-tensors")
            try:
                grid.row_bytes(spec.K)
            except ValueError as e:
                raise LlmqError(f"{spec.name}: {e}; take a type of 32-column blocks (--override), or F16") from e
        return []

    def pack(self, q: QTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """Return the stored rows. The codes must lie on the natural column order (no g_idx)."""
        if q.g_idx is not None:
            raise LlmqError(f"{spec.name}: GGUF holds no g_idx; drop desc_act (static groups)")
        return {"weight": spec.scheme.weight.to_bytes(q.codes, q.params)}

    def unpack(self, tensors: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Invert `pack`. Raises LlmqError where the rows are missing or of another size."""
        expected = self.layout(spec)["weight"]
        rows = tensors.get("weight")
        if rows is None or rows.shape != expected.shape or rows.dtype != expected.dtype:
            found = "missing" if rows is None else f"{rows.dtype} {list(rows.shape)}"
            raise LlmqError(f"{spec.name}.weight is {found}, not {expected.dtype} {list(expected.shape)}")
        codes, params = spec.scheme.weight.from_bytes(rows)
        return QTensor(codes, params, spec.scheme.weight)

    def layout(self, spec: LinearSpec) -> dict[str, Tensor]:
        """Return the meta tensor of the stored rows."""
        return {
            "weight": torch.empty(spec.N, spec.scheme.weight.row_bytes(spec.K), dtype=torch.uint8, device="meta"),
        }

    def config(self, linears: Sequence[LinearSpec], skipped: Sequence[str]) -> dict[str, Any]:
        """Return the method's name alone: a GGUF file has no config.json, each tensor says its type."""
        return {"quant_method": "gguf"}

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> tuple[Any, Callable[[str, int, int], Scheme | None]]:
        """Refuse: a transformers checkpoint cannot be GGUF."""
        raise LlmqError("a GGUF model is one file, not a checkpoint folder; run it with llama.cpp, or llmq inspect it")
