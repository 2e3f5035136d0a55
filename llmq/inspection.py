"""What a checkpoint holds, from its config, headers and records alone: no weight is read."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from llmq.checkpoint import Source, resolve
from llmq.checkpoint.decoding import as_floats, decoded_on_load
from llmq.checkpoint.packed import PackedCheckpoint, Packing
from llmq.checkpoint.place import RECORD, is_gguf, recorded, user_path
from llmq.errors import LlmqError, printable
from llmq.gguf.reader import GgufFile
from llmq.guard.reading import field
from llmq.model.pretrained import blank_model, model_config
from llmq.show import Rows

_SHOWN = ("general.name", "general.file_type", "tokenizer.ggml.model", "tokenizer.ggml.pre", "llmq.version")


def inspect(name: str, *, linears: bool = False) -> Iterator[Rows]:
    """Yield tables about a local or Hub checkpoint or a GGUF file. Raises LlmqError for one that cannot be read."""
    if is_gguf(name):
        yield from _gguf(GgufFile(user_path(name)), linears=linears)
        return
    source = Source(resolve(name))
    config, quantization = source.config, source.quantization or {}
    table = Rows(source.path)
    table.add("model_type", config.get("model_type"))
    text = field(config, "text_config", dict, str(source.path / "config.json"), config)  # a wrapper's language model
    table.add("blocks, hidden size", f"{text.get('num_hidden_layers')}, {text.get('hidden_size')}")
    table.add("weights", f"{source.bytes() / 1e6:,.1f} MB in {len(source.names())} tensors")
    kinds = Counter(dtype for dtype, _ in source.headers().values())
    table.add("dtypes", ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()))
    table.add("quantization", quantization.get("quant_method") if quantization else "none (float)")
    record = recorded(source.path)
    packed = None
    try:
        if decoded_on_load(quantization):
            as_floats(source)
            decoded = (source.decoded or {}).get("weights", {})
            table.add("  decoded as they are read", ", ".join(f"{n} {kind}" for kind, n in decoded.items()))
        elif quantization:
            packed = _opened(source, linears=linears and record is None)
    except LlmqError as e:
        table.add("  not loaded by llmq", e)
    for key, value in quantization.items():
        if key != "quant_method":
            table.add(f"  {key}", printable(json.dumps(value), 200))
    where = str(source.path / RECORD)
    if record is not None:
        table.add("bits per quantized weight", field(record, "size", dict, where).get("bits_per_weight"))
        recipe = field(record, "recipe", dict, where)
        table.add("recipe", " ".join(f"{k}={v}" for k, v in recipe.items() if v not in (None, [])))
    yield table
    if linears and record is not None:
        yield _errors(field(record, "linears", dict, where), where)
    elif linears:
        yield _linears(packed) if packed else _shapes(source)


def _gguf(file: GgufFile, *, linears: bool) -> Iterator[Rows]:
    table = Rows(file.path)
    arch = str(file.value("general.architecture"))
    table.add("architecture", arch)
    blocks, hidden = (file.value(f"{arch}.{key}") for key in ("block_count", "embedding_length"))
    table.add("blocks, hidden size", f"{blocks}, {hidden}")
    for key in _SHOWN:
        if (value := file.value(key)) is not None:
            table.add(key, str(value))
    count = sum(t.n_elements for t in file.tensors.values())
    table.add("tensors", f"{file.data_bytes() / 1e6:,.1f} MB in {len(file.tensors)} tensors, {count:,} weights")
    if count:
        table.add("bits per weight", f"{8 * file.data_bytes() / count:.3f}")
    table.add("types", ", ".join(f"{n} {kind}" for kind, n in file.kinds().most_common()))
    number, shards = file.value("split.no"), file.value("split.count")
    if shards is not None:
        table.add("shard", f"{number + 1 if isinstance(number, int) else '?'} of {shards}")
    yield table
    if linears:
        lines = Rows("", "tensor", "type", "shape")
        for name, t in file.tensors.items():
            lines.add(name, t.tensor_type.name, list(reversed(t.shape)))
        yield lines
        if report := file.report():
            yield _errors(field(report, "linears", dict, str(file.path)), str(file.path))


def _errors(report: Mapping[str, Any], where: str) -> Rows:
    """Return the lines that llmq recorded, as a table. Raises LlmqError where they are no such lines."""
    shown = Rows("", "linear", "bits", "weight error", "output error", "method", "damp", "trouble")
    for name in report:
        line = field(report, name, dict, where)
        errors = (field(line, f"{kind}_error", float, f"{where}, {name}", math.nan) for kind in ("weight", "output"))
        said = ("" if math.isnan(e) else f"{e:.3e}" for e in errors)
        kinds = ", ".join(field(line, "trouble", dict, f"{where}, {name}", {}))
        shown.add(name, line.get("bits"), *said, line.get("method", ""), line.get("damp", ""), kinds)
    return shown


def _opened(source: Source, *, linears: bool) -> PackedCheckpoint | None:
    """Return the packed linears, where asked for. Raises LlmqError for a checkpoint that llmq does not load."""
    Packing(source.quantization or {})
    return PackedCheckpoint.open(source, blank_model(source, model_config(source))) if linears else None


def _linears(packed: PackedCheckpoint) -> Rows:
    shown = Rows("", "linear", "shape", "bits", "group size", "symmetric", "activations")
    for name, linear in packed.linears.items():
        args, activation = linear.scheme.weight.args() or {}, linear.scheme.activation
        inputs = f"{activation.bits} bits, {'static' if linear.scheme.static else 'dynamic'}" if activation else "float"
        group, sym = args["group_size"] or args["strategy"], "yes" if args["symmetric"] else "no"
        shown.add(name, [linear.N, linear.K], args["num_bits"], group, sym, inputs)
    return shown


def _shapes(source: Source) -> Rows:
    shown = Rows("", "tensor", "dtype", "shape")
    for name, (dtype, shape) in sorted(source.headers().items()):
        shown.add(name, dtype, list(shape))
    return shown
