"""Which tensor of a checkpoint is which of a model, by transformers' own rules, and whether the two agree.

    stored                                           the model's name                     rule
    model.layers.0.mlp.up_proj.weight                the same
    layers.0.mlp.up_proj.weight                      model.layers.0.mlp.up_proj.weight    saved from the bare decoder
    embed_out.weight                                 lm_head.weight                       GPT-NeoX's head, since renamed
    lm_head.weight alone, tied                       model.embed_tokens.weight            one matrix under two names
    model.layers.0.self_attn.rotary_emb.inv_freq     none                                 once saved, now computed
    ...block_sparse_moe.experts.7.w1.weight          ...mlp.experts.7.gate_proj.weight    Mixtral's, since renamed
    ...block_sparse_moe.input_linear.weight          ...experts.0.gate_proj.weight, ...   one tensor of all experts

`settle` gives a source the model's names. It refuses what transformers would pass over with a warning: a tensor that is
missing or of another shape, one of a block or a linear that nothing would read, two tensors for one place.
Source: transformers 5.23, `core_model_loading.rename_source_key` (called here) and `PreTrainedModel.tie_weights`.

Not here: which files count (source.py), what packed tensors mean (formats, integrations/transformers.py).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from llmq.checkpoint.parts import Fused, Place
from llmq.checkpoint.source import Source
from llmq.errors import LlmqError

_OLD_BUFFERS = {"rotary_emb.inv_freq": r"rotary_emb\.inv_freq", "position_ids": r"(^|\.)position_ids$"}  # once saved

_NARROW = (  # a tensor's end, that of its scales, what both look like, and by which key of config.json they are known
    ("_blocks", "_scales", "MXFP4", 'a quantization_config ({"quant_method": "mxfp4"})'),
    (".weight", ".weight_scale_inv", "FP8", 'a quantization_config ({"quant_method": "fp8", ...})'),
    (".weight", ".weight_scale", "FP8 or integers", "the quantization_config of its writer"),
)


@dataclass(frozen=True)
class Match:
    """The tensors of a checkpoint by the model's names; the values are the checkpoint's own names.

    stored: tensors that the model has. beside: others of its modules (packed words and scales, or a mistake).
    unread: tensors of no module. carried: those of parts that transformers never builds (heads that predict further
    tokens). written: what of `stored` has another name when written, and that name.
    missing: tensors of the model that are not there. converted: those that transformers makes of several.
    parts: where those of `stored` that are parts of one tensor, that of all experts, lie in it.
    """

    stored: dict[str, str]
    beside: dict[str, str]
    unread: dict[str, str]
    carried: dict[str, str]
    written: dict[str, str]
    missing: list[str]
    converted: set[str]
    parts: dict[str, Place] = field(default_factory=dict)


def match(model: Any, names: Iterable[str]) -> Match:
    """Return which of `names` is which tensor of a blank model. Raises LlmqError where two are one and the same."""
    naming, tied = _Naming(model), getattr(model, "all_tied_weights_keys", {})
    computed, left_out = _computed(model), _left_out(model)
    stored: dict[str, str] = {}
    beside: dict[str, str] = {}
    unread: dict[str, str] = {}
    carried: dict[str, str] = {}
    converted: set[str] = set()
    parts: dict[str, Place] = {}
    written: dict[str, str] = {}
    for name in sorted(names):
        found, several = naming.of(name)
        module = found.rpartition(".")[0]
        if several:
            converted |= several
        elif found in naming.fused:
            for own, e, number in naming.fused[found].names():
                full = f"{module}.{own}"
                _put(stored, full, name, model)
                parts[full] = Place(found, naming.fused[found], e, number)
                written[full] = _of_expert(name, found, own)
        elif found in naming.wanted:
            _put(stored, found, name, model)
        elif computed.search(found):
            continue
        elif left_out.search(found):
            carried[name] = name
        else:
            _put(beside if module in naming.modules else unread, found, name, model)
    moved = {t: s for t, s in tied.items() if t in stored and s not in stored}
    whole = {parts[n].whole if n in parts else n: s for n, s in stored.items()}
    written |= {n: w for n, w in naming.runtimes(whole).items() if w != n}
    written |= {n: s for n, s in beside.items() if n.rpartition(".")[0] not in naming.near(s.rpartition(".")[0])}
    stored |= {source: stored.pop(target) for target, source in moved.items()}
    present = stored.keys() | converted
    tables = {f"{n.rpartition('.')[0]}.weight" for n in beside}  # of an embedding that is packed its head is made too
    missing = [n for n in naming.wanted if n not in present and tied.get(n) not in present | tables]
    return Match(stored, beside, unread, carried, written, missing, converted & naming.wanted.keys(), parts)


def _put(place: dict[str, str], found: str, name: str, model: Any) -> None:
    if place.setdefault(found, name) != name:
        raise LlmqError(f"tensors {place[found]} and {name} are one and the same in {type(model).__name__}")


def _of_expert(name: str, found: str, own: str) -> str:
    """Return what to call a part of the stored tensor `name`, that of all experts, which the model calls `found`."""
    experts, _, leaf = found.rpartition(".")
    return f"{name.removesuffix(leaf)}{own}" if name.endswith(f".experts.{leaf}") else f"{experts}.{own}"


class _Naming:
    """transformers' way from a checkpoint's names to a model's.

    wanted: the tensors that a checkpoint of this model holds, on meta, by the model's names. modules: names of modules.
    fused: the tensors that transformers' model has of all experts in place of ours of each (model/experts.py).
    """

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        rules = get_model_conversion_mapping(model)
        self.wanted: dict[str, torch.Tensor] = model.state_dict()
        self.modules = {n for n, _ in model.named_modules() if n}
        experts = [(n, m.fused) for n, m in model.named_modules() if hasattr(m, "fused")]
        self.fused: dict[str, Fused] = {f"{n}.{p}": fused for n, of in experts for p, fused in of.items()}
        self._known = {**self.wanted, **self.fused}
        self._prefix: str = model.base_model_prefix
        self._renamings = [r for r in rules if isinstance(r, WeightRenaming)]
        self._converters = [r for r in rules if isinstance(r, WeightConverter)]

    def of(self, name: str) -> tuple[str, set[str]]:
        """Return the model's name of a tensor; beside it the tensors that it is a part of, where it is only that.

        A tensor that the model does not have gets its module's name, which that module's weight tells, or its own name.
        One of all experts gets transformers' name.
        """
        found, several = self._renamed(name, self._renamings, self._converters)
        if found in self._known or several:
            return found, several
        if (plain := self.prefixed(name)) in self._known:
            return plain, set()
        parent, _, leaf = name.rpartition(".")
        weight, _ = self._renamed(f"{parent}.weight", self._renamings, self._converters if self.fused else [])
        owner = next((n for n in self.near(parent) if n in self.modules), "")
        if weight in self.wanted:
            owner = weight.removesuffix(".weight")
        return (f"{owner}.{leaf}" if owner else found), set()

    def near(self, module: str) -> tuple[str, str, str]:
        """Return a module's name as it is, and with the prefix of the model's base put on or taken off."""
        return module, f"{self._prefix}.{module}", module.removeprefix(f"{self._prefix}.")

    def prefixed(self, name: str) -> str:
        """Return a checkpoint's name with the prefix of the model's base put on or taken off, and nothing else done."""
        return self._renamed(name, [], [])[0]

    def runtimes(self, stored: Mapping[str, str]) -> dict[str, str]:
        """Return the names that runtimes look for: the checkpoint's, with the prefix where it is that of a decoder."""
        prefixed = {n: self.prefixed(s) for n, s in stored.items()}
        return prefixed if all(name in self._known for name in prefixed.values()) else dict(stored)

    def _renamed(self, name: str, renamings: list[Any], converters: list[Any]) -> tuple[str, set[str]]:
        """Return the name by these rules, and of what it is only a part; an expert's matrix is one of ours."""
        from transformers.core_model_loading import Transpose, rename_source_key

        found, pattern = rename_source_key(name, renamings, converters, self._prefix, self._known)
        rule = next((c for c in converters if pattern in c.source_patterns), None)
        fused = self.fused.get(found)
        if rule is None or (fused and all(isinstance(o, Transpose) for o in rule.operations)):
            return found, set()
        if fused and len(rule.source_patterns) == len(fused.projections) and "*" in str(pattern):
            e = [part for part in name.split(".") if part.isdecimal()][-1]
            projection = fused.projections[rule.source_patterns.index(pattern)]
            return f"{found.rpartition('.')[0]}.{e}.{projection}.{fused.leaf}", set()
        return found, {found.replace(rule.target_patterns[0], t) for t in rule.target_patterns}


