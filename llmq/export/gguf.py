"""A quantized checkpoint (GPTQ, AWQ, compressed-tensors; ours or a peer's) as a GGUF file, its codes kept.

Where codes cannot be kept the export is refused, or the linear is rounded again if the user asks for it.
Not here: which type keeps which codes (repack.py), reading the formats (formats/), the file (gguf/container.py).
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import __version__
from llmq.checkpoint import Source, resolve
from llmq.checkpoint.decoding import decoded_on_load
from llmq.checkpoint.digest import digest, sealed
from llmq.checkpoint.packed import PackedCheckpoint, Packing
from llmq.checkpoint.place import user_path
from llmq.checkpoint.stage import fingerprint
from llmq.export.repack import Exported, convert, round_anew
from llmq.gguf import container, mixture
from llmq.gguf.architecture import Architecture, architecture
from llmq.gguf.reader import GgufFile
from llmq.gguf.sink import GgufSink
from llmq.gguf.tokenizer import vocabulary
from llmq.guard.reading import json_object
from llmq.model.pretrained import blank_model, model_config, tokenizer_of
from llmq.types import LlmqError, QTensor
from llmq.verify import require_right

_CACHE = (".k_scale", ".v_scale", ".k_zero_point", ".v_zero_point")  # of a quantized key-value cache
_KEPT = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def export(  # noqa: PLR0913, the options of the command
    src: str,
    out: Path,
    *,
    requantize: str | None = None,
    embeddings: str | None = None,
    pre: str | None = None,
    split_max_size: str | None = None,
    overwrite: bool = False,
    check: bool = True,
) -> dict[str, Any]:
    """Write the quantized checkpoint SRC as OUT.gguf. Returns counts of types and outcomes, files, bytes and warnings.

    requantize: the type to round a linear to whose codes cannot be kept; None refuses it.
    embeddings: the type of embedding and head where they are float; None keeps their float type.
    check: whether what was written is verified before it becomes OUT (verify/).
    Raises LlmqError where SRC is no quantized checkpoint, its codes cannot be kept, or what was written is wrong; OUT
    is then untouched.
    """
    given = {"requantize": requantize, "embeddings": embeddings, "pre": pre, "split_max_size": split_max_size}
    anew, outside = _checked(requantize, "--requantize"), _checked(embeddings, "--embeddings")
    split = container.parse_size(split_max_size)
    if user_path(src).is_dir():
        GgufSink(out, overwrite=overwrite, reads={"SRC": user_path(src)})  # refuses before anything is read
    source = _source(src)
    run = {"command": "export", "SRC": fingerprint(source.path)} | given
    packed, config = _opened(source)
    made_by = source.path / "quantization.json"
    found = json_object(made_by) if made_by.is_file() else None  # how llmq found the codes
    arch = architecture(config)
    words = vocabulary(tokenizer_of(source.path), int(arch.config.vocab_size), arch.config, pre)
    warnings = [*arch.warnings(), *_left_out(source, packed), *words.warnings]
    with GgufSink(out, overwrite=overwrite, reads={"SRC": source.path}, run=run) as sink:
        if sink.earlier is not None:
            sink.commit()
            return sink.earlier
        sink.require(2 * source.bytes())
        made = dict(_staged(sink, packed, arch, anew, outside))
        keys = {"llmq.version": __version__, "llmq.source": str((source.quantization or {})["quant_method"])}
        kind = mixture.file_type(_file_type_of(made.values()))
        header = container.Header(arch, words, source.origin.name, kind, keys)
        record = {"llmq": __version__, "source": asdict(source.origin), "warnings": warnings}
        files = _write(sink, header, split, made, record, found)
        sink.promise = lambda: "--overwrite begins anew"
        done = {
            "types": dict(Counter(t.kind for t in made.values())),
            "outcomes": dict(Counter(t.outcome for t in made.values() if t.outcome)),
            "files": [str(sink.target(f.name)) for f in files],
            "bytes": sum(f.stat().st_size for f in files),
            "warnings": warnings,
        }
        if check:
            require_right(files[0])
        sink.seal(done)
        sink.commit()
    return done


def _staged(
    sink: GgufSink, packed: PackedCheckpoint, arch: Architecture, requantize: str | None, embeddings: str | None
) -> Iterator[tuple[str, Exported]]:
    """Stage every tensor that a GGUF file holds; yield it without its rows, by its float checkpoint's name."""
    for name, found in packed:
        if isinstance(found, QTensor):
            width = arch.together(name, found.codes.shape[1])
            reads = mixture.leaf(arch.tensor(name) or "") in arch.factors
            tensor = convert(found, module := name.removesuffix(".weight"), requantize, width, factor=reads)
            once = {f"{module}.{local}": beside for local, beside in tensor.beside.items()}
            sink.add(once)
            yield from ((local, Exported("F32", torch.empty(0))) for local in once)
        elif name.endswith(_CACHE) or arch.beside(name):
            continue
        else:
            tensor = _float(name, arch.tensor(name), found, embeddings)
        sink.add({name: tensor.rows})
        yield name, replace(tensor, rows=torch.empty(0), beside={})


