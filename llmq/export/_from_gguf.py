"""A GGUF file as the tensors, the config and the tokenizer of a transformers checkpoint.

Names, the order of q and k rows, gains and the config are what verify reads in a file (verify/ggml.py): the same code
that repeats a forward from it. Rotary embedding is said by the first form of `rope_parameters` that turns by the file's
own numbers, the table of Llama 3 included.
Not here: writing the checkpoint (float.py), the tokenizer (gguf/hf_tokenizer.py).
"""

import itertools
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmq.checkpoint.source import View
from llmq.errors import LlmqError
from llmq.gguf.hf_tokenizer import special_ids, tokenizer_from
from llmq.gguf.reader import GgufFile
from llmq.model.pretrained import blank_model, model_config
from llmq.verify.ggml import Gguf, open_gguf
from llmq.verify.keys import Keys
from llmq.verify.report import Report

_FLOATS = ("F32", "F16", "BF16", "F64")
_CLOSE = 1e-5  # of frequencies, which llama.cpp computes in float32
_LLAMA3 = ((8.0, 32.0), (1.0,), (4.0,), (8192,))  # factors, low and high frequency factors, contexts of its releases


class Floats(View):
    """The tensors of a GGUF file by transformers' names: what was packed in `dtype`, floats as they are.

    Raises LlmqError for an architecture or a tensor that is not known, and for rotary embedding that transformers does
    not say.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        report = Report()
        self._file, _ = open_gguf(path, report)
        if report.failures:
            raise LlmqError(f"{path}: {report.failures[0]}")
        super().__init__(self._file.skeleton.source)
        self.path, self._first, self._dtype = path, GgufFile(path), dtype
        kinds = {n: self._file.tensors[n].tensor_type.name for n in self._file.names()}
        self._packed = {n for n, kind in kinds.items() if kind not in _FLOATS}
        weights = dict(Counter(kinds[n] for n in sorted(self._packed)))
        as_ = str(dtype).removeprefix("torch.")
        self.decoded = {"quant_method": "gguf", "dtype": as_, "weights": weights, "scales_left_out": 0}
        held = ", ".join(f"{n} weights as {kind}" for kind, n in weights.items()) or "floats alone"
        self.warnings.append(f"{path} holds {held}: they are decoded to {as_} as they are read")
        self.config = self._config(as_)

    def names(self) -> list[str]:
        """Return the names of all tensors of the model."""
        return self._file.names()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, from the headers."""
        return {n: tuple(map(int, reversed(self._file.tensors[n].shape))) for n in self.names()}

    def bytes(self) -> int:
        """Return the bytes that all tensors have at most."""
        return sum(4 * prod(self._file.tensors[n].shape) for n in self.names())

    def get(self, name: str) -> Tensor:
        """Return a tensor. Raises LlmqError where it is missing, misshapen or not finite."""
        report = Report()
        tensor = self._file.read(name, report)
        if tensor is None or report.failures:
            raise LlmqError(f"{self.path}: {report.failures[0]}")
        return tensor.to(self._dtype) if name in self._packed else tensor

    def beside(self, stage: Path) -> None:
        """Write the tokenizer's files; where none can be made, warn of it."""
        try:
            tokenizer_from(self._first).save_pretrained(stage)
        except LlmqError as e:
            self.warnings.append(f"OUT has no tokenizer: {e}")

    def _config(self, dtype: str) -> dict[str, Any]:
        """Return config.json: what verify makes of the keys, with the class, the special ids and the rotations."""
        model = self._file.skeleton.model
        said = {"architectures": [type(model).__name__], **dict(self._file.skeleton.source.config)}
        config = said | {"dtype": dtype} | special_ids(self._first)
        for rope in _ropes(self._file, self._first):
            self.config = _short(config | {"rope_parameters": rope})
            try:
                made = blank_model(self, model_config(self), buffers=True)
            except LlmqError:  # a kind that this model_type does not have
                continue
            if _turns_alike(made, model):
                return self.config
        raise LlmqError(
            f"{self.path}: no rope_parameters of transformers turn as its keys say ({_said(self._first)}); convert it "
            "with the tools of the model that it was made from"
        )


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
    base = {"rope_theta": float(keys("rope.freq_base", 10000.0))}
    local = {"rope_type": "default", "rope_theta": float(keys("rope.freq_base_swa", 10000.0))}
    part = given.get("partial_rotary_factor")
    base |= {} if part is None else {"partial_rotary_factor": part}
    for scaling in _scalings(keys):
        rope = base | scaling
        yield {"full_attention": rope, "sliding_attention": local} if nested else rope


def _scalings(keys: Keys) -> Iterator[dict[str, Any]]:
    yield {"rope_type": "default"}
    factor = float(keys("rope.scaling.factor", 0.0))
    original = keys("rope.scaling.original_context_length", None)
    context = {} if original is None else {"original_max_position_embeddings": original}
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
