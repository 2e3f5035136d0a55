"""What a checkpoint holds, from its headers and records alone: no weight is read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rich.table import Table

from llmq.checkpoint import Source, resolve
from llmq.gguf.reader import GgufFile

_SHOWN = ("general.name", "general.file_type", "tokenizer.ggml.model", "tokenizer.ggml.pre", "llmq.version")


def inspect(name: str, *, linears: bool = False) -> Iterator[Table]:
    """Yield tables about a local or Hub checkpoint or a GGUF file. Raises LlmqError for one that cannot be read."""
    if name.endswith(".gguf") or Path(name).is_file():
        yield from _gguf(GgufFile(Path(name)), linears=linears)
        return
    source = Source(resolve(name))
    config = source.config
    quantization = config.get("quantization_config")
    table = Table(title=str(source.path), title_justify="left", show_header=False)
    table.add_row("model_type", str(config.get("model_type")))
    table.add_row("blocks, hidden size", f"{config.get('num_hidden_layers')}, {config.get('hidden_size')}")
    table.add_row("weights", f"{source.bytes() / 1e6:,.1f} MB in {len(source.names())} tensors")
    kinds = Counter(dtype for dtype, _ in source.headers().values())
    table.add_row("dtypes", ", ".join(f"{n} {kind}" for kind, n in kinds.most_common()))
    table.add_row("quantization", "none (float)" if quantization is None else str(quantization.get("quant_method")))
    for key, value in (quantization or {}).items():
        if key != "quant_method":
            text = json.dumps(value)
            table.add_row(f"  {key}", text if len(text) <= 200 else text[:197] + "...")
    record_file = source.path / "quantization.json"
    record = json.loads(record_file.read_text()) if record_file.is_file() else None
    if record:
        table.add_row("bits per quantized weight", str(record["size"]["bits_per_weight"]))
        table.add_row("recipe", " ".join(f"{k}={v}" for k, v in record["recipe"].items() if v not in (None, [])))
    yield table
    if linears and record:
        yield _errors(record)
    elif linears:
        yield _shapes(source)


def _gguf(file: GgufFile, *, linears: bool) -> Iterator[Table]:
    table = Table(title=str(file.path), title_justify="left", show_header=False)
    arch = str(file.value("general.architecture"))
    table.add_row("architecture", arch)
    blocks, hidden = (file.value(f"{arch}.{key}") for key in ("block_count", "embedding_length"))
    table.add_row("blocks, hidden size", f"{blocks}, {hidden}")
    for key in _SHOWN:
        if (value := file.value(key)) is not None:
            table.add_row(key, str(value))
    count = sum(int(t.n_elements) for t in file.tensors.values())
    table.add_row("tensors", f"{file.data_bytes() / 1e6:,.1f} MB in {len(file.tensors)} tensors, {count:,} weights")
    if count:
        table.add_row("bits per weight", f"{8 * file.data_bytes() / count:.3f}")
    table.add_row("types", ", ".join(f"{n} {kind}" for kind, n in file.kinds().most_common()))
    if (shards := file.value("split.count")) is not None:
        table.add_row("shard", f"{file.value('split.no') + 1} of {shards}")
    yield table
    if linears:
        lines = Table("tensor", "type", "shape")
        for name, t in file.tensors.items():
            lines.add_row(name, t.tensor_type.name, str([int(n) for n in reversed(t.shape)]))
        yield lines
        if report := file.value("llmq.report"):
            yield _errors({"linears": json.loads(report)})


def _errors(record: dict) -> Table:
    lines = Table("linear", "bits", "error", "method", "damp", "fallback")
    for name, line in record["linears"].items():
        error = line.get("output_error", line.get("weight_error", float("nan")))
        damp, fallback = line.get("damp", ""), line.get("fallback", "")
        lines.add_row(name, str(line["bits"]), f"{error:.3e}", line["method"], str(damp), fallback)
    return lines


def _shapes(source: Source) -> Table:
    lines = Table("tensor", "dtype", "shape")
    for name, (dtype, shape) in sorted(source.headers().items()):
        lines.add_row(name, dtype, str(shape))
    return lines
