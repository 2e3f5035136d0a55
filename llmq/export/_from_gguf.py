"""A GGUF file as the tensors, the config and the tokenizer of a transformers checkpoint.

Names, the order of q and k rows, gains and the config are what verify reads in a file (verify/ggml.py): the same code
that repeats a forward from it. Rotary embedding is said by the first form of `rope_parameters` that turns by the file's
own numbers, the table of Llama 3 included.
Not here: writing the checkpoint (float.py), its codes (_gguf_codes.py), the tokenizer (gguf/hf_tokenizer.py).
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmq.checkpoint.parts import Fused
from llmq.checkpoint.source import View
from llmq.errors import LlmqError
from llmq.export._experts import together
from llmq.gguf.hf_tokenizer import special_ids, tokenizer_from
from llmq.gguf.reader import GgufFile
from llmq.model.pretrained import blank_model, model_config
from llmq.verify.ggml import Gguf, open_gguf
from llmq.verify.keys import Keys
from llmq.verify.report import Report

_FLOATS = {"F32": torch.float32, "F64": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_WRITTEN = {
    "mixtral": (
        (re.compile(r"\.mlp\.gate\b"), ".block_sparse_moe.gate"),
        (re.compile(r"\.mlp\.experts\.(\d+)\.gate_proj\b"), r".block_sparse_moe.experts.\1.w1"),
        (re.compile(r"\.mlp\.experts\.(\d+)\.down_proj\b"), r".block_sparse_moe.experts.\1.w2"),
        (re.compile(r"\.mlp\.experts\.(\d+)\.up_proj\b"), r".block_sparse_moe.experts.\1.w3"),
    )
}
"""What checkpoints of a model_type call modules that its model calls otherwise."""
_CLOSE = 1e-5  # of frequencies, which llama.cpp computes in float32
_LLAMA3 = ((8.0, 32.0), (1.0,), (4.0,), (8192,))  # factors, low and high frequency factors, contexts of its releases


class GgufSource(View):
    """The tensors of a GGUF file by transformers' names: what is packed decoded to `dtype`, floats as they are.

    file: its tensors as verify reads them. first: its first shard, whose keys count. dtype: None takes that of a
    float embedding or head, else of whatever is stored in 16 bits, else float16, as scales are.
    Raises LlmqError for an architecture or a tensor that is not known, and for rotary embedding that transformers does
    not say.
    """

    def __init__(self, path: Path, dtype: torch.dtype | None) -> None:
        report = Report()
        self.file, _ = open_gguf(path, report)
        if report.failures:
            raise LlmqError(f"{path}: {report.failures[0]}")
        super().__init__(self.file.skeleton.source)
        self.path, self.first = path, GgufFile(path)
        self.kinds = {n: self.file.tensors[n].tensor_type.name for n in self.file.names()}
        self.packed = {n for n, kind in self.kinds.items() if kind not in _FLOATS}
        self._dtype = dtype or self._own_dtype()
        self.config = self._config(str(self._dtype).removeprefix("torch."))

    @property
    def dtype(self) -> torch.dtype:
        """See `Source.dtype`: that of the config, for vectors are float32 in every file."""
        return self._dtype

    def written(self, name: str) -> str:
        """See `Source.written`: where checkpoints of a model_type have other names than transformers' model."""
        for pattern, theirs in _WRITTEN.get(self.config["model_type"], ()):
            name = pattern.sub(theirs, name)
        return name

    def names(self) -> list[str]:
        """Return the names of all tensors of the model."""
        return self.file.names()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, from the headers."""
        return {n: tuple(map(int, reversed(self.file.tensors[n].shape))) for n in self.file.names()}

    def bytes(self) -> int:
        """Return the bytes that all tensors have at most."""
        return sum(4 * prod(self.file.tensors[n].shape) for n in self.file.names())

    def get(self, name: str) -> Tensor:
        """Return a tensor. Raises LlmqError where it is missing, misshapen or not finite."""
        report = Report()
        tensor = self.file.read(name, report)
        if tensor is None or report.failures:
            raise LlmqError(f"{self.path}: {report.failures[0]}")
        return tensor.to(self._dtype) if name in self.packed else tensor

    def _own_dtype(self) -> torch.dtype:
        ends = [self.kinds[n] for n in ("model.embed_tokens.weight", "lm_head.weight") if n in self.kinds]
        halves = [kind for kind in self.kinds.values() if kind in ("F16", "BF16")]
        return next((_FLOATS[kind] for kind in (*ends, *halves) if kind in _FLOATS), torch.float16)

    def _config(self, dtype: str) -> dict[str, Any]:
        """Return config.json: what verify makes of the keys, with the class, the special ids and the rotations."""
        model = self.file.skeleton.model
        said = {"architectures": [type(model).__name__], **dict(self.file.skeleton.source.config)}
        config = said | {"dtype": dtype} | special_ids(self.first)
        for rope in _ropes(self.file, self.first):
            self.config = _short(config | {"rope_parameters": rope})
            try:
                made = blank_model(self, model_config(self), buffers=True)
            except LlmqError:  # a kind that this model_type does not have
                continue
            if _turns_alike(made, model):
                return self.config
        raise LlmqError(
            f"{self.path}: no rope_parameters of transformers turn as its keys say ({_said(self.first)}); convert it "
            "with the tools of the model that it was made from"
        )


class Floats(GgufSource):
    """All of it as floats, which is said and recorded."""

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        self._wholes: dict[str, tuple[Fused, list[str]]] = {}
        super().__init__(path, dtype)
        weights = dict(Counter(self.kinds[n] for n in sorted(self.packed)))
        as_ = str(dtype).removeprefix("torch.")
        self.decoded = {"quant_method": "gguf", "dtype": as_, "weights": weights, "scales_left_out": 0}
        held = ", ".join(f"{n} weights as {kind}" for kind, n in weights.items()) or "floats alone"
        self.warnings.append(f"{path} holds {held}: they are decoded to {as_} as they are read")
        self._wholes = together(self, [self.written(n) for n in super().names()])

    def names(self) -> list[str]:
        """See `GgufSource.names`; experts that transformers has in one tensor are one."""
        gone = {part for _, parts in self._wholes.values() for part in parts}
        return [*(n for n in super().names() if n not in gone), *self._wholes]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `GgufSource.shapes`."""
        stored, wholes = super().shapes(), {n: fused.shape for n, (fused, _) in self._wholes.items()}
        return {n: wholes.get(n) or stored[n] for n in self.names()}

    def get(self, name: str) -> Tensor:
        """See `GgufSource.get`."""
        if name not in self._wholes:
            return super().get(name)
        fused, parts = self._wholes[name]
        own, n = [super(Floats, self).get(part) for part in parts], len(fused.projections)
        experts = [own[i : i + n] for i in range(0, len(own), n)]
        return torch.stack([fused.joined(expert, transposed=fused.transposed) for expert in experts])

    def beside(self, stage: Path) -> None:
        """Write the tokenizer's files; where none can be made, warn of it."""
        try:
            tokenizer_from(self.first).save_pretrained(stage)
        except LlmqError as e:
            self.warnings.append(f"OUT has no tokenizer: {e}")


