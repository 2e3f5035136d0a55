"""transformers: let `from_pretrained` read GPTQ, AWQ and compressed-tensors checkpoints with llmq's modules.

transformers finds the reader of a quantized checkpoint by its `quant_method` in two mappings, one for the config and
one for the quantizer. `register()` replaces their entries for the methods that llmq reads, none of whose packages is
then needed; `unregister()` puts back what was there. Nothing else in transformers is touched, and nothing until asked.

    from llmq.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(path)

Not here: the checks of the files before any weight is read (checkpoint/packed.py), what a packed tensor means
(formats/), the modules themselves (runtime/linear.py, embedding.py), `llmq.load` (loading.py).
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import Transpose, WeightConverter, WeightRenaming
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq.checkpoint.dialects import METHODS
from llmq.checkpoint.names import match
from llmq.checkpoint.packed import PackedCheckpoint, Packing
from llmq.errors import LlmqError
from llmq.guard.reading import Entry, tensor_entries
from llmq.model.experts import Experts, unfuse
from llmq.runtime.embedding import QuantEmbedding, TiedHead
from llmq.runtime.joining import join_sites
from llmq.runtime.linear import QuantLinear
from llmq.runtime.packed import PackedWeight

_KV_SCALE = re.compile(r"[kv]_(scale|zero_point)")


class PackedConfig(QuantizationConfigMixin):
    """A `quantization_config`, kept verbatim so that `save_pretrained` writes an equal one."""

    def __init__(self, **config: Any) -> None:
        self.quant_method = config.get("quant_method")  # type: ignore[assignment]  # a plain string will do
        self._verbatim = config

    def to_dict(self) -> dict[str, Any]:
        """Return a copy of what the checkpoint says."""
        return copy.deepcopy(self._verbatim)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


class PackedQuantizer(HfQuantizer):
    """Reads a packed checkpoint into a model whose quantized linears are `QuantLinear`, each with its back-end."""

    prepack = True

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        method = quantization_config.quant_method
        if not self.pre_quantized:
            raise LlmqError(
                f"llmq reads {method} checkpoints but does not quantize while loading: run `llmq quantize` first, "
                "or call llmq.integrations.transformers.unregister() to have transformers' own quantizer back"
            )
        self._config = quantization_config.to_dict()
        self._packing = Packing(self._config)
        self._names: dict[str, str] = {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        """Replace the linears that the checkpoint holds packed. Raises LlmqError where its tensors disagree.

        Fused experts are taken apart first; those that the checkpoint has in one tensor stay as transformers has them.
        """
        entries = _entries(checkpoint_files or ())
        apart = unfuse(model)
        whole = {place.whole.rpartition(".")[0] for place in match(model, entries).parts.values()} if apart else set()
        for name in whole:
            model.set_submodule(name, apart.pop(name))
        if apart:
            self._names = _names(model, entries)
        stored = _by_model(model, entries)
        prefix = _prefix(model, stored)
        place_linears(model, PackedCheckpoint(self._packing, stored, model, prefix), prefix)
        if self._config.get("kv_cache_scheme"):
            _add_kv_scales(model, prefix, stored)

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        """Leave experts as they are: transformers would replace Llama 4's by ones that run on every token."""

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Check the values of every packed linear and hand it to its back-end; join those that read one activation.

        Where weights come and go between places (offloading) it stays as it is, checked when it is decoded.
        """
        places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
        if len(places) > 1 or "disk" in places:
            return
        for module in model.modules():
            if self.prepack and isinstance(module, QuantLinear | TiedHead):
                module.prepack()
            elif isinstance(module, PackedWeight):
                module.unpack()
        join_sites(model)

    def update_weight_conversions(self, weight_conversions: list[Any], model: PreTrainedModel) -> list[Any]:
        """Return transformers' rules for names, or what llmq found of every name where experts were taken apart.

        Experts of other layers, in one tensor, may lie the other way round there.
        """
        turning = [c for c in weight_conversions if _turns(c)]
        return [_Known(self._names), *turning] if self._names else weight_conversions

    def is_serializable(self) -> bool:
        """Return True: `save_pretrained` writes the packed tensors back."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Return whether `generate` may compile the model: every back-end is one operator, the reference is not."""
        return self.prepack

    @property
    def is_trainable(self) -> bool:
        """Return False: packed weights have no gradient."""
        return False


def place_linears(model: nn.Module, packed: PackedCheckpoint, prefix: str = "") -> None:
    """Put an empty `QuantLinear` or `QuantEmbedding` in the place of each module that a checkpoint holds packed.

    prefix: what the checkpoint's names have before the model's.
    """
    form = packed.packing.format
    for name, linear in packed.linears.items():
        own, place = packed.stored(name), name.removeprefix(prefix)
        module: nn.Module
        if linear.embedding:
            module = QuantEmbedding(form, linear, cast(nn.Embedding, model.get_submodule(place)), stored=own)
            _tie(model, place, module)
        else:
            module = QuantLinear(form, linear, "bias" in own, stored=own)
        model.set_submodule(place, module)


