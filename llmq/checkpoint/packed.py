"""A quantized checkpoint (GPTQ, AWQ, compressed-tensors, auto-round's; ours or a peer's) as named QTensors.

    source = Source(folder)
    packed = PackedCheckpoint.open(source, blank_model(source, model_config(source)))
    packed.linears["model.layers.0.mlp.up_proj"]     LinearSpec(N=96, K=64, 4 bits ...), known from config and headers
    packed.qtensor("model.layers.0.mlp.up_proj")     its codes and parameters, read and unpacked now
    for name, weight in packed: ...                  a QTensor or a float tensor at a time, blocks in their order

A file may lie, and transformers would only warn of a missing tensor and initialise the layer at random. So before any
weight is read, the headers are compared with what the config promises of the model's linears.
Not here: where a config lies and its dialects (dialects.py), what a packed tensor means (formats/).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmq import registry
from llmq.checkpoint.dialects import known
from llmq.checkpoint.names import own_head, settle
from llmq.checkpoint.source import Source
from llmq.checkpoint.stored import checked
from llmq.errors import LlmqError
from llmq.format import Format
from llmq.guard.reading import Entry
from llmq.types import LinearSpec, QTensor, Scheme

CACHE = (".k_scale", ".v_scale", ".k_zero_point", ".v_zero_point")
"""How the names of a quantized key-value cache's scales end."""
_TABLE = re.compile("emb|wte")  # what transformers' models call an embedding


class PackedWeights(Protocol):
    """What is read of a quantized model, whatever file it lies in; `PackedCheckpoint` is that of a folder.

    linears: the packed ones by name, embeddings among them, in the order of the model. ordered: whether they come in
    activation order. derived: local names of tensors that follow from the rest (`Format.derived`).
    """

    linears: dict[str, LinearSpec]

    @property
    def ordered(self) -> bool:
        """See above."""

    @property
    def derived(self) -> frozenset[str]:
        """See above."""

    def stored(self, name: str) -> dict[str, Tensor]:
        """Return what is read of a linear, and its bias, by local names, on the meta device."""

    def parts(self, name: str) -> list[str]:
        """Return the names under which the packed tensors of a linear are stored, without its bias."""

    def qtensor(self, name: str) -> QTensor:
        """Read a linear. Raises LlmqError that names the tensor which holds what no weight can have."""

    def names(self) -> list[str]:
        """Return the names of all that `__iter__` yields, in its order."""

    def __iter__(self) -> Iterator[tuple[str, QTensor | Tensor]]:
        """Yield every weight, bias and other tensor by the name that it has in a float checkpoint, block by block."""


class Packing:
    """What a `quantization_config` says: the format of the packed tensors and the scheme of each linear by its name.

    Raises LlmqError for a method, and for what of a method's config, llmq does not read.
    """

    format: Format
    _scheme: Callable[[str], Scheme | None]

    def __init__(self, config: Mapping[str, Any]) -> None:
        config = known(config)
        found: Any = registry.find("formats", config["quant_method"])
        self.format, self._scheme = found.read(config)

    def scheme(self, name: str) -> Scheme | None:
        """Return what the config makes of a module of which no model tells the class, None where it is float."""
        table = _TABLE.search(name.rpartition(".")[2]) is not None
        return self.format.embedding(name) if table else self._scheme(name)

    def linear(
        self, name: str, N: int, K: int, stored: Collection[str], said: str = "", *, embedding: bool = False
    ) -> LinearSpec | None:
        """Return what the linear, or the embedding, `name` is in the file, None where it is float.

        stored: the names of the checkpoint's tensors. said: another name that the config may have for it.
        A config need not list what was left float (those of GPTQ and AWQ do not): where the file has a float weight and
        nothing packed, that decides.
        """
        of = self.format.embedding if embedding else self._scheme
        scheme = of(name) or (of(said) if said else None)
        if scheme is None:
            return None
        linear = LinearSpec(name, N, K, scheme, embedding)
        beside = [n for n in self.present(linear, stored) if n != f"{name}.weight"]
        return linear if beside or f"{name}.weight" not in stored else None

    def present(self, linear: LinearSpec, stored: Collection[str]) -> list[str]:
        """Return which of a linear's packed tensors are stored, by their full names."""
        return [n for local in self.format.layout(linear) if (n := f"{linear.name}.{local}") in stored]


