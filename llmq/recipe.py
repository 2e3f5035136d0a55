"""What to do, as one frozen, serialisable value.

`Recipe` holds what a user writes, on the command line or in a YAML/JSON file with the same keys. `Plan` is the recipe
with its objects made: the steps, a format, and the scheme of every linear by name.
Not here: running it (quantize.py).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from llmq import spec
from llmq.grids.int import Int
from llmq.types import (
    ActivationGrid,
    Correction,
    Finisher,
    Format,
    LlmqError,
    Refiner,
    Rotation,
    Scheme,
    Solver,
    Transform,
    Tuner,
    Weighting,
)

STRATEGIES = {"tensor": "tensor", "head": "attn_head"}
"""What a recipe calls a strategy of key-value scales, and what compressed-tensors does."""
_OVERRIDE = re.compile(r"^(?P<regex>.+?):(?P<options>(?:bits|group_size|group-size|sym|range)=.*)$")


@dataclass(frozen=True)
class Recipe:
    """How to quantize a model. Defaults that depend on other fields are None here and filled in by `resolved`.

    quality: "fast", "balanced" or "best": a method and a range by measurement, where no method is given.
    method: comma-separated steps, each `name[:option=value...]`, in the order one rotation, one weighting,
        transforms, corrections, one solver, refiners, tuners, finishers.
    bits, sym: the weight grid. group_size: columns per scale, "channel" or "tensor" (None: 128; "channel" for W8A8).
    range: which interval a grid covers (None: what the method prefers, else minmax).
    act_bits: 8 quantizes the linears' inputs too, per "token" (dynamic; `act_sym`: or with a zero point
        each) or per "tensor" (static, `act_range`).
    format: how the result is stored (None: gptq; compressed-tensors for W8A8 and kv_bits).
    kv_bits: 8 writes static scales of the key-value cache too, one per "tensor" or per "head" (`kv`).
    override: `REGEX:bits=8,group_size=32` on full module names, later ones win. skip: regexes of linears left float.
    target_bpw: bits per quantized weight, scales counted, to spend where they help most; --bit-choices lists the bits
        that a site may get.
    lm_head: quantize the output head too.
    type: for GGUF, which mixture of ggml's types (None: Q4_K_M); the fields above that shape integer grids then mean
        nothing, overrides are `REGEX:type=Q6_K` on ggml's tensor names, and the head is quantized by the mixture.
    imatrix: an importance matrix in llama.cpp's form to weigh errors by. imatrix_out: where to write the calibration's.
    split_max_size: `4G`: write a GGUF model in files of at most so many bytes of tensors.
    calib: "self", a file or folder, or a dataset; samples x seq_len tokens chosen by `seed`.
    dtype: what activations are computed in: "auto", "float32" or "bfloat16".
    """

    quality: str | None = None
    method: str | None = None
    bits: int = 4
    group_size: int | str | None = None
    sym: bool = True
    range: str | None = None
    act_bits: int | None = None
    act: str = "token"
    act_sym: bool = True
    act_range: str = "minmax"
    kv_bits: int | None = None
    kv: str = "tensor"
    format: str | None = None
    override: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    target_bpw: float | None = None
    bit_choices: str = "3,4,5,6,8"
    lm_head: bool = False
    calib: str = "wikitext2"
    samples: int = 128
    seq_len: int = 2048
    seed: int = 0
    dtype: str = "auto"
    type: str | None = None
    imatrix: str | None = None
    imatrix_out: str | None = None
    split_max_size: str | None = None

    def __post_init__(self) -> None:
        if self.quality is not None and self.method is not None:
            raise LlmqError("quality names a method by what it costs; give --quality or --method, not both")
        if self.act not in ("token", "tensor"):
            raise LlmqError(f"act is 'token' (dynamic) or 'tensor' (static), not {self.act!r}")
        if not self.act_sym and (self.act == "tensor" or not self.act_bits):
            raise LlmqError("asymmetric activations (--act-asym) are for --act-bits 8 per token")
        if self.act_bits not in (None, 8):
            raise LlmqError(f"act_bits is 8 or left out, not {self.act_bits}")
        if self.act_bits and self.bits != 8:
            raise LlmqError(f"8-bit activations need 8-bit weights, not {self.bits}; say --bits 8")
        if self.kv_bits and (self.format or "").startswith("gguf"):
            raise LlmqError("format gguf holds no scales of a key-value cache; use --format compressed-tensors")
        if self.kv_bits not in (None, 8) or self.kv not in STRATEGIES:
            raise LlmqError(f"kv_bits is 8 or left out, per tensor or head, not {self.kv_bits} per {self.kv}")
        if self.target_bpw is not None and self.act_bits:
            raise LlmqError("target_bpw chooses bits of weights; with 8-bit activations they are always 8")
        self.choices()
        if self.samples < 1 or self.seq_len < 2:
            raise LlmqError("samples is at least 1 and seq_len at least 2")
        self._check_gguf()
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise LlmqError(f"dtype is auto, float32 or bfloat16, not {self.dtype!r}")

    @property
    def gguf(self) -> bool:
        """Whether the result is a GGUF file."""
        return (self.format or "").partition(":")[0] == "gguf"

    def _check_gguf(self) -> None:
        if self.gguf and (self.group_size or self.range or self.act_bits or self.target_bpw):
            raise LlmqError("GGUF's types fix bits, groups and ranges and hold no activations; choose by --type alone")
        for option in ("type", "imatrix", "imatrix_out", "split_max_size"):
            if getattr(self, option) is not None and not self.gguf:
                raise LlmqError(f"--{option.replace('_', '-')} is for GGUF; say --format gguf")

    @classmethod
    def load(cls, file: Path | None, given: Mapping[str, Any]) -> Recipe:
        """Return the recipe of a YAML or JSON file with the `given` options laid over it.

        Raises LlmqError for an unreadable file or a key that no option has.
        """
        values: dict[str, Any] = {}
        if file is not None:
            try:
                values = yaml.safe_load(file.read_text()) or {}
            except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
                raise LlmqError(f"recipe {file} cannot be read ({' '.join(str(e).split())})") from e
            if not isinstance(values, dict):
                raise LlmqError(f"recipe {file} must hold `option: value` lines")
        values = {k.replace("-", "_"): v for k, v in values.items()} | dict(given)
        known = {f.name: f for f in dataclasses.fields(cls)}
        for key in values:
            if key not in known:
                raise LlmqError(f"recipe {file}: no option {key!r} (options: {', '.join(known)})")
        for key in ("override", "skip"):
            value = values.get(key, ())
            values[key] = (value,) if isinstance(value, str) else tuple(value)
        return cls(**values)

    def resolved(self) -> Recipe:
        """Return the recipe with every default that depends on another option filled in."""
        if self.method is None:
            return self._of_quality().resolved()
        if self.gguf:
            return dataclasses.replace(self, type=self.type or "Q4_K_M")
        steps = [spec.load("algorithms", s) for s in self.method.split(",")]
        preferred = next((s.preferred_range for s in steps if getattr(s, "preferred_range", None)), None)
        override = self.override
        if self.range is None and preferred:  # AWQ's paper clips neither q nor k
            override = (rf"\.(q|k)_proj$:range={_DEFAULT_RANGE}", *override)
        return dataclasses.replace(
            self,
            group_size=self.group_size or ("channel" if self.act_bits else 128),
            range=self.range or preferred or _DEFAULT_RANGE,
            format=self.format
            or ("compressed-tensors" if self.act_bits or self.kv_bits or self.target_bpw else "gptq"),
            override=override,
        )

    def choices(self) -> tuple[int, ...]:
        """Return the bits that a site may get under `target_bpw`, ascending."""
        words = self.bit_choices.split(",")
        if not all(w.strip() in {"2", "3", "4", "5", "6", "7", "8"} for w in words):
            raise LlmqError(f"bit_choices is a list of bits from 2 to 8, such as 3,4,8, not {self.bit_choices!r}")
        return tuple(sorted({int(w) for w in words}))

    def _of_quality(self) -> Recipe:
        """Return the recipe with the method that its quality stands for, in the words that repeat it."""
        quality = self.quality or "balanced"
        methods = _GGUF_QUALITY if self.gguf else _W8A8_QUALITY if self.act_bits else _QUALITY
        if quality not in methods:
            raise LlmqError(f"quality is {', '.join(methods)}, not {quality!r}")
        method, range_ = methods[quality], self.range or (None if self.gguf else "mse")
        if quality == "best" and not self.gguf:
            method += _FINISHERS.get(self.bits, "")
        return dataclasses.replace(self, quality=None, method=method, range=range_)

    def to_yaml(self) -> str:
        """Return the recipe as YAML that `load` reads back equal."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(values, sort_keys=False)


