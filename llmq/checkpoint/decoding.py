"""A quantized checkpoint as the float one that it stands for: each weight is decoded when it is read.

    source = Source(folder)      model.layers.0.mlp.up_proj.weight            F8_E4M3 [96, 64]
                                 model.layers.0.mlp.up_proj.weight_scale_inv  F32 [1, 1]
    as_floats(source)               model.layers.0.mlp.up_proj.weight            BF16 [96, 64]

    what lies there                                               written by
    T F8, T_scale_inv or T_scale                                  DeepSeek, Qwen, Mistral (`fp8`), fbgemm_fp8, modelopt,
                                                                  compressed-tensors: FP8, MXFP8
    M.weight_packed U8, M.weight_scale[, M.weight_global_scale]   compressed-tensors: MXFP4, NVFP4
    M.weight U8, M.weight_scale, M.weight_scale_2                 modelopt: NVFP4
    M.weight I8, M.weight_scale_inv, in an `fp8` checkpoint       DeepSeek's experts of 4 bits: MXFP4
    T_blocks U8 [E, N, K/32, 16], T_scales U8 [E, N, K/32]        gpt-oss: MXFP4; T is read as [E, K, N]
    M.qweight, M.weight_packed I32, M.weight I8, their scales     GPTQ, AWQ, compressed-tensors: integers
    M.weight U32, M.scales                                        MLX: integers, MXFP4, MXFP8, NVFP4

It goes by the checkpoint's own names, before any model is made of its config. All that can be told from headers is
checked then: parts that are missing, of another dtype or shape, or of no weight are refused by name. Scales of
activations and of a key-value cache are left out, with a word.
Not here: the arithmetic of narrow floats (scaled.py) and of integers (formats/), a quantized checkpoint that stays
packed (packed.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from llmq.checkpoint.dialects import METHODS, WHERE, known
from llmq.checkpoint.packed import Packing
from llmq.checkpoint.scaled import Block, Scaled, block_of
from llmq.checkpoint.source import Source
from llmq.checkpoint.stored import checked
from llmq.errors import LlmqError, printable
from llmq.format import Format
from llmq.guard.reading import DTYPES, Entry
from llmq.types import LinearSpec, Scheme

FLOATS = ("fp8", "fbgemm_fp8", "mxfp4", "modelopt", "compressed-tensors")
"""The `quant_method`s whose weights are narrow floats, or may be."""
DECODED = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
"""What a weight may be decoded to, by name."""
_SPELLED = {dtype: spelled for spelled, dtype in DTYPES.items()}
_FP8, _FLOAT, _EXPONENT = ("F8_E4M3", "F8_E5M2"), ("F32", "BF16", "F16"), ("U8", "F8_E8M0")
_LEFT_OUT = (
    "input_scale", "input_global_scale", "input_zero_point", "input_scale_ub", "activation_scale", "output_scale",
    "output_zero_point", "k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point",
)  # fmt: skip
_PARTS = {
    "weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale", "weight_zero_point",
    "weight_shape", "weight_g_idx", "qweight", "qzeros", "scales", "g_idx",
}  # fmt: skip
_BROKEN = "the checkpoint is incomplete, or its config is not its own; download it again"


@dataclass(frozen=True)
class Integers:
    """Codes, scales and zeros as a format of llmq unpacks them."""

    format: Format
    linear: LinearSpec

    def __str__(self) -> str:
        """Return bits and format."""
        kind = "floats" if (self.linear.scheme.weight.args() or {}).get("type") == "float" else "integers"
        return f"{kind} of {self.linear.scheme.weight.bits} bits ({self.format.quant_method})"

    def decode(self, parts: tuple[Entry, ...], tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the weight. Raises LlmqError, naming the part, for values that no weight can have."""
        named = {part.name.rpartition(".")[2]: t for part, t in zip(parts, tensors, strict=True)}
        return self.format.unpack(named, self.linear).dequantize().to(dtype)


@dataclass(frozen=True)
class Decoded(Entry):
    """A weight that is decoded from its parts, the codes first, when it is read. file, start: where the codes lie."""

    parts: tuple[Entry, ...]
    how: Scaled | Integers

    def read(self) -> Tensor:
        """Return the weight. Raises LlmqError as `Entry.read`, and for values that no weight can have."""
        return self.how.decode(self.parts, [p.read() for p in self.parts], DTYPES[self.dtype])

    def read_slice(self, i: int) -> Tensor:
        """Return matrix `i` of many; the others are not decoded."""
        if not isinstance(self.how, Scaled) or len(self.shape) < 3:
            return self.read()[i]
        how, many = replace(self.how, shape=self.how.shape[1:]), self.shape[0]
        tensors = [p.read_slice(i) if p.shape[:1] == (many,) else p.read() for p in self.parts]
        return how.decode(self.parts, tensors, DTYPES[self.dtype])