def settle(source: Source, model: Any, *, converts: bool = False) -> None:
    """Give a source the names of the blank model of its config, and a warning where nothing reads some tensors.

    A packed checkpoint's linears are left to its format. converts: transformers will load the weights, which can make
    one tensor of several. Raises LlmqError for every tensor that is missing, misshapen, double or without a place.
    """
    found = match(model, source.names())
    _refuse_missing(source, found, converts=converts)
    _refuse_misshapen(source, model, found)
    unread = _unread(source, model, found)
    kept = found.stored | (found.beside if source.quantization else {}) | {n: n for n in unread} | found.carried
    old = source.unread
    source.rename(kept, found.written, [*unread, *found.carried])
    source.split(found.parts)
    if set(unread) - old:
        few = ", ".join(unread[:3]) + (f" and {len(unread) - 3} more" if len(unread) > 3 else "")
        source.warnings.append(f"{type(model).__name__} has no place for {few} of {source.path}: nothing reads them")


def own_head(source: Source, model: Any) -> bool:
    """Return whether a settled source has a head of its own though its config ties it to the embedding.

    transformers then takes both as they are. A head that equals the embedding is dropped: it is tied.
    """
    for head, embedding in getattr(model, "all_tied_weights_keys", {}).items():
        if head in source and embedding in source:
            if not torch.equal(source.get(head), source.get(embedding)):
                return True
            source.drop(head)
    return False


