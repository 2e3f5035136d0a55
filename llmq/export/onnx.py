"""ONNX: a folder with the graph of a language model, its codes kept; onnxruntime-genai chats with it as it is.

    model.onnx, model.onnx.data    the graph, and its large tensors beside it
    genai_config.json              how onnxruntime-genai runs it
    config.json                    the source's, without its quantization_config
    export.json                    what became of the linears; checksums of all tensors and files
    and the tokenizer, chat templates and generation settings as they were

Not here: the graph (llmq/onnx), which checkpoint (_target.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from llmq.checkpoint import Sink
from llmq.checkpoint.dialects import without_quantization
from llmq.checkpoint.packed import CACHE
from llmq.checkpoint.place import EXPORTED
from llmq.export._integers import of_integers
from llmq.export._record import close
from llmq.export._target import OfCodes, Packed, open_packed, refuse_rounding
from llmq.guard.reading import json_object
from llmq.model.pretrained import blank_model
from llmq.onnx.architecture import Architecture, architecture
from llmq.onnx.decoder import Decoder
from llmq.onnx.dialect import Dialect
from llmq.onnx.genai import GenAI
from llmq.onnx.genai_config import genai_config
from llmq.onnx.graph import Graph, checked, stored_tensors
from llmq.onnx.inputs import require_rounded
from llmq.onnx.packing import require_held
from llmq.onnx.qdq import Qdq
from llmq.onnx.weights import Weights
from llmq.options import Between
from llmq.progress import Progress
from llmq.types import LlmqError, QTensor

_DIALECTS: Mapping[str, type[Dialect]] = {"genai": GenAI, "qdq": Qdq}
_IO = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Onnx(OfCodes):
    """An ONNX graph with its cache, and what onnxruntime-genai needs beside it.

    dialect: genai, onnxruntime's own operators; or qdq, plain ONNX, for TensorRT, OpenVINO, QNN and others.
    io: the dtype of activations, and of scales and floats with them: float32, float16 or bfloat16.
    accuracy_level: of MatMulNBits: 0 computes with floats, 4 rounds every input to 8 bits and is about twice as fast.
    head: float, or int8 to round the output head to 8 bits, and a tied embedding with it.
    context: how many positions the rotary tables have; None takes all that the model has.
    """

    dialect: Literal["genai", "qdq"] = "genai"
    io: Literal["float32", "float16", "bfloat16"] = "float32"
    accuracy_level: Literal[0, 4] = 0
    head: Literal["float", "int8"] = "float"
    context: Annotated[int, Between(1, 2**24)] | None = None

    bare = "dialect"
    extra = "onnx"
    packages = ("onnx",)

    def __post_init__(self) -> None:
        if self.accuracy_level and self.dialect == "qdq":
            raise LlmqError(
                "--to onnx:qdq has no accuracy_level, which is MatMulNBits's; onnxruntime takes the session option "
                "session.qdq_matmulnbits_accuracy_level"
            )

    def open(self, src: str, requantize: str | None) -> Packed:
        """See `Target.open`."""
        refuse_rounding(requantize, "onnx", "gptq")
        return open_packed(src, minima=True)  # an embedding is decoded, whatever its minima are

    def check(self, opened: Packed) -> list[str]:
        """Refuse a model that is no graph of llmq's, codes that it does not hold, and a folder without a tokenizer."""
        self._architecture(opened)
        for linear in (spec for spec in opened.linears if not spec.embedding):
            require_held(linear, blocks=self.dialect == "genai")
            if linear.scheme.activation is not None:
                require_rounded(linear.scheme.activation, linear.name)
        opened.tokenizer()
        if any(n.endswith(CACHE) for n in opened.source.names()):
            return ["the scales of the key-value cache are left out: the graph keeps it in floats"]
        return []

    def write(self, opened: Packed, out: Sink, step: Progress) -> dict[str, Any]:
        """See `Target.write`."""
        model = self._architecture(opened)
        with Graph(out.stage, _IO[self.io]) as graph:
            dialect = _DIALECTS[self.dialect](graph, model, self.accuracy_level)
            weights = Weights(opened.source, opened.packed, _integers, step)
            tied = bool(opened.config.tie_word_embeddings)
            Decoder(dialect, weights, tied=tied, rounded=self.head == "int8").write()
            graph.save(dialect.opsets, dialect.ir_version)
        out.copy_files(opened.folder)
        out.json("config.json", without_quantization(opened.source.config))
        out.text("genai_config.json", self._genai(opened.folder, dialect))
        return self._close(opened, out, dialect)

    def verify(self, out: Sink) -> None:
        """Read every tensor again. Raises LlmqError for one that is not what was handed over."""
        wanted = json_object(out.stage / EXPORTED)["tensors"]
        found = {name: hashlib.sha256(raw).hexdigest() for name, _, raw in stored_tensors(out.stage)}
        differ = [name for name in wanted if found.get(name) != wanted[name]]
        if differ or found.keys() != wanted.keys():
            raise LlmqError(f"tensor {(differ or ['?'])[0]} is not what was written; is the disk at fault?")
        if self.dialect == "qdq":
            checked(out.stage)

    def _architecture(self, opened: Packed) -> Architecture:
        return architecture(opened.config, blank_model(opened.source, opened.config), self.context)

    def _genai(self, folder: Path, dialect: Dialect) -> str:
        file = folder / "generation_config.json"
        own = json_object(file) if file.is_file() else {}
        return genai_config(dialect.model, own, dialect.inputs, shared=self.dialect == "genai")

    def _close(self, opened: Packed, out: Sink, dialect: Dialect) -> dict[str, Any]:
        """Write the record, which seals all other files. Returns what the run says."""
        warnings = [*opened.warnings, *self._told(dialect)]
        target, tensors = {"onnx": asdict(self)}, dialect.graph.digests
        read_by = ("onnxruntime-genai",) if self.dialect == "genai" else ()
        return close(out, opened, target, dict(dialect.outcomes), warnings, read_by, tensors=tensors)

    def _told(self, dialect: Dialect) -> list[str]:
        """Return what a user of the folder should know."""
        found = []
        if dialect.falling and self.dialect == "qdq":
            found.append(
                f"{dialect.falling} linears have scales below 0: onnxruntime and OpenVINO compute with them, TensorRT "
                "has not been seen to; --range minmax makes none"
            )
        if dialect.rounds:
            found.append(
                f"{dialect.rounds} linears round their inputs to 8 bits: on CPUs without VNNI set the session option "
                "session.x64quantprecision to 1, or onnxruntime's sums overflow in silence"
            )
        return found


def _integers(q: QTensor, name: str) -> QTensor:
    try:
        return of_integers(q)
    except LlmqError as e:
        raise LlmqError(f"{name}: {e}; decode it (llmq dequantize), quantize it to integers, and export that") from e