_DEFAULT_RANGE = "minmax"
_QUALITY = {
    "fast": "gptq,descent",
    "balanced": "qep,gptq,descent",
    "best": "fisher,qep,gptq,descent",
}
_FINISHERS = {
    2: ",distill",
    3: ",distill:epochs=1:lr=0.0005:norm_lr=0.0005",
}  # of "best", by bits; at 4 a prototype gained 1 %
_GGUF_QUALITY = _QUALITY | {"fast": "rtn", "best": _QUALITY["balanced"]}  # weighing tokens gains nothing (docs/gguf.md)
_W8A8_QUALITY = {
    "fast": "migrate:feedback=1,rtn",
    "balanced": "migrate,qep,gptq,descent",
    "best": "migrate,qep,gptq,descent",
}


_KINDS = {
    "rotate": "rotation", "weigh": "weighting", "search": "transform", "correct": "correction",
    "solve": "solver", "refine": "refiner", "tune": "tuner", "finish": "finisher",
}  # fmt: skip
_ALONE = ("rotation", "weighting", "solver")  # kinds of which a method has one at most


@dataclass(frozen=True)
class Plan:
    """A resolved recipe with its objects made."""

    recipe: Recipe
    rotations: tuple[Rotation, ...]
    weightings: tuple[Weighting, ...]
    transforms: tuple[Transform, ...]
    corrections: tuple[Correction, ...]
    solver: Solver
    refiners: tuple[Refiner, ...]
    tuners: tuple[Tuner, ...]
    finishers: tuple[Finisher, ...]
    format: Format
    base: Scheme | None  # None where the format's own types take its place (GGUF)
    overrides: tuple[tuple[re.Pattern[str], dict[str, Any]], ...]
    skip: tuple[re.Pattern[str], ...]

    def needs(self, grids: Sequence[Any]) -> tuple[type[Any], ...]:
        """Return the Stat classes that the steps of a site want for linears on these grids."""
        steps: tuple[Correction | Solver | Refiner, ...] = (*self.corrections, self.solver, *self.refiners)
        return tuple(dict.fromkeys(stat for step in steps for stat in step.needs(grids)))

    def scheme(self, name: str) -> Scheme | None:
        """Return what the linear of that full name becomes, None where it stays float."""
        if self.base is None or any(p.search(name) for p in self.skip):
            return None
        grid = self.base.weight
        for pattern, changes in self.overrides:
            if pattern.search(name):
                grid = dataclasses.replace(grid, **changes)
        return Scheme(grid, self.base.activation)