def _tie(model: Any, name: str, embedding: QuantEmbedding) -> None:
    """Put a head that multiplies with a packed embedding in the place of each one that is tied to it."""
    for weight, source in list(getattr(model, "all_tied_weights_keys", {}).items()):
        if source == f"{name}.weight":
            model.set_submodule(weight.rpartition(".")[0], TiedHead(embedding))
            del model.all_tied_weights_keys[weight]


class ReferenceQuantizer(PackedQuantizer):
    """Reads a packed checkpoint into a model that computes by decoding its weights: no back-end rounds anything."""

    prepack = False


def _entries(files: Sequence[str]) -> dict[str, Entry]:
    """Return the tensors of some safetensors files. Raises LlmqError for other files, damaged ones, and none."""
    if not files or not all(str(f).endswith(".safetensors") for f in files):
        raise LlmqError("llmq loads packed weights from .safetensors files only; save the model in that format first")
    return {name: entry for file in files for name, entry in tensor_entries(Path(file)).items()}


def _add_kv_scales(model: PreTrainedModel, prefix: str, stored: Mapping[str, Entry]) -> None:
    """Give attention modules buffers for the static key-value scales of the checkpoint, so that they survive a save."""
    modules = dict(model.named_modules())
    for name, entry in stored.items():
        parent, _, local = name.removeprefix(prefix).rpartition(".")
        if parent in modules and _KV_SCALE.fullmatch(local):
            modules[parent].register_buffer(local, entry.meta())


def _by_model(model: PreTrainedModel, stored: Mapping[str, Entry]) -> dict[str, Entry]:
    """Return tensors by the names of a whole model, whose checkpoint may be that of its decoder or have older ones."""
    bare = not hasattr(model, model.base_model_prefix)
    if bare and not any(isinstance(m, Experts) for m in model.modules()):
        return dict(stored)
    names, prefix = _names(model, stored), f"{model.base_model_prefix}." if bare else ""
    return {f"{prefix}{names[n]}" if n in names else n: entry for n, entry in stored.items()}


def _names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str]:
    """Return the model's names of stored tensors."""
    found = match(model, stored)
    return {old: new for new, old in (found.stored | found.beside).items()}


def _turns(rule: Any) -> bool:
    """Say whether a rule of transformers does nothing but transpose a tensor."""
    return isinstance(rule, WeightConverter) and all(isinstance(o, Transpose) for o in rule.operations)


class _Known(WeightRenaming):
    """The names that llmq found, in place of transformers' rules, which join the matrices of all experts."""

    __slots__ = ("names",)

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__("(?!)", "")
        self.names = dict(names)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Return the model's name of a stored tensor."""
        self._was_used = True
        return self.names.get(source_key, source_key), self.source_patterns[0]

    def reverse_transform(self) -> _Known:
        """Return what gives the stored names back."""
        return _Known({new: old for old, new in self.names.items()})


def _prefix(model: PreTrainedModel, stored: Mapping[str, Entry]) -> str:
    """Return what checkpoint names have in front of module names: "model." where a bare decoder is loaded."""
    prefix = f"{model.base_model_prefix}."
    bare = prefix != "." and not hasattr(model, model.base_model_prefix)
    return prefix if bare and any(name.startswith(prefix) for name in stored) else ""


_MAPPINGS: tuple[dict[str, Any], ...] = (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING)
_LOCK = threading.RLock()
_replaced: dict[tuple[int, str], type | None] = {}  # what `register` found, by mapping and method


def register(*, backend: str = "auto") -> None:
    """Make `from_pretrained` read the `METHODS` with llmq, until `unregister()`. Calling it again changes the back-end.

    backend: "auto" gives every linear the first back-end that can run it; "reference" decodes the weights instead.
    Raises LlmqError for another name.
    """
    if backend not in ("auto", "reference"):
        raise LlmqError(f"backend is 'auto' or 'reference', not {backend!r}")
    quantizer = PackedQuantizer if backend == "auto" else ReferenceQuantizer
    with _LOCK:
        for i, (mapping, ours) in enumerate(zip(_MAPPINGS, (PackedConfig, quantizer), strict=True)):
            for method in METHODS:
                found = mapping.get(method)
                if found not in (PackedConfig, PackedQuantizer, ReferenceQuantizer):
                    _replaced[i, method] = found
                mapping[method] = ours


def unregister() -> None:
    """Put back the entries that `register` replaced. Without a `register` before it, it does nothing."""
    with _LOCK:
        _restore(_replaced)
        _replaced.clear()


@contextmanager
def registered(*, backend: str = "auto") -> Iterator[None]:
    """Register for the body of a `with` statement and then restore the state before it, registered or not.

    Other threads that register wait for the end of the body.
    """
    with _LOCK:
        before = {(i, m): mapping.get(m) for i, mapping in enumerate(_MAPPINGS) for m in METHODS}
        replaced = dict(_replaced)
        register(backend=backend)
        try:
            yield
        finally:
            _restore(before)
            _replaced.clear()
            _replaced.update(replaced)


def _restore(entries: Mapping[tuple[int, str], type | None]) -> None:
    for (i, method), cls in entries.items():
        mapping = _MAPPINGS[i]
        if cls is None:
            mapping.pop(method, None)
        else:
            mapping[method] = cls
