"""GGUF, the files of llama.cpp: codes in the ggml types that hold them.

Where codes cannot be kept the export is refused, or the linear is rounded again if the user asks for it.
Not here: which type keeps which codes (_repack.py), reading the formats (formats/), the file (gguf/container.py).
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import __version__
from llmq.checkpoint import Sink
from llmq.checkpoint.digest import digest, sealed
from llmq.checkpoint.hub_metadata import base_model, gguf_keys
from llmq.checkpoint.packed import CACHE
from llmq.export._repack import Exported, convert, round_anew, unheld
from llmq.export._target import OfCodes, Packed, open_packed
from llmq.gguf import container, mixture
from llmq.gguf.architecture import Architecture, architecture
from llmq.gguf.sink import GgufSink
from llmq.gguf.tokenizer import Vocabulary, vocabulary
from llmq.progress import Progress
from llmq.types import LlmqError, QTensor
from llmq.verify import require_right

_KEPT = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Gguf(OfCodes):
    """A GGUF file.

    type: the ggml type that holds the codes of every linear; None takes the smallest that does.
    embeddings: the type of embedding and head where they are float; None keeps their float type.
    pre: llama.cpp's name of the tokenizer's pre-tokenizer, where llmq cannot find it.
    split_max_size: files of at most so much, "4G".
    """

    type: str | None = None
    embeddings: str | None = None
    pre: str | None = None
    split_max_size: str | None = None

    bare = "type"
    sink = GgufSink
    suffix = ".gguf"

    def __post_init__(self) -> None:
        for name in ("type", "embeddings"):
            if (kind := getattr(self, name)) is not None:
                object.__setattr__(self, name, mixture.named(kind, f"--{name}", mixture.ALONE))
        container.parse_size(self.split_max_size)

    def open(self, src: str, requantize: str | None) -> Packed:
        """See `Target.open`."""
        kind = None if requantize is None else mixture.named(requantize, "--requantize", mixture.ALONE)
        opened = open_packed(src, kind, minima=True)
        if opened.method == "gguf":
            raise LlmqError(f"{src} is a GGUF file already; llmq quantize makes other types of the float model")
        return opened

    def check(self, opened: Packed) -> list[str]:
        """Refuse an architecture and a tokenizer that GGUF does not hold; say what is left out."""
        arch = architecture(opened.config)
        return [*arch.warnings(), *_left_out(opened), *self._words(opened, arch).warnings]

    def foresee(self, opened: Packed) -> list[str]:
        """See `OfCodes.foresee`."""
        for spec in opened.linears:
            if why := unheld(spec):
                raise LlmqError(f"{spec.name}: its codes cannot be kept in GGUF: {why}")
        return self.check(opened)

    def write(self, opened: Packed, out: Sink, step: Progress) -> dict[str, Any]:
        """See `Target.write`; also the number of tensors of each type."""
        arch = architecture(opened.config)
        made = dict(self._staged(out, opened, arch, step))
        card, name = opened.card.unlike(opened.method), opened.source.origin.name
        keys = gguf_keys(card, card.base or base_model(name, opened.source.config.get("_name_or_path")))
        keys |= {"llmq.version": __version__, "llmq.source": opened.method}
        kind = mixture.file_type(_file_type_of(made.values()))
        header = container.Header(arch, self._words(opened, arch), name, kind, keys)
        record = {"llmq": __version__, "source": asdict(opened.source.origin), "warnings": opened.warnings}
        files = self._write(out, header, made, record, opened.made)
        return {
            "types": dict(Counter(t.kind for t in made.values())),
            "outcomes": dict(Counter(t.outcome for t in made.values() if t.outcome)),
            "files": [str(out.target(f.name)) for f in files],
            "bytes": sum(f.stat().st_size for f in files),
            "warnings": opened.warnings,
        }

    def verify(self, out: Sink) -> None:
        """See `Target.verify`."""
        require_right(out.whole)

    def _words(self, opened: Packed, arch: Architecture) -> Vocabulary:
        config = arch.config
        return vocabulary(opened.tokenizer(), int(config.vocab_size), config, self.pre)

    def _staged(self, sink: Sink, opened: Packed, arch: Architecture, step: Progress) -> Iterator[tuple[str, Exported]]:
        """Stage every tensor that a GGUF file holds; yield it without its rows, by its float checkpoint's name."""
        for name, found in opened.weights(step):
            if isinstance(found, QTensor):
                tensor = self._linear(name, found, opened, arch)
                once = {f"{name.removesuffix('.weight')}.{local}": beside for local, beside in tensor.beside.items()}
                sink.add(once)
                yield from ((local, Exported("F32", torch.empty(0))) for local in once)
            elif name.endswith(CACHE) or arch.beside(name):
                continue
            else:
                tensor = _float(name, arch.tensor(name), found, self.embeddings)
            sink.add({name: tensor.rows})
            yield name, replace(tensor, rows=torch.empty(0), beside={})

    def _linear(self, name: str, q: QTensor, opened: Packed, arch: Architecture) -> Exported:
        together, leaf = arch.together(name, q.codes.shape[1]), mixture.leaf(arch.tensor(name) or "")
        factor = leaf in arch.factors
        return convert(q, name.removesuffix(".weight"), opened.requantize, together, factor=factor, kind=self.type)

    def _write(
        self, sink: Sink, header: container.Header, made: Mapping[str, Exported], record: Any, exported: Any
    ) -> list[Path]:
        """Write the file from what is staged, the record within; return the staged files.

        record: how it begins. exported: the record of how llmq found the codes, if it did.
        """
        parts = container.typed(sink.staged(), {n: t.kind for n, t in made.items()})
        lines = {n.removesuffix(".weight"): dict(t.line) for n, t in made.items() if t.line}
        digests = {n: digest(t) for n, t in container.contents(header.architecture, parts)}
        record = record | {"linears": lines, "tensors": digests, "exported": exported}
        report = json.dumps(sealed(record), separators=(",", ":"))
        header = replace(header, keys={**header.keys, container.REPORT: report})
        return container.write(sink.stage, sink.out, header, parts, container.parse_size(self.split_max_size))


