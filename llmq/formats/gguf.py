"""GGUF, the files of llama.cpp: every matrix in a ggml type of its own, all in one file with the tokenizer.

    weight   uint8 [N, row bytes]   the stored blocks of every row, one after another
    scale    float32 [1]            of NVFP4: by which llama.cpp multiplies what the weight gave

A type's byte layout is its grid (grids/q4_k.py and so on), so packing is the grid's own. Which tensor gets which type
is a mixture (`--type Q4_K_M`), changed by overrides on ggml's tensor names (`--override 'ffn_down:type=Q6_K'`).
Not here: any of the bytes, and the file around the tensors (llmq/gguf/).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from llmq.checkpoint.digest import digest, sealed
from llmq.checkpoint.hub_metadata import base_model, gguf_keys, source_card
from llmq.format import Assignment, FloatModel, Out, Wanted
from llmq.gguf import container, imatrix, kinds, mixture
from llmq.gguf.architecture import Architecture, architecture
from llmq.gguf.sink import GgufSink
from llmq.gguf.tokenizer import Vocabulary, vocabulary
from llmq.guard.patterns import Pattern
from llmq.overrides import parse
from llmq.readers import Limit, Reader, readers, table
from llmq.stored import StoredGrid
from llmq.types import LinearSpec, LlmqError, QTensor, Scheme

_ENDS = r"^((per_layer_)?token_embd|output)\.weight$"  # what --embeddings means
_SKIPPED = "F16"  # what --skip leaves float
_READERS = table(
    ("transformers", None, "it decodes GGUF of some architectures to floats (gguf_file=)", ""),
    ("vLLM", False, "since 0.24 GGUF is read by a plugin, vllm-gguf-plugin (vllm#39612), not by vLLM itself", "source"),
    ("SGLang", None, "it has a reader of GGUF (quantization/gguf)", ""),
    ("llama.cpp", True, "", "ran"),
    ("OpenVINO", True, "its GenAI pipeline reads Llama's, Qwen 2's and 3's (a preview)", "ran"),
    ("MLX", False, "it reads folders; --format mlx", "source"),
    ("onnxruntime-genai", False, "it reads no GGUF", "source"),
    ("TensorRT-LLM", False, "it loads folders of transformers, no GGUF", "source"),
)
_RAN = {"MXFP4", "NVFP4", "Q2_0", "Q4_0", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS"}


@dataclass(frozen=True, kw_only=True)
class _File(Assignment):
    """A GGUF file before its weights.

    floats: the ggml type of every tensor that stays float, by the model's names. choices: the types that a budget
    chooses from. split: bytes of one file at most. imatrix: the importance matrix that was used. names: ggml's.
    card: the keys that say what the source's model card does.
    """

    name: str
    architecture: Architecture
    vocabulary: Vocabulary
    mix: str
    floats: Mapping[str, str]
    choices: Sequence[str]
    split: int
    imatrix: str | None
    card: Mapping[str, str | int | list[str]]

    def float_bytes(self, name: str, shape: Sequence[int], nbytes: int) -> int:
        """See `Assignment.float_bytes`."""
        kind = self.floats.get(name)
        return 0 if kind is None else prod(self.architecture.shape(name, shape)) * container.FLOAT_TYPES[kind].itemsize

    def more_bytes(self) -> int:
        """See `Assignment.more_bytes`."""
        return sum(t.nbytes for t in self.architecture.extra().values())

    def channels(self, name: str, vector: Tensor) -> Tensor:
        """See `Assignment.channels`."""
        columns = self.architecture.columns(f"{name}.weight")
        return vector if columns is None else vector[columns]

    def tensor(self, name: str) -> str:
        """See `Assignment.tensor`; experts of a layer lie in one."""
        return self.names[f"{name}.weight"]

    def possible(self, linear: LinearSpec) -> dict[str, LinearSpec | None]:
        """See `Assignment.possible`: the types to choose from, or what stands in for them in rows of that width."""
        K, ggml = self.architecture.together(f"{linear.name}.weight", linear.K), self.tensor(linear.name)
        fitting = dict.fromkeys(mixture.fitting(k, ggml, K, self.architecture.factors) for k in self.choices)
        return {f"type={k}": replace(linear, scheme=Scheme(kinds.grid(k))) for k in fitting if k not in mixture.FLOATS}

    def join(self, out: Out, config: Mapping[str, Any], recipe: str) -> int:
        """Take the checksums of the tensors as the file will have them; it is written when the record is known."""
        digests, total = {}, 0
        for name, tensor in container.contents(self.architecture, self._parts(out)):
            digests[name] = digest(tensor)
            total += tensor.nbytes
        out.digests = digests
        return total

    def close(self, out: Out, record: dict[str, Any], recipe: str, readers: Sequence[Reader]) -> dict[str, Any]:
        """Write the file or files, the record within."""
        keys: dict[str, str | int | list[str]] = {**self.card, "llmq.version": record["llmq"], "llmq.recipe": recipe}
        keys |= {"quantize.imatrix.file": self.imatrix} if self.imatrix else {}
        keys |= {container.REPORT: json.dumps(sealed(record), separators=(",", ":"))}
        kind = mixture.file_type(self.mix)
        header = container.Header(self.architecture, self.vocabulary, self.name, kind, keys)
        files = container.write(out.stage, out.out, header, self._parts(out), self.split)
        record["size"]["bytes"] = sum(f.stat().st_size for f in files)
        return record | {"files": [f.name for f in files]}

    def _parts(self, out: Out) -> list[container.Part]:
        grids = {n: _stored(n, s) for n, s in self.schemes.items()}
        types = {f"{n}.weight": grid.kind for n, grid in grids.items()}
        types |= {f"{n}.{local}": "F32" for n, grid in grids.items() for local in grid.once}
        return container.typed(out.staged(), types | {**self.floats})


@dataclass
class Gguf:
    """The GGUF format.

    pre: llama.cpp's name of the tokenizer's pre-tokenizer, where llmq cannot find it; None finds it.
    mix, imatrix, split_max_size, embeddings: as the recipe has them, the mixture as `type`. choices: what a budget
    chooses from, as overrides say it.
    """

    pre: str | None = None
    mix: str = field(default="Q4_K_M", init=False)
    imatrix: str | None = field(default=None, init=False)
    split_max_size: str | None = field(default=None, init=False)
    embeddings: str | None = field(default=None, init=False)
    choices: Sequence[str] = field(default=(), init=False)
    quant_method: str = field(default="gguf", init=False)
    sink: ClassVar[type] = GgufSink

    @property
    def derived(self) -> frozenset[str]:
        """See `Format.derived`."""
        return frozenset()

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return float16, whatever the model's dtype."""
        return torch.float16

    def assign(self, model: FloatModel, wanted: Wanted) -> _File:
        """Return what the mixture, overrides and skips make of every tensor, the embedding and the head included.

        Raises LlmqError for a model, a tokenizer, a type or an importance matrix that cannot go together.
        """
        if wanted.weighs and self.imatrix:
            raise LlmqError("the method calibrates its own importance; --imatrix goes with --method rtn")
        arch, mix = architecture(model.config), mixture.mixture(self.mix)
        names = {n: ggml for n in model.shapes if (ggml := arch.tensor(n)) is not None}
        shapes = {ggml: _shape(arch, n, model.shapes[n]) for n, ggml in names.items()}
        weighs = wanted.weighs or self.imatrix is not None
        about = mixture.Model(arch.blocks, arch.gqa, arch.tied, arch.large, weighs, arch.experts, arch.factors)
        chosen = [mixture.named(said.removeprefix("type="), "--choices") for said in self.choices]
        inside = {names[f"{n}.weight"] for n in model.linears if f"{n}.weight" in names} if chosen else set()
        by_ggml = mixture.assign(shapes, mix, about, [*_ends(self.embeddings), *_overrides(wanted)])
        words = vocabulary(model.tokenizer(), shapes["token_embd.weight"][0], arch.config, self.pre)
        importance, missing = _importance(self.imatrix, names, model, arch)
        types = {n: by_ggml[ggml] for n, ggml in names.items()}
        card, untold = source_card(model.folder)
        quantized = {n: kind for n, kind in types.items() if kind not in mixture.FLOATS}
        return _File(
            schemes={n.removesuffix(".weight"): Scheme(kinds.grid(kind)) for n, kind in quantized.items()},
            importance=importance,
            warnings=[
                *arch.warnings(),
                *_left_out(model, arch),
                *words.warnings,
                *mixture.fallen_back({n: s for n, s in shapes.items() if n not in inside}, by_ggml, mix, about),
                *mixture.without_factor(shapes, by_ggml, mix, about),
                *missing,
                *untold,
            ],
            names=names,
            name=model.name,
            architecture=arch,
            vocabulary=words,
            mix=mix,
            floats={n: kind for n, kind in types.items() if n not in quantized},
            choices=chosen,
            split=container.parse_size(self.split_max_size),
            imatrix=self.imatrix,
            card=gguf_keys(card, base_model(model.name, model.saved.get("_name_or_path"))),
        )

    def check(self, linears: Sequence[LinearSpec], skipped: Sequence[str] = ()) -> list[str]:
        """Refuse what no GGUF tensor can hold. Raises LlmqError."""
        for spec in linears:
            grid = _grid(spec)
            if spec.scheme.activation is not None:
                raise LlmqError(f"{spec.name}: GGUF holds no quantized activations; use --format compressed-tensors")
            try:
                grid.row_bytes(spec.K)
            except ValueError as e:
                raise LlmqError(f"{spec.name}: {e}; take a type of 32-column blocks (--override), or F16") from e
        return []

    def readers(self, linears: Sequence[LinearSpec], skipped: Sequence[str] = ()) -> list[Reader]:
        """See `Format.readers`."""
        found = {_grid(s).kind for s in linears}
        others = ", ".join(sorted(found - _RAN))
        limits = []
        if others:
            say = f"its code names {others}, of which no file ran here"
            limits.append(Limit(say, notes=("llama.cpp",), known="source"))
        if found - {"Q4_0"}:
            say = "it advises Q4_0 and Q8_0, whose layout is near its own; of Q4_0 a file ran here"
            limits.append(Limit(say, notes=("OpenVINO",), known="source"))
        return readers(_READERS, limits)

    def pack(self, q: QTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """Return the stored rows. The codes must lie on the natural column order (no g_idx)."""
        if q.g_idx is not None:
            raise LlmqError(f"{spec.name}: GGUF holds no g_idx; drop desc_act (static groups)")
        grid = _grid(spec)
        return {"weight": grid.to_bytes(q.codes, q.params), **grid.stored_once(q.params)}

    def stacked(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """See `Format.stacked`."""
        return {"weight": torch.cat([part["weight"] for part in parts])}

    def unpack(self, tensors: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Invert `pack`. Raises LlmqError where the rows are missing or of another size."""
        for local, expected in self.layout(spec).items():
            t = tensors.get(local)
            if t is None or t.shape != expected.shape or t.dtype != expected.dtype:
                found = "missing" if t is None else f"{t.dtype} {list(t.shape)}"
                raise LlmqError(f"{spec.name}.{local} is {found}, not {expected.dtype} {list(expected.shape)}")
        grid = _grid(spec)
        codes, params = grid.from_bytes(tensors["weight"], {local: tensors[local] for local in grid.once})
        return QTensor(codes, params, spec.scheme.weight)

    def layout(self, spec: LinearSpec) -> dict[str, Tensor]:
        """Return the meta tensors of the stored rows, and of what lies beside them."""
        grid = _grid(spec)
        rows = torch.empty(spec.N, grid.row_bytes(spec.K), dtype=torch.uint8, device="meta")
        return {"weight": rows} | {local: torch.empty(1, device="meta") for local in grid.once}

    def config(self, linears: Sequence[LinearSpec], skipped: Sequence[str]) -> dict[str, Any]:
        """Return the method's name alone: a GGUF file has no config.json, each tensor says its type."""
        return {"quant_method": "gguf"}

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> tuple[Any, Callable[[str], Scheme | None]]:
        """Refuse: a transformers checkpoint cannot be GGUF."""
        raise LlmqError("a GGUF model is one file, not a checkpoint folder; run it with llama.cpp, or llmq inspect it")


def _left_out(model: FloatModel, arch: Architecture) -> list[str]:
    """Return what a user should know of the parts of a model that the file does not hold."""
    found = []
    if beside := [n for n in model.shapes if arch.beside(n)]:
        found.append(
            f"{len(beside)} tensors that read images are left out, e.g. {beside[0]}; llama.cpp reads them from a file "
            f"of their own, which its convert_hf_to_gguf.py {model.folder} --mmproj makes"
        )
    if model.carried:
        few = f"{len(model.carried)} tensors are left out, e.g. {model.carried[0]}"
        found.append(f"{few}, which transformers' model does not read either")
    return found


def _shape(arch: Architecture, name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of a tensor in the file, of its columns those that stay together."""
    *N, K = arch.shape(name, shape)
    return (*N, arch.together(name, K))


def _ends(kind: str | None) -> list[tuple[Pattern, str]]:
    """Return the type that --embeddings gives embedding and head. Raises LlmqError for one that is none."""
    if kind is None:
        return []
    return [(Pattern(_ENDS, "--embeddings"), mixture.named(kind, "--embeddings", mixture.ALONE))]


def _overrides(wanted: Wanted) -> list[tuple[Pattern, str]]:
    """Return the types that overrides and skips ask for. Raises LlmqError for anything but `REGEX:type=TYPE`."""
    found = []
    for text in wanted.override:
        override = parse(text)
        kind = override.changes.get("type", "").upper() if override and len(override.changes) == 1 else ""
        if override is None or kind not in mixture.TYPES:
            raise LlmqError(
                f"--override {text!r} does not read; for GGUF write REGEX:type=TYPE, on names like "
                f"blk.0.ffn_down.weight, with one of {', '.join(mixture.TYPES)}"
            )
        found.append((override.pattern, kind))
    return [*found, *((pattern, _SKIPPED) for pattern in wanted.skip)]


def _importance(
    file: str | None, names: Mapping[str, str], model: FloatModel, arch: Architecture
) -> tuple[dict[str, Tensor], list[str]]:
    """Return what an importance matrix says of each linear, and a warning where it leaves some out.

    names: ggml's, by the checkpoint's. Raises LlmqError for a file that was made from another model.
    """
    if file is None:
        return {}, []
    means = imatrix.read(file)
    rows = {n: _row(arch, n, means[ggml], file) for n, ggml in names.items() if ggml in means}
    found = {n.removesuffix(".weight"): row for n, row in rows.items() if not row.isnan().any()}
    if not found:
        raise LlmqError(f"{file} names no tensor of this model; it was made from another one")
    for name, mean in found.items():
        K = model.shapes[f"{name}.weight"][-1]
        if len(mean) != K:
            raise LlmqError(
                f"{file} has {len(mean)} channels for {name}, the model {K}; it was made from another model"
            )
    blocks = {f"{n}.weight" for n in model.linears}
    missing = [n for n in names if n in blocks and n.removesuffix(".weight") not in found]
    if not missing:
        return found, []
    return found, [f"{file} has nothing on {len(missing)} linears, e.g. {missing[0]}; their errors weigh equally"]


def _row(arch: Architecture, name: str, mean: Tensor, file: str) -> Tensor:
    """Return what an importance matrix says of a linear, `[K]`, its channels in the model's order.

    mean: of all experts `[E, K]`. Raises LlmqError where there are not as many, or not as many channels.
    """
    expert, columns = arch.expert(name), arch.columns(name)
    if mean.dim() != (1 if expert is None else 2) or (expert is not None and len(mean) != arch.experts):
        raise LlmqError(f"{file} has other experts for {name} than the model; it was made from another model")
    row = mean if expert is None else mean[expert]
    if columns is not None and len(row) == len(columns):
        row = torch.empty_like(row).index_copy_(0, columns, row)
    return row


def _grid(spec: LinearSpec) -> StoredGrid:
    """Return the grid of `spec`. Raises LlmqError for one that is no type of ggml."""
    return _stored(spec.name, spec.scheme)


def _stored(name: str, scheme: Scheme) -> StoredGrid:
    grid = scheme.weight
    if not isinstance(grid, StoredGrid):
        raise LlmqError(f"{name}: GGUF holds ggml's types, not {type(grid).__name__} grids; say --type Q4_K_M")
    return grid