def _write(
    sink: GgufSink, header: container.Header, split: int, made: Mapping[str, Exported], record: Any, exported: Any
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
    return container.write(sink.stage, sink.out, header, parts, split)


def _opened(source: Source) -> tuple[PackedCheckpoint, Any]:
    """Return the quantized checkpoint of a source and its config, which says whether its head is tied."""
    config: Any = model_config(source)
    model = blank_model(source, config)
    packed = PackedCheckpoint.open(source, model)
    config.tie_word_embeddings = model.config.tie_word_embeddings
    return packed, config


def _left_out(source: Source, packed: PackedCheckpoint) -> list[str]:
    """Return what of the checkpoint a GGUF file cannot hold."""
    found = list(source.warnings)
    if any(linear.scheme.activation for linear in packed.linears.values()):
        found.append("the checkpoint quantizes activations too; llama.cpp has its own way, their scales are left out")
    if any(n.endswith(_CACHE) for n in source.names()):
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
    if embeddings is None or ggml not in ("token_embd.weight", "output.weight"):
        return Exported(_KEPT[tensor.dtype], tensor)
    return round_anew(tensor, name, mixture.fallback(embeddings, tensor.shape[1]), "")


def _source(src: str) -> Source:
    if Path(src).is_file():
        GgufFile(Path(src))  # a truncated one says so
        raise LlmqError(
            f"{src} is a GGUF file already; export takes the folder of a GPTQ, AWQ or compressed-tensors one"
        )
    source = Source(resolve(src))
    if source.quantization is None:
        raise LlmqError(f"{src} is a float checkpoint; write it with llmq quantize {src} OUT.gguf --type Q4_K_M")
    if decoded_on_load(source.quantization):
        raise LlmqError(
            f"{src} holds narrow floats ({source.quantization['quant_method']}), whose codes no ggml type keeps; "
            f"decode and round them: llmq quantize {src} OUT.gguf --type Q4_K_M"
        )
    Packing(source.quantization)  # refuses in one line what llmq does not read
    return source


def _checked(kind: str | None, option: str) -> str | None:
    """Return the ggml type an option names. Raises LlmqError for one that is none."""
    if kind is not None and kind.upper() not in mixture.ALONE:
        raise LlmqError(f"{option} {kind!r} is no ggml type (there are: {', '.join(mixture.ALONE)})")
    return None if kind is None else kind.upper()


def _file_type_of(made: Iterable[Exported]) -> str:
    """Return a mixture whose base is the commonest type that is not float, for `general.file_type`."""
    counts = Counter(t.kind for t in made if t.kind not in mixture.FLOATS)
    kind = counts.most_common(1)[0][0] if counts else "F16"
    return f"{kind}_S" if kind in ("Q3_K", "Q4_K", "Q5_K") else kind
