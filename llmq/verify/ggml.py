"""A GGUF file as the tensors of a transformers model: decoded by gguf-py, in the order of rows that transformers has.

The config is made from the file's own keys, so that a forward computes what the file says, and not what it was made
from. Of llmq's code that writes GGUF nothing is used, but for llama.cpp's formula of rotary embedding (gguf/rope.py).
Not here: safetensors folders (folder.py), the checksum of the whole file (gguf/seal.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from llmq.checkpoint import Source
from llmq.checkpoint.hub import Origin
from llmq.errors import LlmqError
from llmq.gguf import seal
from llmq.gguf.kinds import Kind
from llmq.gguf.reader import GgufFile, Stored
from llmq.gguf.rope import Rotary
from llmq.guard.reading import Entry
from llmq.model.config import head_dim
from llmq.model.skeleton import Skeleton
from llmq.verify import record
from llmq.verify.decode import Array
from llmq.verify.forward import Decoded
from llmq.verify.keys import Keys, reading
from llmq.verify.linears import FLOATS, check_float
from llmq.verify.report import Report

REPORT = "llmq.report"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
_WRAPPED = re.compile(r"^model\.\w+\.(layers|embed_tokens|norm)\b")  # of a language model within a larger one
_ROWS = 2**22  # weights decoded at a time
_DIVISORS, _SHORT = "rope_freqs.weight", "rope_factors_short.weight"
_BESIDE = (".scale", ".input_scale")  # of a weight: what its product, or its inputs, are multiplied by
_ROTARY = (_DIVISORS, _SHORT, "rope_factors_long.weight")


def open_gguf(path: Path, report: Report) -> tuple[Gguf, dict[str, Any]]:
    """Open the shards of a GGUF file, checked against each other and against what was recorded; return that too."""
    first = GgufFile(path)
    files = shards(first)
    damaged = broken(first, files)
    for file in damaged or ():
        report.fail(f"{file.name} is not as written: its checksum differs")
    report.count("files", len(files))
    recorded = _record(first, damaged is not None, report)
    found = Gguf([first, *(GgufFile(f) for f in files[1:])], recorded.get("linears", {}), report)
    if "tensors" in recorded:
        found.check_tensors(recorded["tensors"], report)
    return found, recorded


def shards(first: GgufFile) -> list[Path]:
    """Return all files of a GGUF model by its first. Raises LlmqError for another one, and where one is missing."""
    path, count = first.path, Keys(first, "split").number("count", 1, zero=True)
    if count < 2:
        return [path]
    named = _SHARD.fullmatch(path.name)
    if named is None or int(named[2]) != 1 or int(named[3]) != count:
        raise LlmqError(
            f"{path} is one of {count} shards; give the first, whose name ends in 00001-of-{count:05d}.gguf"
        )
    files = [path.with_name(f"{named[1]}-{i + 1:05d}-of-{count:05d}.gguf") for i in range(count)]
    for file in files:
        if not file.is_file():
            raise LlmqError(f"shard {file} is missing")
    return files


def broken(first: GgufFile, files: list[Path]) -> list[Path] | None:
    """Return the shards that are not as llmq sealed them, None where another tool made the files, be it from llmq's."""
    return None if first.remade else seal.broken(files)


def _record(first: GgufFile, sealed: bool, report: Report) -> dict[str, Any]:
    found = first.report()
    if first.remade:
        report.note(f"{first.path.name} was made from a file of llmq's by another tool: it is held against no record")
        return {}
    if not found:
        report.note(f"{first.path.name} has no {REPORT}: nothing was recorded when it was written")
        return {}
    if not sealed and first.value(seal.KEY) is not None:
        report.note(f"{first.path.name} was split or joined by another tool: its tensors are held against the record")
    elif not sealed and "sha256" in found:
        report.fail(f"{first.path.name} has lost its checksum ({seal.KEY})")
    return record.checked(found, REPORT, report)


