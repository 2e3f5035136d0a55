"""transformers: let `from_pretrained` read GPTQ, AWQ and compressed-tensors checkpoints with llmq's linears.

transformers finds the reader of a quantized checkpoint by its `quant_method` in two mappings, one for the config and
one for the quantizer. `register()` replaces their entries for the methods that llmq reads, none of whose packages is
then needed; `unregister()` puts back what was there. Nothing else in transformers is touched, and nothing until asked.

    from llmq.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(path)

Before any weight is read, the headers of the safetensors files are compared with what `quantization_config` promises:
transformers would only warn of a missing tensor and initialise the layer at random.
Not here: what a packed tensor means (formats/), the linear itself (runtime/linear.py), `llmq.load` (loading.py).
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmq.checkpoint.names import match
from llmq.checkpoint.packed import METHODS, Packing
from llmq.formats._reading import checked
from llmq.guard.reading import DTYPES, tensor_entries
from llmq.runtime.linear import QuantLinear
from llmq.types import Format, LinearSpec, LlmqError

_OTHER = torch.float8_e4m3fn  # stands for any dtype that no packed tensor has
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

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        """Replace the linears that the checkpoint holds packed. Raises LlmqError where its tensors disagree."""
        stored = _by_model(model, read_headers(checkpoint_files or ()))
        prefix = _prefix(model, stored)
        specs = {}
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                linear = self._spec(prefix + name, module, stored, f"{name}.weight" in model.all_tied_weights_keys)
                if linear is not None:
                    specs[name] = linear
        if not specs:
            raise LlmqError(
                f"quantization_config selects no linear of {type(model).__name__}: it is for another model, "
                "or names modules that this one does not have"
            )
        fmt, by_module = self._packing.format, _by_module(stored)
        for name, linear in specs.items():
            tensors = by_module.get(linear.name, {})
            bias = getattr(model.get_submodule(name), "bias", None) is not None or "bias" in tensors
            checked_ = check_linear(fmt, linear, bias, tensors)
            model.set_submodule(name, QuantLinear(fmt, linear, bias, stored=checked_))
        _check_leftovers(fmt, list(specs.values()), stored)
        if self._config.get("kv_cache_scheme"):
            _add_kv_scales(model, prefix, stored)

    def _spec(self, name: str, module: nn.Linear, stored: Mapping[str, Tensor], tied: bool) -> LinearSpec | None:
        """Return what the linear `name` of the checkpoint is to become, None where it is float."""
        linear = self._packing.linear(name, module.out_features, module.in_features, stored)
        if linear is None or not tied:
            return linear
        present = [f"{name}.{local}" for local in self._packing.format.layout(linear) if f"{name}.{local}" in stored]
        if present:
            raise LlmqError(
                f"{present[0]} is packed, but config.json ties {name} to the embedding: "
                "set tie_word_embeddings to false, or remove the packed tensors"
            )
        return None

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        """Check the values of every packed linear and hand it to its back-end.

        Where weights come and go between places (offloading) it stays as it is, checked when it is decoded.
        """
        places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
        if len(places) > 1 or "disk" in places:
            return
        for module in model.modules():
            if isinstance(module, QuantLinear):
                if self.prepack:
                    module.prepack()
                else:
                    module.unpack()

    def is_serializable(self) -> bool:
        """Return True: `save_pretrained` writes the packed tensors back."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Return False: packed weights have no gradient."""
        return False


class ReferenceQuantizer(PackedQuantizer):
    """Reads a packed checkpoint into a model that computes by decoding its weights: no back-end rounds anything."""

    prepack = False


def read_headers(files: Sequence[str]) -> dict[str, Tensor]:
    """Return every tensor of some safetensors files on the meta device: its name, shape and dtype, without data.

    Raises LlmqError for a file that is not safetensors or is damaged, and where there are no files.
    """
    if not files or not all(str(f).endswith(".safetensors") for f in files):
        raise LlmqError("llmq loads packed weights from .safetensors files only; save the model in that format first")
    headers = {}
    for file in files:
        for name, entry in tensor_entries(Path(file)).items():
            headers[name] = torch.empty(entry.shape, dtype=DTYPES.get(entry.dtype, _OTHER), device="meta")
    return headers


def check_linear(fmt: Format, linear: LinearSpec, bias: bool, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what of the tensors of one linear the format reads, and its bias, as they are stored.

    stored: all that the file has of the linear, by local name, on the meta device.
    Raises LlmqError that names the first tensor which is missing, or whose shape or kind of dtype is not what
    `quantization_config` promises. Floats may have any width: scales keep the one they were stored in.
    """
    wanted = fmt.layout(linear) | ({"bias": torch.empty(linear.N, device="meta")} if bias else {})
    return checked(stored, wanted, linear, fmt.derived)


def _by_module(stored: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for name, t in stored.items():
        parent, _, local = name.rpartition(".")
        modules.setdefault(parent, {})[local] = t
    return modules


def _check_leftovers(fmt: Format, linears: Sequence[LinearSpec], stored: Mapping[str, Tensor]) -> None:
    """Raise LlmqError for a packed tensor that nothing would read: the model would differ from the checkpoint."""
    locals_ = {linear.name: {*fmt.layout(linear), "bias"} for linear in linears}
    packed = set().union(*locals_.values()) - {"weight", "bias"}
    for name in stored:
        parent, _, local = name.rpartition(".")
        if parent in locals_ and local not in locals_[parent]:
            raise LlmqError(
                f"{name} is a tensor that llmq's {fmt.quant_method} reader does not know: it cannot load it"
            )
        if parent not in locals_ and local in packed:
            raise LlmqError(
                f"{name} is packed, but quantization_config leaves {parent} float or the model has no such nn.Linear "
                "(fused experts are not supported): correct quantization_config, or quantize again"
            )


def _add_kv_scales(model: PreTrainedModel, prefix: str, stored: Mapping[str, Tensor]) -> None:
    """Give attention modules buffers for the static key-value scales of the checkpoint, so that they survive a save."""
    modules = dict(model.named_modules())
    for name, t in stored.items():
        parent, _, local = name.removeprefix(prefix).rpartition(".")
        if parent in modules and _KV_SCALE.fullmatch(local):
            modules[parent].register_buffer(local, torch.empty_like(t, device="meta"))


def _by_model(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return headers by the names of a whole model, whose checkpoint may be that of its decoder or have older ones."""
    if not hasattr(model, model.base_model_prefix):
        return dict(stored)
    found = match(model, stored)
    names = {old: new for new, old in (found.stored | found.beside).items()}
    return {names.get(name, name): t for name, t in stored.items()}


def _prefix(model: PreTrainedModel, stored: Mapping[str, Tensor]) -> str:
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