def plan(recipe: Recipe, model_dtype: torch.dtype) -> Plan:
    """Make a recipe's objects. Raises LlmqError for anything in it that names nothing or does not go together."""
    recipe = recipe.resolved()
    steps = _steps(recipe.method or "")
    (solver,) = steps["solver"]
    fmt = _format(recipe, solver)
    base, overrides, skip = (None, (), ()) if recipe.gguf else _schemes(recipe, fmt, model_dtype)
    return Plan(
        recipe=recipe,
        rotations=tuple(steps["rotation"]),
        weightings=tuple(steps["weighting"]),
        transforms=tuple(steps["transform"]),
        corrections=tuple(steps["correction"]),
        solver=solver,
        refiners=tuple(steps["refiner"]),
        tuners=tuple(steps["tuner"]),
        finishers=tuple(steps["finisher"]),
        format=fmt,
        base=base,
        overrides=overrides,
        skip=skip,
    )


def _schemes(recipe: Recipe, fmt: Format, model_dtype: torch.dtype) -> tuple[Scheme, Any, tuple[re.Pattern[str], ...]]:
    """Return the scheme of most linears, how some differ from it, and which stay float."""
    activation = ActivationGrid(8, recipe.act == "token", recipe.act_sym) if recipe.act_bits else None
    try:
        grid = Int(
            bits=recipe.bits,
            sym=recipe.sym,
            **_group(recipe.group_size),
            restricted=activation is not None and recipe.sym,
            scale_dtype=fmt.scale_dtype(model_dtype),
            range=spec.load("ranges", recipe.range or _DEFAULT_RANGE),
        )
        overrides = tuple(_override(o, grid) for o in recipe.override)
        skip = tuple(re.compile(s) for s in recipe.skip)
    except ValueError as e:
        raise LlmqError(str(e)) from e
    except re.error as e:
        raise LlmqError(f"--skip {e.pattern!r} is not a regular expression ({e})") from e
    return Scheme(grid, activation), overrides, skip


