"""GGUF files written again by gguf-py, as other tools do: other keys, shards joined, matrices in another type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def rewrite_gguf(
    files: Sequence[Path],
    out: Path,
    changes: Mapping[str, object],
    without: tuple[str, ...] = ("llmq.",),
    kind: Any = None,
) -> Path:
    """Write the shards of a model as one file, with other values of some keys, or new keys. Returns it.

    without: how the names of keys begin that are left out. kind: a `GGMLQuantizationType` for all matrices.
    """
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.quants import dequantize, quantize

    readers = [GGUFReader(file) for file in files]
    values = {f.name: (f.contents(), f.types) for f in readers[0].fields.values()}
    for name, value in changes.items():
        old, types = values.get(name, (None, []))
        values[name] = value, types if type(old) is type(value) else [GGUFValueType.get_type(value)]
    writer = GGUFWriter(out, str(values.pop("general.architecture")[0]))
    for name, (value, types) in values.items():
        if not name.startswith(("GGUF.", "split.", *without)):
            writer.add_key_value(name, value, types[0], types[-1] if len(types) > 1 else None)
    for t in (t for reader in readers for t in reader.tensors):
        if kind is None or t.data.ndim == 1:
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
        else:
            writer.add_tensor(t.name, quantize(dequantize(t.data, t.tensor_type), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