class _Keyed(Source):
    """What the skeleton of a model wants to know of a checkpoint: its config, and the shapes of its tensors."""

    def __init__(self, path: Path, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path, self.config, self.origin = path, config, Origin(path.name)
        self.adapter, self.warnings, self.unread, self._written = None, [], frozenset(), {}
        self._entries = {n: Entry(path, n, "F32", shape, 0, 0) for n, shape in shapes.items()}


class Gguf:
    """The tensors of a GGUF model under their names in transformers.

    Raises LlmqError for an architecture whose keys are not known here.
    """

    def __init__(self, files: list[GgufFile], recorded: Mapping[str, Any], report: Report) -> None:
        path = files[0].path
        self.recorded = {_WRAPPED.sub(r"model.\1", name): line for name, line in recorded.items()}
        self._key = Keys(files[0])
        self._reading = reading(self._key)
        self._stored: dict[str, Any] = {}
        for file in files:
            for ggml, tensor in file.tensors.items():
                report.expect(ggml not in self._stored, f"tensor {ggml} is in two shards")
                self._stored[ggml] = tensor
        self._factors = self._factors_of(report)
        named = [t for n, t in self._stored.items() if n not in _ROTARY and not self._is_factor(n)]
        self.tensors = dict(pair for t in named for pair in self._reading.tensors(t))
        shapes = {n: self._reading.shape(n, t) for n, t in self.tensors.items()}
        self.skeleton = Skeleton(_Keyed(path, self._config(), shapes), torch.float32)
        self._set_rotary()
        model = self.skeleton.model
        self._shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
        if self.skeleton.config.tie_word_embeddings:
            del self._shapes["lm_head.weight"]
        self.skeleton.source = Decoded(self.skeleton.source, self.names(), self.read)
        kinds = {n: t.tensor_type.name for n, t in self.tensors.items()}
        self.packed = {n.removesuffix(".weight") for n, kind in kinds.items() if kind not in FLOATS}
        self.shifted = {n for n in self.tensors if self._reading.rounds(n)}
        for name in sorted(self.tensors.keys() - self._shapes.keys()):
            report.fail(f"nothing reads tensor {self.tensors[name].name}")

    def names(self) -> list[str]:
        """Return the tensors that the model wants."""
        return list(self._shapes)

    def read(self, name: str, report: Report) -> Tensor | None:
        """Return a tensor of the model, decoded and checked; None where that cannot be."""
        stored = self.tensors.get(name)
        if not report.expect(stored is not None, f"the tensor of {name} is missing") or stored is None:
            return None
        ggml = stored.name
        shape, wanted = self._reading.shape(name, stored), self._shapes[name]
        if not report.expect(shape == wanted, f"tensor {ggml} is {list(shape)}, the keys make it {list(wanted)}"):
            return None
        decoded = _decode(stored)
        if name in self._factors:
            decoded *= self._factors[name]
        values = self.in_order(name, decoded)
        tensor, kind = torch.from_numpy(values), stored.tensor_type.name
        if not check_float(ggml, tensor, report, "float tensors" if kind in FLOATS else "packed linears"):
            return None
        record.check_decoded(name.removesuffix(".weight"), values, self.recorded, report)
        return tensor.to(FLOATS.get(kind, torch.float32))

    def in_order(self, name: str, values: Array) -> Array:
        """Return rows of a tensor, whatever lies in them, in the order that transformers has."""
        return self._reading.in_order(name, values, self._key)

    def factor(self, name: str) -> float | None:
        """Return what lies beside a weight, by which its values are multiplied."""
        return None if name not in self._factors else float(self._factors[name])

    def _is_factor(self, ggml: str) -> bool:
        return ggml.endswith(_BESIDE) and not self._reading.is_own(ggml)

    def _factors_of(self, report: Report) -> dict[str, np.float32]:
        """Return the factors that lie beside weights, `NAME.scale`, by transformers' names of these."""
        found: dict[str, np.float32] = {}
        for ggml, stored in self._stored.items():
            if not self._is_factor(ggml):
                continue
            of = self._stored.get(f"{ggml.rpartition('.')[0]}.weight")
            names = [] if of is None else [name for name, _ in self._reading.tensors(of)]
            sane = stored.tensor_type.name == "F32" and stored.data.shape == (len(names),) and (stored.data > 0).all()
            if report.expect(sane, f"{ggml} is not a number above 0 for each matrix of a weight") and ".scale" in ggml:
                found |= zip(names, np.array(stored.data), strict=True)
        return found

    def check_tensors(self, recorded: Mapping[str, Any], report: Report) -> None:
        """Compare every stored tensor with its recorded checksum."""
        for name in sorted(recorded.keys() | self._stored.keys()):
            report.count("tensors")
            if not report.expect(name in self._stored, f"tensor {name} is missing"):
                continue
            found = record.of_array(self._stored[name].data)
            report.expect(recorded.get(name) == found, f"tensor {name} is not as it was solved: its checksum differs")

    def _config(self) -> dict[str, Any]:
        """Return the config of a transformers model that says what the keys say."""
        embedding = self.tensors.get("model.embed_tokens.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise LlmqError(f"{self._key.file.path} has no token_embd.weight that is a matrix")
        width = self._key.number("embedding_length", most=embedding.shape[0])
        heads = self._key.number("attention.head_count", most=width)
        return {
            "model_type": self._reading.model_type,
            "vocab_size": embedding.shape[1],
            "hidden_size": width,
            "intermediate_size": self._key.each("feed_forward_length", 0, zero=True)[0],
            "num_hidden_layers": self._key.blocks(),
            "num_attention_heads": heads,
            "num_key_value_heads": self._key.each("attention.head_count_kv", heads)[0],
            "head_dim": self._key.channels("attention.key_length", width // heads),
            "max_position_embeddings": self._key.number("context_length"),
            "rms_norm_eps": self._key.real("attention.layer_norm_rms_epsilon"),
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},  # but see _set_rotary
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.tensors,
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in self.tensors,
            "pad_token_id": None,
            "tie_word_embeddings": "lm_head.weight" not in self.tensors,
            "use_sliding_window": False,
        } | self._reading.config(self._key)

    def _set_rotary(self) -> None:
        """Put llama.cpp's rotary embedding, as the keys say it, in the place of transformers'."""
        table = self._stored.get(_DIVISORS, self._stored.get(_SHORT))  # the forward is short
        key = self._key
        full = Rotary(
            key.real("rope.freq_base", 10000.0),
            key.channels("rope.dimension_count", head_dim(self.skeleton.config)),
            key.text("rope.scaling.type", "none"),
            key.scaling(),
            key.number("rope.scaling.original_context_length", 0, zero=True) or key.number("context_length"),
            key.real("rope.scaling.attn_factor", 1.0),
            None if table is None else torch.from_numpy(np.array(table.data, np.float32)),
            log_multiplier=key.real("rope.scaling.yarn_log_multiplier", None, zero=True),
        )
        local = Rotary(key.real("rope.freq_base_swa", 10000.0), key.channels("rope.dimension_count_swa", full.d))
        for module in self.skeleton.model.modules():
            for kind, found in (("", full), ("full_attention_", full), ("sliding_attention_", local)):
                own = getattr(module, f"{kind}inv_freq", None)
                if isinstance(own, Tensor):
                    self._require_fit(found, len(own))
                    setattr(module, f"{kind}inv_freq", found.frequencies().float())
                    setattr(module, f"{kind}attention_scaling", found.magnitude())

    def _require_fit(self, found: Rotary, pairs: int) -> None:
        """Raise LlmqError for a rotary embedding of another number of channels than a head turns."""
        shape = (found.d // 2,) if found.divisors is None else tuple(found.divisors.shape)
        if (found.d // 2, *shape) != (pairs, pairs):
            raise LlmqError(
                f"{self._key.file.path}: rope.dimension_count is {found.d}, with divisors {list(shape)}; "
                f"a head turns {2 * pairs} channels; download or write the file again"
            )


def _decode(stored: Stored) -> Array:
    """Return a tensor's values, float32, some rows at a time."""
    shape = tuple(reversed(stored.shape))
    if len(shape) < 2:
        return np.array(_values(stored.data, stored.tensor_type), np.float32).reshape(shape)
    out = np.empty(shape, np.float32)
    step = max(1, _ROWS // shape[1])
    with np.errstate(all="ignore"):
        for i in range(0, shape[0], step):
            out[i : i + step] = _values(stored.data[i : i + step], stored.tensor_type)
    return out


def _values(rows: Array, kind: Kind) -> Array:
    """Return the values of stored rows, float32; of Q2_0, which gguf-py does not know, by ggml's own few lines."""
    if kind.name != "Q2_0":
        return np.asarray(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(kind.number)))
    blocks = rows.reshape(-1, kind.size)
    d = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    codes = (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    return ((codes.reshape(-1, kind.columns).astype(np.float32) - 1) * d).reshape(*rows.shape[:-1], -1)
