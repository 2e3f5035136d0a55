"""A quantized checkpoint (FP8, NVFP4, MXFP4, GPTQ, AWQ, compressed-tensors, GGUF; by any tool) as a float one.

    model.safetensors        every packed weight decoded, in the dtype asked for; what was float as it was
    config.json              the source's, without its quantization_config, with that dtype
    dequantization.json      what was decoded; checksums of all tensors and files
    and the tokenizer, chat templates and generation settings as they were

A folder's own names are kept and no model is needed, so that any architecture is written; a GGUF file's are turned
into transformers'. A tensor at a time is decoded, a part of `_PART` bytes is in memory.
Not here: which tensors make a weight (checkpoint/decoding.py), GGUF files (from_gguf.py), how OUT is written
(checkpoint/sink.py).
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import __version__
from llmq.checkpoint import Sink, Source, resolve
from llmq.checkpoint.decoding import DECODED, as_floats
from llmq.checkpoint.digest import digest, file_digest, sealed
from llmq.checkpoint.packed import natural
from llmq.checkpoint.place import DEQUANTIZED, user_path
from llmq.checkpoint.stage import fingerprint, look
from llmq.errors import LlmqError
from llmq.export.experts import join
from llmq.export.from_gguf import Floats
from llmq.progress import Progress

_PART = 2**30


def dequantize(
    src: str,
    out: Path,
    *,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    check: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the quantized checkpoint SRC as a float one. Returns the content of its dequantization.json.

    dtype: of what is decoded, one of `DECODED`. check: whether what was written is read again and compared before it
    becomes OUT. progress: called with tensors done, tensors in all and what is going on.
    Raises LlmqError where SRC is no quantized checkpoint, a tensor is missing, misshapen or not finite, or OUT cannot
    be written; OUT is then untouched.
    """
    if dtype not in DECODED:
        raise LlmqError(f"--dtype {dtype!r} is not one of {', '.join(DECODED)}")
    if user_path(src).exists():
        Sink(out, overwrite=overwrite, reads={"SRC": user_path(src)})  # refuses before anything is read
    source = _opened(src, DECODED[dtype])
    seen = look(source.path) if source.path.is_file() else fingerprint(source.path)
    run = {"command": "dequantize", "SRC": seen, "dtype": dtype}
    with Sink(out, overwrite=overwrite, reads={"SRC": source.path}, run=run) as sink:
        if sink.earlier is not None:
            sink.commit()
            return sink.earlier
        sink.require(2 * source.bytes())
        _add(sink, source, progress or (lambda done, total, what: None))
        if isinstance(source, Floats):
            source.beside(sink.stage)
        else:
            sink.copy_files(source.path)
        record = _close(sink, source, _with_dtype(source.config, dtype))
        if check:
            _require_same(sink.whole, sink.digests)
        sink.seal(record)
        sink.commit()
    return record


def _opened(src: str, dtype: torch.dtype) -> Source:
    """Return what SRC decodes to. Raises LlmqError for a float checkpoint."""
    if src.endswith(".gguf") or user_path(src).is_file():
        return Floats(user_path(src), dtype)
    source = Source(resolve(src))
    if source.quantization is None:
        raise LlmqError(f"{src} is a float checkpoint already; nothing is packed in it")
    source.warnings += [*as_floats(source, dtype), *join(source)]
    return source


def _add(sink: Sink, source: Source, step: Progress) -> None:
    """Stage every tensor, in parts. Raises LlmqError for one that is not finite."""
    names = sorted(source.names(), key=natural)
    part, size = dict[str, Tensor](), 0
    for i, name in enumerate(names):
        step(i, len(names), name)
        part[name] = _finite(name, source.get(name))
        size += part[name].nbytes
        if size >= _PART:
            sink.add(part)
            part, size = {}, 0
    if part:
        sink.add(part)
    step(len(names), len(names), "writing")


def _close(sink: Sink, source: Source, config: Mapping[str, Any]) -> dict[str, Any]:
    """Join the shards, and write the config and the record, which seals all other files. Returns the record."""
    total = sink.join()
    sink.text("config.json", json.dumps(config, indent=2) + "\n")
    files = {p.relative_to(sink.stage).as_posix(): file_digest(p) for p in sink.files()}
    record = sealed({
        "llmq": __version__,
        "torch": str(torch.__version__),
        "source": asdict(source.origin),
        "decoded": source.decoded,
        "warnings": source.warnings,
        "bytes": total,
        "tensors": dict(sink.digests),
        "files": files,
    })  # fmt: skip
    sink.text(DEQUANTIZED, json.dumps(record, indent=2) + "\n")
    return record


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config that gives the model, and the text model within it, this dtype, under the key that it has."""
    text = config.get("text_config")
    said = {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"dtype": dtype}
    inner = {key: dtype for key in ("dtype", "torch_dtype") if isinstance(text, dict) and key in text}
    return {**config, **said} | ({"text_config": {**text, **inner}} if isinstance(text, dict) else {})


def _finite(name: str, tensor: Tensor) -> Tensor:
    if tensor.is_floating_point() and tensor.numel() and not bool(torch.isfinite(torch.stack(tensor.aminmax())).all()):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise LlmqError(
            f"tensor {name} holds NaN or Inf in {kind}; the checkpoint is damaged, or its values are beyond {kind}: "
            "--dtype bfloat16 and float32 reach further than float16"
        )
    return tensor


def _require_same(stage: Path, digests: Mapping[str, str]) -> None:
    """Raise LlmqError unless the staged tensors are those that were handed over."""
    written = Source(stage)
    differ = [n for n in digests if n not in written or digest(written.get(n)) != digests[n]]
    if differ or set(written.names()) != digests.keys():
        raise LlmqError(f"what was written is not right: tensor {(differ or ['?'])[0]} differs; is the disk at fault?")
