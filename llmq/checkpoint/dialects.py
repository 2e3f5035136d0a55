"""How a checkpoint says that its linears are packed: in which place, in whose dialect, and what llmq reads of it.

    config.json              quantization, of mlx-lm, whose copy in quantization_config names no method
                             quantization_config, or compression_config (compressed-tensors before 0.6); of a wrapper
                             also in its text_config
    quantize_config.json     beside it (AutoGPTQ), where there are packed tensors and config.json says nothing
    quant_config.json        the same of AutoAWQ, which spells w_bit and q_group_size
    hf_quant_config.json     the same of modelopt, under `quantization`

auto-round's own format is GPTQ's or AWQ's packing under a `packing_format`; it is read as that.
A null config is none: the checkpoint is float. What llmq does not read is refused by its name, with the remedy.
Not here: what the fields of a method mean (formats/), the tensors (packed.py).
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from llmq.errors import LlmqError, printable
from llmq.guard.reading import field, json_object

METHODS = ("gptq", "awq", "compressed-tensors", "modelopt", "auto-round", "mlx")
"""The `quant_method`s that llmq reads. A closed list: a checkpoint must not name a module to import."""

_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # and the method of one that names none
_MODELOPT = "hf_quant_config.json"
_AUTO_AWQ = {"w_bit": "bits", "q_group_size": "group_size"}
_PACKINGS = {  # auto-round's name of a packing: the config that says the same; bare, the zeros are GPTQ's v2
    "auto_round:auto_gptq": {"quant_method": "gptq", "checkpoint_format": "gptq"},
    "auto_round:gptqmodel": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "auto_round": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "auto_round:auto_awq": {"quant_method": "awq", "version": "gemm"},
}
WHERE = "quantization_config"
"""The key of config.json."""
MLX = "quantization"
"""The key of config.json that mlx-lm reads."""
_KEYS = (WHERE, "compression_config")


def quantization(folder: Path, config: Mapping[str, Any], names: Collection[str]) -> dict[str, Any] | None:
    """Return what a checkpoint says of its quantization, None for a float one.

    config: its config.json. names: of its tensors.
    Raises LlmqError where it says something else than an object, or packed tensors are all that says it.
    """
    if _of_mlx(config, names):
        return {**config[MLX], "quant_method": "mlx"}
    text = config.get("text_config")
    for said in (config, text if isinstance(text, dict) else {}):  # of a wrapper, its text model may say it
        for key in _KEYS:
            if said.get(key) is not None:
                return dict(field(said, key, dict, f"{folder / 'config.json'}"))
    beside = folder / _MODELOPT
    if beside.is_file() and any(n.endswith((".weight_scale", ".weight_scale_2")) for n in names):
        return {"quant_method": "modelopt"} | field(json_object(beside), "quantization", dict, str(beside))
    packed = next((n for n in names if n.endswith((".qweight", ".weight_packed"))), None)
    if packed is None:
        return None
    for file, method in _BESIDE.items():
        if (folder / file).is_file():
            found = {_AUTO_AWQ.get(k, k): v for k, v in json_object(folder / file).items()}
            return {"quant_method": method} | found
    raise LlmqError(
        f"{folder}: {printable(packed, 200)} is packed, but config.json has no quantization_config and there is no "
        "quantize_config.json; download the checkpoint again"
    )


def _of_mlx(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Say whether a checkpoint is of mlx-lm: its key, whose copy names no method, and scales beside weights."""
    said, copy = config.get(MLX), config.get(WHERE)
    named = isinstance(copy, dict) and "quant_method" in copy
    return isinstance(said, dict) and {"group_size", "bits"} <= said.keys() and not named and _scaled(names)


def _scaled(names: Collection[str]) -> bool:
    return any(n.endswith(".scales") and f"{n.removesuffix('scales')}weight" in names for n in names)


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config.json that says nothing of packed weights."""
    keys = (*_KEYS, MLX) if isinstance(config.get(MLX), dict) else _KEYS
    kept = {key: value for key, value in config.items() if key not in keys}
    text = kept.get("text_config")
    return kept | {"text_config": without_quantization(text)} if isinstance(text, dict) else kept


def known(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of a format of llmq that says what a `quantization_config` says.

    Raises LlmqError for a method that llmq does not read.
    """
    method = config.get("quant_method")
    if method not in METHODS:
        raise LlmqError(_foreign(method))
    return from_auto_round(config) if method == "auto-round" else config


def _foreign(method: Any) -> str:
    """Return why a method is not read, with the remedy."""
    if method is None:
        return f"{WHERE}.quant_method is missing; llmq reads {', '.join(METHODS)}"
    return (
        f"{WHERE}.quant_method is {printable(repr(method), 80)}; llmq reads {', '.join(METHODS)}: run it with the "
        "runtime that it was made for, or quantize the float model again"
    )


def from_auto_round(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the GPTQ or AWQ config that says what an auto-round config says. Raises LlmqError where none does."""
    remedy = "write it again with auto-round's --format auto_gptq or auto_awq, or quantize the float model with llmq"
    scheme = {key: config.get(key) for key in ("bits", "group_size", "sym")}
    scheme["data_type"] = field(config, "data_type", str, WHERE, "int")
    packing = field(config, "packing_format", str, WHERE, "auto_round:auto_gptq")
    activations = config.get("act_bits") or 16
    if packing not in _PACKINGS or scheme["data_type"] != "int" or activations not in (16, 32):
        said = f"auto-round's packing {printable(packing, 60)!r} of {printable(repr(scheme['data_type']), 40)}"
        raise LlmqError(f"{WHERE}: {said}, activations {printable(repr(activations), 20)}, is not read; {remedy}")
    if config.get("rotation_config"):
        raise LlmqError(f"{WHERE}.rotation_config is set, which llmq does not read; {remedy}")
    changed = {} if config.get("extra_config") is None else field(config, "extra_config", dict, WHERE)
    for name in changed:
        changes = field(changed, name, dict, f"{WHERE}.extra_config")
        alike = all(changes.get(key) in (None, value) for key, value in scheme.items())
        if not alike and changes.get("bits") not in (16, 32):  # float: the file's own tensors say so
            said = f"extra_config[{printable(name, 80)!r}] gives some modules another scheme, which llmq does not read"
            raise LlmqError(f"{WHERE}.{said}; {remedy}")
    head = (changed.get("lm_head") or {"bits": 16}).get("bits") not in (16, 32)
    sym = field(config, "sym", bool, WHERE, True)
    zeros = {"zero_point": not sym} if "awq" in packing else {"sym": sym}
    return _PACKINGS[packing] | {k: scheme[k] for k in ("bits", "group_size")} | {"lm_head": head} | zeros