class PackedCheckpoint:
    """The linears and float tensors of a quantized checkpoint, of which one linear is in memory at a time.

    entries: the checkpoint's tensors. model: the blank one (on the meta device) that has their names, but for a
    `prefix` that they have beside it where it is a bare decoder.
    linears: the packed ones by name, embeddings among them, in the order of the model.
    Raises LlmqError for the first tensor that is missing, that is packed and read by nothing, or that is not of the
    shape and kind of dtype that the config promises, and where no linear is packed. Floats may have any width: scales
    keep the one they were stored in.
    """

    def __init__(self, packing: Packing, entries: Mapping[str, Entry], model: Any, prefix: str = "") -> None:
        self.packing, self._entries = packing, entries
        self._modules: dict[str, list[str]] = {}
        for name in sorted(entries, key=natural):
            self._modules.setdefault(name.rpartition(".")[0], []).append(name)
        modules = {prefix + n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Embedding)}
        tied = {prefix + n.removesuffix(".weight") for n in getattr(model, "all_tied_weights_keys", {})}
        found = [self._linear(n, m, n in tied) for n, m in modules.items()]
        self.linears = {linear.name: linear for linear in found if linear}
        if not self.linears:
            raise LlmqError(
                f"quantization_config selects no linear of {type(model).__name__}: it is for another model, "
                "or names modules that this one does not have"
            )
        biased = {n for n, m in modules.items() if getattr(m, "bias", None) is not None}
        self._stored = {n: self._checked(s, n in biased) for n, s in self.linears.items()}
        self._refuse_leftovers()

    @classmethod
    def open(cls, source: Source, model: Any) -> PackedCheckpoint:
        """Open a source, giving it the names of the blank model of its config, which is untied if the head is its own.

        Raises LlmqError for a float checkpoint, for what llmq does not read, and as `names.settle`.
        """
        if source.quantization is None:
            raise LlmqError(f"{source.path} is a float checkpoint; llmq quantize makes a packed one of it")
        packing = Packing(source.quantization)
        settle(source, model)
        if own_head(source, model):
            model.config.tie_word_embeddings = False
        return cls(packing, {n: e for n, e in source.entries().items() if n not in source.unread}, model)

    @property
    def ordered(self) -> bool:
        """See `PackedWeights`."""
        return bool(getattr(self.packing.format, "desc_act", False))

    @property
    def derived(self) -> frozenset[str]:
        """See `PackedWeights`."""
        return self.packing.format.derived

    def stored(self, name: str) -> dict[str, Tensor]:
        """Return what the format reads of a linear, and its bias, by local names, on the meta device."""
        return {local: entry.meta() for local, entry in self._stored[name].items()}

    def parts(self, name: str) -> list[str]:
        """Return the names under which the packed tensors of a linear are stored, without its bias."""
        return [entry.name for local, entry in self._stored[name].items() if local != "bias"]

    def qtensor(self, name: str) -> QTensor:
        """Read a linear. Raises LlmqError that names the tensor which holds what no weight can have."""
        tensors = {local: entry.read() for local, entry in self._stored[name].items()}
        return self.packing.format.unpack(tensors, self.linears[name])

    def names(self) -> list[str]:
        """Return the names of all that `__iter__` yields, in its order."""
        return [name for module, names in self._modules.items() for name in self._of_module(module, names)]

    def __iter__(self) -> Iterator[tuple[str, QTensor | Tensor]]:
        """Yield every weight, bias and other tensor by the name that it has in a float checkpoint, block by block."""
        for module, names in self._modules.items():
            for name in self._of_module(module, names):
                packed = module in self.linears and name == f"{module}.weight"
                yield name, self.qtensor(module) if packed else self._entries[name].read()

    def _of_module(self, module: str, names: list[str]) -> list[str]:
        """Return what a float checkpoint has of a module."""
        if module not in self.linears:
            return names
        return [f"{module}.weight", *(name for name in names if name == f"{module}.bias")]

    def _linear(self, name: str, module: nn.Linear | nn.Embedding, tied: bool) -> LinearSpec | None:
        """Return what a linear of the model is in the file, None where it is float. Raises LlmqError for a tied one."""
        stored = self._entries[self._modules[name][0]].name.rpartition(".")[0] if name in self._modules else name
        table = isinstance(module, nn.Embedding)
        N, K = module.weight.shape
        linear = self.packing.linear(name, N, K, self._entries, stored, embedding=table)
        if linear is None or not tied:
            return linear
        if present := self.packing.present(linear, self._entries):
            raise LlmqError(
                f"{present[0]} is packed, but config.json ties {name} to the embedding: "
                "set tie_word_embeddings to false, or remove the packed tensors"
            )
        return None

    def _checked(self, linear: LinearSpec, bias: bool) -> dict[str, Entry]:
        """Return what the format reads of a linear, by local names, and its bias, which the file may have besides."""
        there = {n.rpartition(".")[2]: self._entries[n] for n in self._modules.get(linear.name, [])}
        wanted = dict(self.packing.format.layout(linear))
        if bias or "bias" in there:
            wanted["bias"] = torch.empty(linear.N, device="meta")
        metas = {local: entry.meta() for local, entry in there.items()}
        return {local: there[local] for local in checked(metas, wanted, linear, self.packing.format.derived)}

    def _refuse_leftovers(self) -> None:
        """Raise LlmqError for a packed tensor that nothing would read: the model would differ from the checkpoint."""
        form = self.packing.format
        known_to = {n: {*form.layout(linear), "bias"} for n, linear in self.linears.items()}
        packed = set().union(*known_to.values()) - {"weight", "bias"}
        for name in (n for names in self._modules.values() for n in names):
            module, _, local = name.rpartition(".")
            if module in known_to and local not in known_to[module]:
                raise LlmqError(
                    f"{name} is a tensor that llmq's {form.quant_method} reader does not know: it cannot load it"
                )
            if module not in known_to and local in packed:
                raise LlmqError(
                    f"{name} is packed, but quantization_config leaves {module} float or the model has no such "
                    "nn.Linear (fused experts are not supported): correct quantization_config, or quantize again"
                )


def natural(name: str) -> list[tuple[int, str]]:
    """Order names so that block 2 comes before block 10."""
    return [(len(part) if part.isdecimal() else 0, part) for part in name.split(".")]
