"""What to do, as one frozen, serialisable value.

`Recipe` holds what a user writes, on the command line or in a YAML/JSON file with the same keys. An option that was not
given is None, so that one which means nothing beside the others can be refused whatever its default; `resolved` fills
in the defaults of those that do mean something.
Not here: what a value may be (options.py), the objects that a recipe names (method.py), running it (run.py).
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from llmq import blend, options, registry
from llmq.conditions import ACT, BITS, BUDGET, FLAGS, FOLDERS, GGUF, INPUTS, INTEGERS, KV, STATIC, option
from llmq.errors import printable
from llmq.granularity import granularity
from llmq.guard.reading import yaml_object
from llmq.options import Between
from llmq.overrides import parse
from llmq.qualities import FINISHERS, OF_GGUF, OF_W8A8, QUALITIES, VARIED_SHARE
from llmq.schemes import FLOAT, GGML, SCHEMES, bits_of, changes_of, type_of
from llmq.types import AffineGrid, LlmqError

DEFAULT_RANGE = "minmax"
CALIB, SAMPLES = "wikitext2", 128
UNCLIPPED = rf"\.(q|k)_proj$:range={DEFAULT_RANGE}"  # AWQ's paper clips neither; other models have both in one linear
_STEPS = 50


@dataclass(frozen=True)
class Recipe:
    """How to quantize a model. Every option that was not given is None, or empty where it is a list.

    quality: a method and a range by measurement, where no method is given.
    scheme: a name for weights and inputs (schemes.py), which becomes the options that it is short for as soon as it is
        said; those that say weights and inputs too are refused beside it, all others win over its own.
    method: comma-separated steps, each `name[:option=value...]`, in the order one rotation, one weighting,
        transforms, corrections, one solver, refiners, tuners, finishers.
    weights: the grid of a weight, `NAME[:option=value...]`; where it takes a range and names none, see `range`.
    bits, sym, group_size, range: short for the weights int:bits=4:sym=true:group=128:range=minmax, those the defaults.
        group_size: columns per scale, "channel" (the default for W8A8) or "tensor".
        range: which interval a grid covers (what the method prefers, else minmax).
    inputs: the grid of the linears' inputs, `NAME[:option=value...]`, which stay float without it. group=channel is a
        scale per token, a number of columns one for so many of a token, both found at run time; group=tensor is one
        scale for all, fixed by calibration, whose range may be chosen.
    act_bits, act, act_sym, act_range: short for the inputs int:bits=8:group=channel:sym=true; per "tensor" with a
        range, minmax where none is given.
    format: how the result is stored (gptq; compressed-tensors for small floats, inputs, kv_bits and target_bpw).
    kv_bits: 8 writes static scales of the key-value cache too, one per "tensor" or per "head" (`kv`), for entries of
        `kv_dtype`: "fp8", which runtimes read, or "int8".
    override: `REGEX:bits=8,group_size=32` or `REGEX:weights=fp8,inputs=fp8` on full module names, later ones win.
    skip: regexes of linears left float.
    on_misfit: linears whose shape the format cannot hold (no group divides K) are left float by "skip", else refused.
    target_bpw: bits per quantized weight, scales counted, to spend where they help most; --bit-choices lists the bits
        that a site may get.
    choices: schemes by name, grids or "float", as nvfp4,fp8,float: what `target_bpw` chooses from in place of bits of
        integers. What is not measured, such as the head, becomes the first. Of GGUF: types of ggml, as Q3_K,Q4_K,Q6_K;
        what is not measured is as `type` has it.
    lm_head: quantize the output head too.
    embeddings: bits of the embedding, 8, or its grid, int:bits=4:group=32; for GGUF a type of ggml. A head that is tied
        to it is it, and one of its own that lm_head does not ask for becomes the same.
    experts: which tokens calibrate an expert: those "routed" to it (the default), or "all", at the cost of running
        every expert on every token.
    type: for GGUF, which mixture of ggml's types; the head is quantized by the mixture, and overrides are
        `REGEX:type=Q6_K` on ggml's tensor names.
    imatrix: an importance matrix in llama.cpp's form to weigh errors by. imatrix_out: where to write the calibration's.
    split_max_size: `4G`: write a GGUF model in files of at most so many bytes of tensors.
    calib: "self", "varied", a file, a folder or a dataset, or several (blend.py); samples x seq_len tokens chosen by
        `seed`.
    varied: the share of these samples that become "varied" instead, short texts of ours in many languages and kinds:
        what is solved then travels to text that calib does not hold. By quality (qualities.py), 0 with a method.
    dtype: what activations are computed in.
    """

    quality: Literal["fast", "balanced", "best"] | None = option()
    scheme: str | None = option()
    method: str = option()
    weights: str | None = option(None, INTEGERS)
    bits: Annotated[int, Between(2, 8)] = option(4, INTEGERS, FLAGS)
    group_size: int | str = option(None, INTEGERS, FLAGS)
    sym: bool = option(True, INTEGERS, FLAGS)
    range: str | None = option(None, INTEGERS, FLAGS)
    inputs: str | None = option(None, INTEGERS)
    act_bits: Literal[8] | None = option(None, INTEGERS, INPUTS)
    act: Literal["token", "tensor"] = option("token", ACT)
    act_sym: bool = option(True, ACT)
    act_range: str = option("minmax", STATIC)
    kv_bits: Literal[8] | None = option(None, INTEGERS)
    kv: Literal["tensor", "head"] = option("tensor", KV)
    kv_dtype: Literal["fp8", "int8"] = option("fp8", KV)
    format: str = option()
    override: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    on_misfit: Literal["refuse", "skip"] | None = option(None, FOLDERS)
    target_bpw: Annotated[float, Between(1, 16)] | None = option()
    bit_choices: str | None = option("3,4,5,6,8", BITS)
    choices: str | None = option(None, BUDGET)
    lm_head: bool = option(False, INTEGERS)
    embeddings: int | str = option()
    experts: Literal["routed", "all"] | None = option()
    calib: str | tuple[str, ...] = option(CALIB)
    varied: Annotated[float, Between(0, 0.9)] | None = option()
    samples: Annotated[int, Between(1, 2**20)] = option(SAMPLES)
    seq_len: Annotated[int, Between(2, 2**20)] = option(2048)
    seed: Annotated[int, Between(0, 2**63 - 1)] = option(0)
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto")
    type: str = option("Q4_K_M", GGUF)
    imatrix: str | None = option(None, GGUF)
    imatrix_out: str | None = option(None, GGUF)
    split_max_size: str | None = option(None, GGUF)

    def __post_init__(self) -> None:
        for name, value in self._given():
            options.check(_dashed(name), value, KINDS[name])
        if self.scheme is not None:
            self._expand(self.scheme)
        if self.gguf:
            self._take_type()
        for name in ("override", "skip"):
            object.__setattr__(self, name, tuple(getattr(self, name) or ()))
        object.__setattr__(self, "calib", blend.checked(self.calib, self.samples))
        if self.kv_bits and self.gguf:
            raise LlmqError("format gguf holds no scales of a key-value cache; use --format compressed-tensors")
        for f in dataclasses.fields(self):
            for when in f.metadata.get("when", ()):
                if getattr(self, f.name) is not None and not when.true(self):
                    raise LlmqError(f"{_dashed(f.name)} means nothing here: {when.remedy}")
        self._check_pairs()

    def _take_type(self) -> None:
        """Put the type of `gguf:Q4_K_M` or `gguf:type=Q4_K_M` in its place. Raises LlmqError for two that disagree."""
        types, rest = registry.taken(self.format, "type")
        if len({t.upper() for t in (*types, self.type) if t}) > 1:
            raise LlmqError(f"--format {self.format} and --type {self.type} disagree; give one of them")
        if types:
            object.__setattr__(self, "type", types[0])
            object.__setattr__(self, "format", rest)

    def _expand(self, scheme: str) -> None:
        """Put what a scheme is short for in its place."""
        if scheme not in SCHEMES:
            raise LlmqError(f"--scheme {printable(repr(scheme), 80)} is none of: {', '.join(SCHEMES)}")
        if self.gguf:
            raise LlmqError(f"--scheme means nothing here: {INTEGERS.remedy}")
        for name in ("weights", "inputs", "bits", "act_bits"):
            if getattr(self, name) is not None:
                raise LlmqError(f"--scheme {scheme} says what weights and inputs become; leave {_dashed(name)} out")
        for name, value in SCHEMES[scheme].options.items():
            if name == "override":
                object.__setattr__(self, name, (*value, *(self.override or ())))
            elif getattr(self, name) is None:
                object.__setattr__(self, name, value)
        object.__setattr__(self, "scheme", None)

    def _check_pairs(self) -> None:
        """Refuse options that do not go with one another."""
        if self.quality is not None and self.method is not None:
            raise LlmqError("quality names a method by what it costs; give --quality or --method, not both")
        if self.varied is not None and blend.VARIED in blend.parted(self.calib):
            raise LlmqError("--calib names varied, with its weight or without; leave --varied out")
        if self.act_sym is False and self.act == "tensor":
            raise LlmqError("asymmetric activations (--act-asym) are for --act-bits 8 per token")
        if self.target_bpw is not None and self.quantizes_inputs and not self.choices:
            raise LlmqError("target_bpw chooses bits of weights; beside quantized inputs they have no others")
        for text in self.override if self.target_bpw is not None else ():
            if (said := parse(text)) and not {"bits", "weights", "inputs", "type"}.isdisjoint(said.changes):
                raise LlmqError(f"--override {text!r}: --target-bpw chooses the bits of every linear; --skip it there")
        if self._integer_inputs and self.bits != 8 and not self.weights:
            raise LlmqError(f"8-bit activations need 8-bit weights, not {self.bits or 4}; say --bits 8")
        if len(self.steps) > _STEPS:
            raise LlmqError(f"--method has {len(self.steps):,} steps; {_STEPS} are more than enough")
        self.candidates()
        if self.group_size is not None:
            granularity(self.group_size)

    def _given(self) -> Iterator[tuple[str, Any]]:
        """Yield the options that were given with their values."""
        yield from ((name, value) for name, value in vars(self).items() if value is not None and value != ())

    @property
    def gguf(self) -> bool:
        """Whether the result is a GGUF file."""
        return (self.format or "").partition(":")[0] == "gguf"

    @property
    def quantizes_inputs(self) -> bool:
        """Whether the linears' inputs are quantized too."""
        return bool(self.act_bits or self.inputs)

    @property
    def _integer_inputs(self) -> bool:
        return bool(self.act_bits) or (self.inputs or "").partition(":")[0].strip() == "int"

    @property
    def steps(self) -> list[str]:
        """The steps of the method as they are written, each `name[:option=value...]`."""
        return self.method.split(",") if self.method else []

    @classmethod
    def load(cls, file: Path | None, given: Mapping[str, Any], *, allow_code: bool = False) -> Recipe:
        """Return the recipe of a YAML or JSON file with the `given` options laid over it.

        allow_code: the file may name third-party modules, which are imported; else only `given` may.
        Raises LlmqError for an unreadable file or a key that no option has.
        """
        values: dict[str, Any] = {}
        for key, value in (yaml_object(file.expanduser()) if file else {}).items():
            if (name := key.replace("-", "_")) in values:
                raise LlmqError(f"recipe {file}: {name} is given twice")
            values[name] = value
        of_file = values.keys() - given.keys()
        values |= given
        if unknown := [key for key in values if key not in KINDS]:
            raise LlmqError(f"recipe {file}: no option {unknown[0]!r} (options: {', '.join(KINDS)})")
        for key in ("override", "skip"):  # a single one need not be a list
            if isinstance(values.get(key), str):
                values[key] = (values[key],)
        recipe = cls(**values)
        for key, text in recipe._names():
            if key in of_file and registry.is_code(text) and not allow_code:
                raise LlmqError(
                    f"recipe {file}: {key} names code outside llmq ({text.partition(':')[0]}), which would "
                    "be run; where you trust it say --allow-code, or name it on the command line"
                )
        return recipe

    def _names(self) -> Iterator[tuple[str, str]]:
        """Yield whatever the recipe names to be looked up, `NAME[:key=value...]`, with the option that names it."""
        yield from (("method", step.strip()) for step in self.steps)
        yield from ((key, text.strip()) for key in ("range", "act_range", "format") if (text := getattr(self, key)))
        for key, text in (("weights", self.weights), ("inputs", self.inputs), ("embeddings", self.embedding_grid)):
            yield from ((key, name) for name in _of_grid(text))
        for word in self.choices.split(",") if self.choices else ():
            yield from (("choices", name) for name in _of_grid(word.strip()))
        for override in self.override:
            values = said.changes.items() if (said := parse(override)) else ()  # a number names nothing, dot or not
            names = (name for _, v in values if v.lstrip("[")[:1].isalpha() for name in _of_grid(v))
            yield from (("override", name) for name in names)

    def resolved(self) -> Recipe:
        """Return the recipe with a default for every option that means something and was not given."""
        if self.varied is not None and self.method is not None:
            return self._varied(self.varied).resolved()
        if self.gguf and self.target_bpw and not self.choices:
            return dataclasses.replace(self, choices=GGML).resolved()
        if self.choices and not (self.gguf or self.weights or self.bits or self.quantizes_inputs):
            return self._based().resolved()
        if self.method is None:
            return self._of_quality().resolved()
        recipe = self
        for f in dataclasses.fields(self):
            default, meant = f.metadata.get("default"), all(w.true(recipe) for w in f.metadata.get("when", ()))
            if default is not None and getattr(recipe, f.name) is None and meant:
                recipe = dataclasses.replace(recipe, **{f.name: default})
        return recipe if recipe.gguf else recipe._solved()

    def _solved(self) -> Recipe:
        """Return the recipe with the defaults that depend on its method and its other options."""
        steps = [registry.load("algorithms", s, code=True) for s in self.steps]
        preferred = next((s.preferred_range for s in steps if getattr(s, "preferred_range", None)), None)
        override = self.override
        if preferred and self._lacks_range():
            override = (UNCLIPPED, *override)
        recipe = self._ranged(preferred or DEFAULT_RANGE)
        if not self.weights:
            group_size = self.group_size or ("channel" if self._integer_inputs else 128)
            recipe = dataclasses.replace(recipe, group_size=group_size)
        form = self.format or ("gptq" if self._of_integers_alone() else "compressed-tensors")
        return dataclasses.replace(recipe, format=form, override=override)

    def _of_integers_alone(self) -> bool:
        """Say whether nothing but weights is quantized, all of them to as many bits of integers."""
        more = self.quantizes_inputs or self.kv_bits or self.target_bpw or self.embeddings
        return not more and (not self.weights or issubclass(_kind(self.weights), AffineGrid))

    def candidates(self) -> tuple[str, ...]:
        """Return what a site may become under `target_bpw`: what an override would change, FLOAT for none of it."""
        if self.choices:
            of = type_of if self.gguf else changes_of
            return tuple(dict.fromkeys(of(word.strip()) for word in self.choices.split(",")))
        return () if self.bit_choices is None else bits_of(self.bit_choices)

    def _based(self) -> Recipe:
        """Return the recipe with the first of its choices for what is not chosen, such as the head."""
        first = next((c for c in self.candidates() if c != FLOAT), None)
        if first is None:
            raise LlmqError(f"--choices {self.choices!r} leaves everything float; name a scheme")
        weights, inputs = (part.partition("=")[2] for part in first.split(","))
        return dataclasses.replace(self, weights=weights, inputs=None if inputs == "none" else inputs)

    def _of_quality(self) -> Recipe:
        """Return the recipe with the method that its quality stands for, in the words that repeat it."""
        quality = self.quality or "balanced"
        methods = OF_GGUF if self.gguf else OF_W8A8 if self._integer_inputs else QUALITIES
        method, recipe = methods[quality], self if self.gguf else self._ranged("mse")
        if quality == "best" and not self.gguf:
            bits = registry.load("grids", self.weights, code=True).bits if self.weights else self.bits
            method += FINISHERS.get(bits, "")
        share = self._share() if self.varied is None else self.varied
        return dataclasses.replace(recipe, quality=None, method=method)._varied(share)

    def _share(self) -> float:
        """Return how much of the calibration a quality varies: nothing where that would be less than a sample."""
        enough = VARIED_SHARE * (self.samples or SAMPLES) >= 1
        return VARIED_SHARE if enough else 0.0

    def _varied(self, share: float) -> Recipe:
        """Return the recipe with so much of its calibration varied, in the words that repeat it."""
        calib = blend.sharing(self.calib or CALIB, share) if share else self.calib
        return dataclasses.replace(self, calib=calib, varied=None)

    def _lacks_range(self) -> bool:
        """Say whether the weights take a range that was not given."""
        return registry.lacks("grids", self.weights, "range") if self.weights else self.range is None

    def _ranged(self, range_: str) -> Recipe:
        """Return the recipe with a range for its weights where they take one that was not given."""
        if not self._lacks_range():
            return self
        if self.weights:
            return dataclasses.replace(self, weights=f"{self.weights}:range=[{range_}]")
        return dataclasses.replace(self, range=range_)

    @property
    def grid(self) -> str | None:
        """The grid of a weight, as `NAME[:option=value...]`, in a recipe that is resolved; None for GGUF."""
        if self.weights or self.gguf:
            return self.weights
        restricted = bool(self._integer_inputs and self.sym)
        said = f"bits={self.bits}:sym={self.sym}:group={self.group_size}:restricted={restricted}"
        return f"int:{said}:range=[{self.range}]"

    @property
    def embedding_grid(self) -> str | None:
        """The grid of the embedding, as `NAME[:option=value...]`; None for GGUF, and where it stays float."""
        if self.embeddings is None or self.gguf:
            return None
        said = str(self.embeddings)
        return f"int:bits={said}:group=channel:range=[mse]" if said.isdecimal() else said

    @property
    def input_grid(self) -> str | None:
        """The grid of the linears' inputs, as `NAME[:option=value...]`, in a resolved recipe; None for float ones."""
        if not self.act_bits:
            return self.inputs
        group = "channel" if self.act == "token" else "tensor"
        range_ = f":range=[{self.act_range}]" if self.act_range else ""
        return f"int:bits=8:sym={self.act_sym}:group={group}{range_}"

    def to_json(self) -> dict[str, Any]:
        """Return every option, null where it means nothing; a few stand there only where they were given."""
        values = json.loads(json.dumps(dataclasses.asdict(self)))
        seldom = {"scheme", "choices", "weights", "inputs", "on_misfit", "experts", "embeddings", "varied"}
        return {k: v for k, v in values.items() if k not in seldom or v is not None}

    def to_yaml(self) -> str:
        """Return the options that were given as YAML that `load` reads back equal."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in self._given()}
        return yaml.safe_dump(values, sort_keys=False)


KINDS = typing.get_type_hints(Recipe, include_extras=True)
"""What each option takes, as annotated."""


def _kind(text: str) -> type:
    """Return the class of the grid that a text names."""
    return registry.find("grids", registry.words(text)[0], code=True)


def _of_grid(text: str | None) -> Iterator[str]:
    """Yield what the text of a grid names: the grid and its range."""
    if text:
        name, *given = registry.words(text)
        yield name
        yield from (g.partition("=")[2].strip(" []") for g in given if g.strip().startswith("range"))


def _dashed(name: str) -> str:
    return "--" + name.replace("_", "-")
