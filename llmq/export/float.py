"""Float: every packed weight decoded (FP8, NVFP4, MXFP4, GPTQ, AWQ, compressed-tensors, GGUF; by any tool).

    model.safetensors        every packed weight decoded, in the dtype asked for; what was float as it was
    config.json              the source's, without its quantization_config, with that dtype
    README.md                the model card
    dequantization.json      what was decoded; checksums of all tensors and files
    and the tokenizer, chat templates and generation settings as they were

A folder's own names are kept and no model is needed, so that any architecture is written; a GGUF file's are turned
into transformers'. A tensor at a time is decoded, a part of `_PART` bytes is in memory.
Not here: which tensors make a weight (checkpoint/decoding.py), GGUF files (_from_gguf.py), how OUT is written
(checkpoint/sink.py).
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import __version__
from llmq.checkpoint import Sink, Source
from llmq.checkpoint.card import float_card
from llmq.checkpoint.decoding import DECODED
from llmq.checkpoint.digest import digest, file_digests, sealed
from llmq.checkpoint.hub_metadata import CARD, SourceCard, source_card
from llmq.checkpoint.packed import natural
from llmq.checkpoint.place import DEQUANTIZED, is_gguf
from llmq.errors import LlmqError
from llmq.export._decoded import decoded
from llmq.export._from_gguf import Floats
from llmq.export._target import Opened, Target, finite, stage
from llmq.progress import Progress

_PART = 2**30


@dataclass(frozen=True)
class Float(Target[Opened]):
    """A float checkpoint.

    dtype: of what is decoded, bfloat16, float16 or float32; what is float stays as it is.
    """

    dtype: str = "bfloat16"

    bare = "dtype"

    def __post_init__(self) -> None:
        if self.dtype not in DECODED:
            raise LlmqError(f"--dtype {self.dtype!r} is not one of {', '.join(DECODED)}")

    def open(self, src: str, requantize: str | None) -> Opened:
        """Return what SRC, a folder or a GGUF file, decodes to. Raises LlmqError for a float checkpoint."""
        if requantize is not None:
            raise LlmqError("--requantize means nothing here: what is decoded is float, it is not rounded anew")
        source = _opened(src, DECODED[self.dtype])
        card, told = source_card(source.path)
        source.warnings += told
        return Opened(source, source.warnings, card)

    def check(self, opened: Opened) -> list[str]:
        """Refuse nothing: floats hold what any format does."""
        return []

    def write(self, opened: Opened, out: Sink, step: Progress) -> dict[str, Any]:
        """See `Target.write`. Returns the content of dequantization.json. Raises LlmqError for what is not finite."""
        source = opened.source
        stage(out, _tensors(source, step), _PART)
        if isinstance(source, Floats):
            source.beside(out.stage)
        else:
            out.copy_files(source.path)
        return _close(out, source, _with_dtype(source.config, self.dtype), opened.card)

    def verify(self, out: Sink) -> None:
        """See `Target.verify`."""
        _require_same(out.whole, out.digests)


def _opened(src: str, dtype: torch.dtype) -> Source:
    """Return what SRC decodes to. Raises LlmqError for a float checkpoint."""
    source = decoded(src, dtype)
    if not is_gguf(src) and not source.decoded:
        raise LlmqError(f"{src} is a float checkpoint already; nothing is packed in it")
    return source


def _tensors(source: Source, step: Progress) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor. Raises LlmqError for one that is not finite."""
    names = sorted(source.names(), key=natural)
    for i, name in enumerate(names):
        step(i, len(names), name)
        yield source.written(name), finite(name, source.get(name))
    step(len(names), len(names), "writing")


def _close(sink: Sink, source: Source, config: Mapping[str, Any], card: SourceCard) -> dict[str, Any]:
    """Join the shards, write config, card and the record, which seals all other files. Returns the record."""
    total = sink.join()
    sink.json("config.json", config)
    record = {
        "llmq": __version__,
        "torch": str(torch.__version__),
        "source": asdict(source.origin),
        "decoded": source.decoded,
        "warnings": source.warnings,
        "bytes": total,
        "tensors": dict(sink.digests),
    }
    sink.text(CARD, float_card(record, config, card))
    record = sealed(record | {"files": file_digests(sink.stage, sink.files())})
    sink.json(DEQUANTIZED, record)
    return record


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return a config that gives the model, and the text model within it, this dtype, under the key that it has."""
    text = config.get("text_config")
    said = {key: dtype for key in ("dtype", "torch_dtype") if key in config} or {"dtype": dtype}
    inner = {key: dtype for key in ("dtype", "torch_dtype") if isinstance(text, dict) and key in text}
    return {**config, **said} | ({"text_config": {**text, **inner}} if isinstance(text, dict) else {})


def _require_same(stage: Path, digests: Mapping[str, str]) -> None:
    """Raise LlmqError unless the staged tensors are those that were handed over."""
    written = Source(stage)
    differ = [n for n in digests if n not in written or digest(written.get(n)) != digests[n]]
    if differ or set(written.names()) != digests.keys():
        raise LlmqError(f"what was written is not right: tensor {(differ or ['?'])[0]} differs; is the disk at fault?")