def narrow(config: Mapping[str, Any] | None) -> bool:
    """Say whether a `quantization_config` is one of narrow floats."""
    if config is None or config.get("quant_method") not in FLOATS:
        return False
    of_groups = (_weights(group).get("type") for group in _groups(config).values())
    return config["quant_method"] != "compressed-tensors" or "float" in of_groups


def decoded_on_load(config: Mapping[str, Any] | None) -> bool:
    """Say whether a `quantization_config` is one of narrow floats that no format of llmq computes with as they are."""
    if config is None or not narrow(config):
        return False
    try:
        Packing(config)
    except LlmqError:  # the decoder knows more of them, and says why where it does not
        return True
    return False


def as_floats(source: Source, dtype: torch.dtype | None = None) -> list[str]:
    """Make a source, before it is settled, the float one that its packed weights stand for; a float one stays as it is.

    dtype: of what is decoded, a value of `DECODED`; None takes what config.json says of the model, else bfloat16.
    The source says what was done in `decoded`, and its config no longer says that it is quantized. Returns what a user
    should know of it.
    Raises LlmqError, naming the tensor or the key, for what llmq does not decode and for parts that are not there.
    """
    config = source.quantization
    if config is None:
        return []
    method = str(config.get("quant_method"))
    if method not in (*FLOATS, *METHODS):
        raise LlmqError(
            f"{source.path} is quantized already ({printable(method, 80)}), which llmq does not decode (it decodes "
            f"{', '.join(dict.fromkeys((*FLOATS, *METHODS)))}); give the float checkpoint that it was made from"
        )
    _refuse_more(config)
    to = _dtype(source) if dtype is None else dtype
    entries = _Checkpoint(source, config, to).floats()
    kinds = Counter(str(e.how) for e in entries.values() if isinstance(e, Decoded))
    if not kinds:
        raise LlmqError(
            f"{source.path}/config.json says that weights are quantized ({method}), but none is packed; take "
            f"{WHERE} out of it if they are float"
        )
    left = [n for n in source.names() if n.endswith(_LEFT_OUT) and n not in entries]
    as_ = str(to).removeprefix("torch.")
    said = {"quant_method": method, "dtype": as_, "weights": dict(kinds), "scales_left_out": len(left)}
    source.become(entries, said)
    return list(_told(source, kinds, as_, left))


def _refuse_more(config: Mapping[str, Any]) -> None:
    """Refuse what was done to weights beside rounding them: a decoded one would be another than the model's."""
    sparsity = config.get("sparsity_config")
    dense = not sparsity or (isinstance(sparsity, dict) and (sparsity.get("format") or "dense") == "dense")
    if not dense or config.get("transform_config"):
        key = "transform_config" if dense else "sparsity_config"
        raise LlmqError(f"{WHERE}.{key} is set, which llmq does not undo; give the float checkpoint")


def _told(source: Source, kinds: Counter[str], dtype: str, left: list[str]) -> Iterator[str]:
    held = ", ".join(f"{n} weights as {kind}" for kind, n in kinds.most_common(3))
    held += f" and {len(kinds) - 3} more kinds" if len(kinds) > 3 else ""
    said = f"{source.path} holds {held}: they are decoded to {dtype} as they are read"
    yield said
    if left:
        kept = "scales of activations or of a key-value cache"
        yield f"{len(left)} {kept} of {source.path} are left out, e.g. {left[0]}: they belong to its own format"


def rounded_twice(source: Source) -> list[str]:
    """Return what to say where integers of a decoded source are going to be rounded to integers again."""
    kinds = (source.decoded or {}).get("weights", {})
    integers = [kind for kind in kinds if kind.startswith("integers")]
    if not integers:
        return []
    return [
        f"{source.path} holds {integers[0]}: rounding what was rounded adds a second error to the first; give the "
        "float model that it was made from where there is one (llmq export writes its codes as GGUF as they are)"
    ]


