"""A quantized checkpoint (GPTQ, AWQ, compressed-tensors; ours or a peer's) as a GGUF file, its codes kept.

    levels = code - zero
    all levels in -8 .. 7      -> Q4_0   d = scale                          values exact
    4 bits, any zero           -> Q4_1   d = scale, m = fp16(-zero*scale)   codes exact, minimum rounded by <= 2^-11
    all levels in -128 .. 127  -> Q8_0   d = scale                          values exact

A scale is repeated for every 32 columns of its group. That takes groups of a multiple of 32 columns (or whole rows) in
their natural order, and scales that float16 can hold; where it does not work out, the export is refused, or the linear
is rounded again if the user asks for it.
Not here: reading the formats (formats/), the file (gguf/container.py).
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import __version__, registry
from llmq.checkpoint import Source, resolve
from llmq.checkpoint.decoding import narrow
from llmq.checkpoint.digest import digest, sealed
from llmq.checkpoint.packed import PackedCheckpoint, Packing
from llmq.checkpoint.place import user_path
from llmq.checkpoint.stage import fingerprint
from llmq.gguf import container, mixture
from llmq.gguf.architecture import Architecture, architecture
from llmq.gguf.reader import GgufFile
from llmq.gguf.sink import GgufSink
from llmq.gguf.tokenizer import vocabulary
from llmq.guard.reading import json_object
from llmq.model.pretrained import blank_model, model_config, tokenizer_of
from llmq.pipeline.records import Line, rounded
from llmq.types import GgmlParams, LlmqError, Params, QTensor
from llmq.verify import require_right

EXACT, ROUNDED, REQUANTIZED = "values exact", "codes exact, minimum rounded", "requantized"
_QBLOCK = 32  # columns of a qblock of Q4_0, Q4_1 and Q8_0
_CACHE = (".k_scale", ".v_scale", ".k_zero_point", ".v_zero_point")  # of a quantized key-value cache
_KEPT = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Exported:
    """One tensor: its ggml type and stored rows; of a linear also what became of its codes, and what is recorded."""

    kind: str
    rows: Tensor
    outcome: str = ""
    line: Mapping[str, Any] = field(default_factory=dict)


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
            tensor = convert(found, name.removesuffix(".weight"), requantize, width)
        elif name.endswith(_CACHE) or arch.beside(name):
            continue
        else:
            tensor = _float(name, arch.tensor(name), found, embeddings)
        sink.add({name: tensor.rows})
        yield name, replace(tensor, rows=torch.empty(0))


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


def convert(q: QTensor, name: str, requantize: str | None, together: int | None = None) -> Exported:
    """Return the ggml rows of a solved linear, its codes kept.

    together: the columns that stay together in the file (`Architecture.together`); None for all.
    Raises LlmqError, with the reason, where they cannot be kept and `requantize` names no type instead.
    """
    together = together or q.codes.shape[1]
    why = _obstacle(q, together)
    if why is None:
        at = Params.of(q.params).map(lambda p: p[:, q.group_K[::_QBLOCK]])  # of every block, `[N, K / 32]`
        d, zero = at.scale.half(), at.zero
        level = q.codes.to(torch.int16).unflatten(1, (-1, _QBLOCK)) - zero[..., None].to(torch.int16)
        lo, hi = int(level.min()), int(level.max())
        if lo >= -8 and hi <= 7:
            return _pack("Q4_0", level + 8, d, None, q)
        if q.grid.bits == 4:
            return _pack("Q4_1", q.codes, d, (zero.float() * d.float()).half(), q)
        if lo >= -128 and hi <= 127:
            return _pack("Q8_0", level + 128, d, None, q)
        why = f"{q.grid.bits}-bit asymmetric codes have no ggml type"
    if requantize is None:
        raise LlmqError(
            f"{name}: its codes cannot be kept: {why}; say --requantize TYPE (Q8_0, Q6_K ...) to round it anew"
        )
    return _rounded(q.dequantize(), name, mixture.fallback(requantize, together), REQUANTIZED)


def _obstacle(q: QTensor, together: int) -> str | None:
    """Return why the codes cannot be kept in blocks of 32 columns, `together` of which stay so; None where they can."""
    K = q.codes.shape[1]
    if together % _QBLOCK:
        what = "rows" if together == K else "pieces, which the file has in another order,"
        return f"{what} of {together} columns are no multiple of {_QBLOCK}"
    group = q.group_K.reshape(-1, _QBLOCK)
    if (group != group[:, :1]).any():
        if q.g_idx is None:
            return f"groups of {K // q.params.scale.shape[1]} columns are no multiple of {_QBLOCK}"
        return "its groups follow the activation order (desc_act), not the columns"
    scale = q.params.scale
    exact = scale.half()
    off = int((~torch.isfinite(exact) | (exact.float() != scale.float())).sum())
    if off:
        return f"{off} of {scale.numel()} scales are not float16 numbers"
    if q.grid.bits == 4 and not torch.isfinite((Params.of(q.params).zero.float() * scale.float()).half()).all():
        return "a minimum is beyond float16"
    return None


def _pack(kind: str, codes: Tensor, d: Tensor, dmin: Tensor | None, q: QTensor) -> Exported:
    """Return the codes of `q` as blocks: codes `[N, K]`, scales d and minima float16 `[N, K / 32]`."""
    params = GgmlParams(d.float(), None if dmin is None else -dmin.float(), d, dmin)
    grid = registry.load("grids", kind.lower())
    packed = QTensor(codes.to(torch.uint8).reshape(q.codes.shape), params, grid)
    outcome = EXACT if dmin is None else ROUNDED
    line = Line().add(packed, packed.dequantize(), q.dequantize()).to_json()
    return Exported(kind, grid.to_bytes(packed.codes, params), outcome, {"method": "export", "bits": grid.bits} | line)


def _rounded(W_NK: Tensor, name: str, kind: str, outcome: str) -> Exported:
    """Return a float matrix rounded to nearest."""
    if kind in mixture.FLOATS:
        return Exported(kind, container.as_float(W_NK, kind, name), outcome)
    grid = registry.load("grids", kind.lower())
    rows, line = rounded(W_NK, grid, lambda q: grid.to_bytes(q.codes, q.params))
    return Exported(kind, rows, outcome, {"method": "export", "bits": grid.bits} | line)


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
    return _rounded(tensor, name, mixture.fallback(embeddings, tensor.shape[1]), "")


def _source(src: str) -> Source:
    if Path(src).is_file():
        GgufFile(Path(src))  # a truncated one says so
        raise LlmqError(
            f"{src} is a GGUF file already; export takes the folder of a GPTQ, AWQ or compressed-tensors one"
        )
    source = Source(resolve(src))
    if source.quantization is None:
        raise LlmqError(f"{src} is a float checkpoint; write it with llmq quantize {src} OUT.gguf --type Q4_K_M")
    if narrow(source.quantization):
        raise LlmqError(
            f"{src} holds narrow floats ({source.quantization['quant_method']}), whose codes no ggml type keeps; "
            f"decode and round them: llmq quantize {src} OUT.gguf --type Q4_K_M"
        )
    Packing(source.quantization)  # refuses in one line what llmq does not read
    return source


def _checked(kind: str | None, option: str) -> str | None:
    """Return the ggml type an option names. Raises LlmqError for one that is none."""
    if kind is not None and kind.upper() not in mixture.TYPES:
        raise LlmqError(f"{option} {kind!r} is no ggml type (there are: {', '.join(mixture.TYPES)})")
    return None if kind is None else kind.upper()


def _file_type_of(made: Iterable[Exported]) -> str:
    """Return a mixture whose base is the commonest type that is not float, for `general.file_type`."""
    counts = Counter(t.kind for t in made if t.kind not in mixture.FLOATS)
    kind = counts.most_common(1)[0][0] if counts else "F16"
    return f"{kind}_S" if kind in ("Q3_K", "Q4_K", "Q5_K") else kind