def _steps(method: str) -> dict[str, list[Any]]:
    """Return the steps of a method by their kind. Raises LlmqError where they are out of order."""
    steps: dict[str, list[Any]] = {kind: [] for kind in _KINDS.values()}
    order = list(steps)
    last = order[0]
    for text in method.split(","):
        step = spec.load("algorithms", text)
        kind = next(k for verb, k in _KINDS.items() if hasattr(step, verb))
        if order.index(kind) < order.index(last) or (kind in _ALONE and steps[kind]):
            raise LlmqError(
                f"method {method!r}: {spec.dump(step)} is a {kind} and cannot follow a {last}; the order is "
                "one rotation, one weighting, transforms, corrections, one solver, refiners, tuners, finishers"
            )
        steps[kind].append(step)
        last = kind
    if not steps["solver"]:
        raise LlmqError(f"method {method!r} has no solver; add one, e.g. {method},gptq (`llmq list` shows all steps)")
    return steps


def check_patterns(recipe: Recipe, names: Sequence[str]) -> None:
    """Raise LlmqError for a --skip or --override that matches no linear; both were compiled by `plan`."""
    overrides = {m["regex"]: text for text in recipe.override if (m := _OVERRIDE.match(text))}
    for pattern, text in [*((s, s) for s in recipe.skip), *overrides.items()]:
        if not any(re.search(pattern, n) for n in names):
            raise LlmqError(f"{text!r} matches no linear; names look like {names[0]}")


def _format(recipe: Recipe, solver: Any) -> Format:
    fmt = spec.load("formats", recipe.format or "")
    if getattr(solver, "desc_act", False):
        if not hasattr(fmt, "desc_act"):
            raise LlmqError(
                f"format {recipe.format} holds no g_idx; drop desc_act (static groups) or use --format gptq"
            )
        fmt = dataclasses.replace(fmt, desc_act=True)
    if recipe.kv_bits:
        if not hasattr(fmt, "kv"):
            raise LlmqError(
                f"format {recipe.format} holds no scales of a key-value cache; use --format compressed-tensors"
            )
        fmt = dataclasses.replace(fmt, kv=STRATEGIES[recipe.kv])
    return fmt


def _group(value: Any) -> dict[str, Any]:
    if value in ("channel", -1, "-1"):
        return {"group_size": None}
    if value == "tensor":
        return {"group_size": None, "per_tensor": True}
    try:
        return {"group_size": int(value)}
    except ValueError as e:
        raise LlmqError(f"group_size is a number of columns, 'channel' or 'tensor', not {value!r}") from e


def _override(text: str, grid: Int) -> tuple[re.Pattern[str], dict[str, Any]]:
    m = _OVERRIDE.match(text)
    if not m:
        raise LlmqError(f"--override {text!r} does not read; write REGEX:bits=8,group_size=32 (also sym=, range=)")
    changes: dict[str, Any] = {}
    for option in m["options"].split(","):
        key, _, value = option.partition("=")
        key = key.strip().replace("-", "_")
        if key == "group_size":
            changes |= _group(value)
        elif key == "range":
            changes["range"] = spec.load("ranges", value)
        elif key == "bits" and value.isdigit():
            changes["bits"] = int(value)
        elif key == "sym" and value.lower() in ("true", "false"):
            changes["sym"] = value.lower() == "true"
        else:
            raise LlmqError(f"--override {text!r}: cannot read {option!r}")
    dataclasses.replace(grid, **changes)  # raises ValueError for an impossible grid
    try:
        return re.compile(m["regex"]), changes
    except re.error as e:
        raise LlmqError(f"--override {text!r} does not start with a regular expression ({e})") from e