def _short(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with the shortest spelling of its numbers: a file's are float32, 1e-05 being 9.99999975e-06."""
    plain: dict[str, Any] = {}
    for key, value in config.items():
        short = float(str(np.float32(value))) if isinstance(value, float) else value
        plain[key] = _short(value) if isinstance(value, dict) else short
    return plain


def _said(file: GgufFile) -> str:
    arch, names = file.value("general.architecture"), file.keys()
    return ", ".join(f"{name}={file.value(name)}" for name in names if name.startswith(f"{arch}.rope."))


def _ropes(found: Gguf, file: GgufFile) -> Iterator[dict[str, Any]]:
    """Yield what `rope_parameters` may be, the plainest first; by the kind of block where those have their own."""
    keys, given = Keys(file), dict(found.skeleton.config.rope_parameters)
    nested = {"full_attention", "sliding_attention"} <= given.keys()
    base = {"rope_theta": keys.real("rope.freq_base", 10000.0)}
    local = {"rope_type": "default", "rope_theta": keys.real("rope.freq_base_swa", 10000.0)}
    part = given.get("partial_rotary_factor")
    base |= {} if part is None else {"partial_rotary_factor": part}
    for scaling in _scalings(keys):
        rope = base | scaling
        yield {"full_attention": rope, "sliding_attention": local} if nested else rope


def _scalings(keys: Keys) -> Iterator[dict[str, Any]]:
    yield {"rope_type": "default"}
    factor = keys.real("rope.scaling.factor", 0.0, zero=True)
    original = keys.number("rope.scaling.original_context_length", 0, zero=True)
    context = {"original_max_position_embeddings": original} if original else {}
    if factor > 0:
        yield {"rope_type": "linear", "factor": factor}
        yield {"rope_type": "yarn", "factor": factor} | context
        yield {"rope_type": "yarn", "factor": factor, "attention_factor": 1.0} | context
    for scale, low, high, old in itertools.product(*_LLAMA3):
        llama3 = {"factor": scale, "low_freq_factor": low, "high_freq_factor": high}
        yield {"rope_type": "llama3", "original_max_position_embeddings": old} | llama3


def _turns_alike(made: nn.Module, wanted: nn.Module) -> bool:
    """Return whether the rotary embeddings of two models have equal frequencies and magnitudes."""
    pairs = zip(made.modules(), wanted.modules(), strict=True)
    for a, b in pairs:
        for name in ("inv_freq", "full_attention_inv_freq", "sliding_attention_inv_freq"):
            x, y = getattr(a, name, None), getattr(b, name, None)
            if not isinstance(x, Tensor) or not isinstance(y, Tensor):
                continue
            scaling = name.replace("inv_freq", "attention_scaling")
            if x.shape != y.shape or not torch.allclose(x.double(), y.double(), rtol=_CLOSE, atol=0):
                return False
            if abs(float(getattr(a, scaling, 1.0)) - float(getattr(b, scaling, 1.0))) > _CLOSE:
                return False
    return True