def _refuse_missing(source: Source, found: Match, *, converts: bool) -> None:
    packed = {n.rpartition(".")[0] for n in found.beside} if source.quantization else set()
    missing = [n for n in found.missing if n.rpartition(".")[0] not in packed]
    if not converts:
        missing += sorted(found.converted)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise LlmqError(
            f"tensor {missing[0]} is missing{more} from {source.path}; the checkpoint does not match its config.json"
            f"{_unsaid(source)}"
        )


def _unsaid(source: Source) -> str:
    """Return what the tensors of a checkpoint look like that says nothing of a quantization, "" for plain floats."""
    if source.quantization or source.decoded:
        return ""
    for end, beside, kind, said in _NARROW:
        for name in source.names():
            scales = f"{name.removesuffix(end)}{beside}"
            if name.endswith(end) and scales in source:
                return f"; {name} and {scales} look like {kind}, of which config.json must have {said}: copy it there"
    return ""


def _refuse_misshapen(source: Source, model: Any, found: Match) -> None:
    headers = source.headers()
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)} if source.quantization else set()
    for name, want in model.state_dict().items():
        if name not in found.stored or name.rpartition(".")[0] in linears:  # a packed one is its format's to check
            continue
        stored, part = found.stored[name], found.parts.get(name)
        got = headers[stored][1]
        if part is not None and part.fused.fits(got) is not None:
            continue
        if got != want.shape and headers[stored][0] == "U32":
            raise LlmqError(
                f"tensor {stored} of {source.path} is packed, as mlx-lm packs embeddings too; llmq keeps linears alone "
                "packed: decode it with llmq dequantize"
            )
        if got != want.shape:
            raise LlmqError(
                f"tensor {stored} is {list(got)}, but {source.path}/config.json asks for {list(want.shape)}"
            )


def _unread(source: Source, model: Any, found: Match) -> list[str]:
    """Return the tensors that nothing reads. Raises LlmqError for those of a block or of a module with weights."""
    base = f"{model.base_model_prefix}."
    lists = [f"{n}." for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    lists += [n.removeprefix(base) for n in lists]  # a block that the model does not have keeps its stored name
    loose: Mapping[str, str] = found.unread if source.quantization else found.unread | found.beside
    modules, unsaid = dict(model.named_modules()), _unsaid(source)
    for name, stored in loose.items():
        owner = modules.get(name.rpartition(".")[0])
        holds = owner is not None and any(True for _ in owner.parameters(recurse=False))
        if holds or name.startswith(tuple(lists)):
            raise LlmqError(
                f"tensor {stored} has no place in the model of {source.path}/config.json, which would be another one "
                f"without it; correct the config (its number of blocks, its biases), or take the tensor out{unsaid}"
            )
    return sorted(loose.values())


def _computed(model: Any) -> re.Pattern[str]:
    """Return what names the old buffers that this model computes: `PreTrainedModel` ignores them in every class."""
    buffers = [n for n, _ in model.named_buffers()]
    return _any_of(p for end, p in _OLD_BUFFERS.items() if any(n.endswith(end) for n in buffers))


def _left_out(model: Any) -> re.Pattern[str]:
    """Return what names the tensors of a checkpoint that this model, by its own word, leaves out."""
    return _any_of(model._keys_to_ignore_on_load_unexpected or ())


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(f"({p})" for p in patterns) or r"(?!)")