def _left_out(opened: Packed) -> list[str]:
    """Return what of the checkpoint a GGUF file cannot hold."""
    found = []
    if any(linear.scheme.activation for linear in opened.linears):
        found.append("the checkpoint quantizes activations too; llama.cpp has its own way, their scales are left out")
    if any(n.endswith(CACHE) for n in opened.source.names()):
        found.append("the scales of the key-value cache are left out; give llama.cpp --cache-type-k and -v instead")
    return found


def _float(name: str, ggml: str | None, tensor: Tensor, embeddings: str | None) -> Exported:
    """Return a float tensor: vectors as F32, matrices as they are, or rounded where asked.

    Raises LlmqError for one that is not float, or not finite.
    """
    if tensor.dtype not in _KEPT:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise LlmqError(f"{name} is {kind}, neither float nor packed; the checkpoint's config is not its own")
    if not torch.isfinite(tensor).all():
        raise LlmqError(f"tensor {name} holds NaN or Inf; the checkpoint is damaged")
    if tensor.dim() < 2 or ggml is None or mixture.always_float(ggml):
        return Exported("F32", tensor.float())
    if embeddings is None or ggml not in (*mixture.EMBEDDINGS, "output.weight"):
        return Exported(_KEPT[tensor.dtype], tensor)
    return round_anew(tensor, name, mixture.fallback(embeddings, tensor.shape[1]), "")


def _file_type_of(made: Iterable[Exported]) -> str:
    """Return a mixture whose base is the commonest type that is not float, for `general.file_type`."""
    counts = Counter(t.kind for t in made if t.kind not in mixture.FLOATS)
    kind = counts.most_common(1)[0][0] if counts else "F16"
    return f"{kind}_S" if kind in ("Q3_K", "Q4_K", "Q5_K") else kind