def _dtype(source: Source) -> torch.dtype:
    """Return the dtype that config.json gives the model, bfloat16 where it names none that a weight is decoded to."""
    text = source.config.get("text_config")
    for said in (source.config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if (name := str(said.get(key)).removeprefix("torch.")) in DECODED:
                return DECODED[name]
    return torch.bfloat16


class _Checkpoint:
    """The tensors of a quantized checkpoint, put together."""

    def __init__(self, source: Source, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.path, self.config, self.dtype = source.path, config, dtype
        self.stored = source.entries()
        self.blocks = list(_blocks(config))
        self.taken: set[str] = set()  # what is part of a weight

    def floats(self) -> dict[str, Entry]:
        """Return the float tensors by name, in the order of the file. Raises LlmqError."""
        made = {name: weight for name, entry in self.stored.items() if (weight := self._weight(name, entry))}
        modules = {weight.name.rpartition(".")[0] for weight in made.values()}
        modules |= {module.rpartition(".")[0] for module in modules}
        found: dict[str, Entry] = {}
        for name, entry in self.stored.items():
            module, _, leaf = name.rpartition(".")
            if name not in made and (name in self.taken or (module in modules and leaf.endswith(_LEFT_OUT))):
                continue
            tensor = made.get(name, entry)
            if tensor is entry and (leaf in _PARTS or entry.dtype in _FP8):
                raise LlmqError(f"{name} ({entry.dtype}) is part of no weight that llmq decodes: {_BROKEN}")
            if found.setdefault(tensor.name, tensor) is not tensor:
                raise LlmqError(f"{self.path} holds {tensor.name} in two forms; keep one")
        return found

    def _weight(self, name: str, entry: Entry) -> Decoded | None:
        """Return the weight whose codes a tensor holds, None for one that holds none."""
        module, _, leaf = name.rpartition(".")
        kind = entry.dtype
        if name.endswith("_blocks") and kind == "U8":
            return self._gpt_oss(name.removesuffix("_blocks"), entry)
        if leaf == "weight_packed" and kind == "U8":
            return self._fp4(f"{module}.weight", entry, f"{module}.weight_global_scale", "divides")
        if leaf == "weight" and (kind == "U8" or (kind == "I8" and self.config.get("quant_method") == "fp8")):
            return self._fp4(name, entry, f"{name}_scale_2", "multiplies")
        if leaf in ("qweight", "weight_packed") or (leaf == "weight" and kind in ("I8", "U32")):
            return self._integers(module)
        if kind in _FP8 and not leaf.endswith(("_scale", "_scale_inv")):
            return self._fp8(name, entry)
        return None

    def _gpt_oss(self, name: str, blocks: Entry) -> Decoded:
        scales = self._part(f"{name}_scales", name, _EXPONENT)
        if len(blocks.shape) != 4 or blocks.shape[3] != 16 or blocks.shape[:3] != scales.shape or 0 in blocks.shape:
            raise LlmqError(
                f"{blocks.name} is {list(blocks.shape)} and {scales.name} {list(scales.shape)}, not [E, N, K/32, 16] "
                f"and [E, N, K/32]: {_BROKEN}"
            )
        E, N, G = scales.shape
        return self._made(name, Scaled("MXFP4", (E, N, 32 * G), (1, 32), transposed=True), blocks, scales)

    def _fp4(self, name: str, codes: Entry, whole: str, does: Literal["divides", "multiplies"]) -> Decoded:
        shape = (*codes.shape[:-1], 2 * codes.shape[-1]) if codes.shape else ()
        there = self.stored.get(f"{name}_scale")
        if whole in self.stored or (there is not None and there.dtype in _FP8):
            scale = self._part(f"{name}_scale", name, (*_FP8, *_FLOAT))
            block = self._block(codes, shape, scale, (1, 16))
            return self._made(name, Scaled("NVFP4", shape, block, does), codes, scale, self._single(whole, name))
        scale = self._scale(name)
        return self._made(name, Scaled("MXFP4", shape, self._block(codes, shape, scale, (1, 32))), codes, scale)

    def _scale(self, name: str) -> Entry:
        """Return the scales of a weight, under either of their names. Raises LlmqError where there are none, or two."""
        inverse, plain = f"{name}_scale_inv", f"{name}_scale"
        if inverse in self.stored and plain in self.stored:
            raise LlmqError(f"{name} has two scales, {inverse} and {plain}; take one out")
        return self._part(plain if plain in self.stored else inverse, name, (*_FLOAT, *_EXPONENT))

    def _fp8(self, name: str, codes: Entry) -> Decoded:
        scale = self._scale(name)
        micro = scale.dtype in _EXPONENT
        block = self._block(codes, codes.shape, scale, *([(1, 32)] if micro else []))
        kind = "MXFP8" if micro and block == (1, 32) else "FP8"
        return self._made(name, Scaled(kind, codes.shape, block), codes, scale)

    def _integers(self, module: str) -> Decoded:
        """Return a linear of integers, by the rules of its format, its shape told by its words."""
        there = {name.rpartition(".")[2]: self.stored[name] for name in self._modules[module]}
        scheme = self._packing.scheme(module)
        if scheme is None:
            raise LlmqError(f"{module} is packed, but {WHERE} leaves it float: {_BROKEN}")
        N, K = _measured(there, scheme, self._packing.format.quant_method)
        linear, form = LinearSpec(module, N, K, scheme), self._packing.format
        metas = {local: entry.meta() for local, entry in there.items()}
        parts = [there[local] for local in checked(metas, form.layout(linear), linear, form.derived)]
        return self._made(f"{module}.weight", Integers(form, linear), *parts)

    @cached_property
    def _packing(self) -> Packing:
        """What the config says of integers; groups of narrow floats are not asked for any."""
        config, groups = known(self.config), _groups(self.config)
        kept = {n: g for n, g in groups.items() if _weights(g).get("type") != "float"}
        return Packing({**config, "config_groups": kept} if groups else config)

    @cached_property
    def _modules(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.stored:
            found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    def _made(self, name: str, how: Scaled | Integers, *parts: Entry) -> Decoded:
        self.taken |= {p.name for p in parts}
        if isinstance(how, Integers):
            shape: tuple[int, ...] = (how.linear.N, how.linear.K)
        else:
            *many, N, K = how.shape
            shape = (*many, K, N) if how.transposed else how.shape
        size = prod(shape) * self.dtype.itemsize
        return Decoded(parts[0].file, name, _SPELLED[self.dtype], shape, parts[0].start, size, parts, how)

    def _part(self, name: str, weight: str, dtypes: Collection[str]) -> Entry:
        """Return a part of a weight. Raises LlmqError where it is missing or of another dtype."""
        if name not in self.stored:
            raise LlmqError(f"{name} is missing from {self.path}, the scales of {weight}: {_BROKEN}")
        if self.stored[name].dtype not in dtypes:
            raise LlmqError(f"{name} is {self.stored[name].dtype}, not {', '.join(dtypes)}: {_BROKEN}")
        return self.stored[name]

    def _single(self, name: str, weight: str) -> Entry:
        entry = self._part(name, weight, _FLOAT)
        if prod(entry.shape) != 1:
            raise LlmqError(f"{name} is {list(entry.shape)}, not [1]: {_BROKEN}")
        return entry

    def _block(self, codes: Entry, shape: tuple[int, ...], scale: Entry, *own: Block) -> Block:
        """Return what shares a scale. own: what the format itself says. Raises LlmqError where nothing fits."""
        if len(shape) < 2 or 0 in shape:
            raise LlmqError(f"{codes.name} is {list(codes.shape)}, no matrix: {_BROKEN}")
        blocks = [*own, *self.blocks]
        block = block_of(scale.shape, shape, blocks)
        if block is None:
            known_to = ", ".join(f"{n} x {k}" for n, k in dict.fromkeys(blocks)) or "none"
            raise LlmqError(
                f"{scale.name} is {list(scale.shape)}: no scale per row, per matrix or per block ({known_to}) of "
                f"{codes.name}, {list(codes.shape)}: {_BROKEN}"
            )
        return block


def _groups(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config groups of compressed-tensors, empty where there are none."""
    found = config.get("config_groups")
    return found if isinstance(found, dict) else {}


def _weights(group: object) -> Mapping[str, Any]:
    """Return the arguments of the weights of a config group, empty where there are none."""
    found = group.get("weights") if isinstance(group, dict) else None
    return found if isinstance(found, dict) else {}


def _blocks(config: Mapping[str, Any]) -> Iterator[Block]:
    """Yield the blocks of values that a config gives a scale each. Raises LlmqError for what is no block."""
    said = [_weights(group) for group in _groups(config).values()]
    if config.get("quant_method") == "fp8":
        said.append({"block_structure": config.get("weight_block_size", [128, 128])})
    for args in (*said, config):
        size, block = args.get("group_size"), args.get("block_structure")
        if type(size) is int and size > 0:
            yield 1, size
        if block is None:
            continue
        if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
            raise LlmqError(f"{WHERE}: a block of weights is {printable(repr(block), 80)}, not two sizes; correct it")
        yield block[0], block[1]


def _measured(there: Mapping[str, Entry], scheme: Scheme, method: str) -> tuple[int, int]:
    """Return N and K of a packed linear; its format checks the rest against them. Raises LlmqError for no matrix."""
    bits = scheme.weight.bits
    words = next(there[local] for local in ("qweight", "weight_packed", "weight") if local in there)
    if len(words.shape) != 2 or 0 in words.shape:
        raise LlmqError(f"{words.name} is {list(words.shape)}, no matrix: {_BROKEN}")
    rows, columns = words.shape
    if method == "awq":
        return columns * 32 // bits, rows
    if method == "mlx":
        return rows, columns * 32 // bits
    if "qweight" in there:
        return columns, rows * 32 // bits
    if "weight" in there and "weight_packed" not in there:
        return rows, columns
    G = there["weight_scale"].shape[1:] if "weight_scale" in there else ()
    size = (scheme.weight.args() or {}).get("group_size")
    if G and isinstance(size, int) and size > 0:
        return rows, G[0] * size
    shape = there["weight_shape"].read().tolist() if "weight_shape" in there else []
    return rows, shape[1] if len(shape) == 2 else columns * 32 // bits
