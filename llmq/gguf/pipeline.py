"""The GGUF side of the main job: what the file will hold, before; where its parts are staged, during; the file, after.

Not here: the loop (run.py), solving (block.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llmq import __version__
from llmq.checkpoint import Sink, Source, disk
from llmq.checkpoint.place import user_path
from llmq.gguf import container, imatrix, mixture
from llmq.gguf.architecture import Architecture, architecture
from llmq.gguf.tokenizer import Vocabulary, vocabulary
from llmq.guard.patterns import Pattern
from llmq.overrides import parse
from llmq.recipe import Recipe
from llmq.types import LlmqError

REPORT = "llmq.report"
_SKIPPED = "F16"  # what --skip leaves float


@dataclass(frozen=True)
class Blueprint:
    """A GGUF file before its weights.

    types: the ggml type of every checkpoint tensor that is written, by the checkpoint's names.
    importance: mean squares of the input channels `[K]` by linear, as read from `--imatrix`.
    """

    architecture: Architecture
    vocabulary: Vocabulary
    mix: str
    types: dict[str, str]
    importance: dict[str, Tensor] = field(default_factory=dict)
    split: int = 0
    warnings: list[str] = field(default_factory=list)

    def quantized(self) -> dict[str, str]:
        """Return the types of the tensors that are not float."""
        return {name: kind for name, kind in self.types.items() if kind not in mixture.FLOATS}


def blueprint(
    source: Source, config: Any, recipe: Recipe, *, pre: str | None, calibrated: bool, tokenizer: Any
) -> Blueprint:
    """Plan a file. calibrated: whether the method weighs errors by activations of its own.

    Raises LlmqError for a model, a tokenizer or a type that cannot go together.
    """
    arch = architecture(config)
    mix = mixture.mixture(recipe.type or "Q4_K_M")
    shapes = {n: shape for n, (_, shape) in source.headers().items() if n not in source.unread}
    names = {n: ggml for n in shapes if (ggml := arch.tensor(n)) is not None}
    model = mixture.Model(
        blocks=arch.blocks,
        gqa=int(config.num_attention_heads) // arch.kv_heads,
        tied=arch.tied,
        large=arch.large,
        importance=calibrated or recipe.imatrix is not None,
    )
    overrides = [*overrides_of(recipe.override), *((Pattern(s, f"--skip {s!r}"), _SKIPPED) for s in recipe.skip)]
    matrices = {names[n]: shapes[n] for n in names}
    by_ggml = mixture.assign(matrices, mix, model, overrides)
    importance, warnings = _importance(recipe, names, shapes)
    words = vocabulary(tokenizer, shapes[_embedding(names)][0], config, pre)
    return Blueprint(
        arch,
        words,
        mix,
        {n: by_ggml[ggml] for n, ggml in names.items()},
        importance,
        container.parse_size(recipe.split_max_size),
        [*arch.warnings(), *words.warnings, *mixture.fallen_back(matrices, by_ggml, mix, model), *warnings],
    )


def overrides_of(texts: Sequence[str]) -> list[tuple[Pattern, str]]:
    """Read `REGEX:type=Q6_K` on ggml's tensor names. Raises LlmqError for anything else."""
    found = []
    for text in texts:
        override = parse(text)
        kind = override.changes.get("type", "").upper() if override and len(override.changes) == 1 else ""
        if override is None or kind not in mixture.TYPES:
            raise LlmqError(
                f"--override {text!r} does not read; for GGUF write REGEX:type=TYPE, on names like "
                f"blk.0.ffn_down.weight, with one of {', '.join(mixture.TYPES)}"
            )
        found.append((override.pattern, kind))
    return found


class GgufSink(Sink):
    """The parts of a GGUF file while they are made; they are staged in a folder beside OUT."""

    def check(self) -> None:
        """Raise LlmqError unless OUT can become a GGUF file, or is one that may be replaced."""
        container.check_out(self.out, overwrite=self.overwrite)

    def target(self, name: str) -> Path:
        """Return where a staged file will lie."""
        return self.out.with_name(name)

    def put(self, names: list[str]) -> None:
        """Give the files their names: each in one step, the first shard, which a reader opens, last."""
        for name in reversed(names):
            if (self.stage / name).exists():
                disk.put_file(self.stage / name, self.target(name))

    def stale(self, names: list[str]) -> list[Path]:
        """Return the old file, or its shards, that the new ones do not replace by name; the telling first one last."""
        old = [self.out, *container.shards(self.out)]
        return [p for p in reversed(old) if p.exists() and p.name not in names]

    def contents(self, plan: Blueprint) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of the file by ggml's name, as it will be written."""
        return container.contents(plan.architecture, self._planned(plan))

    def write(self, plan: Blueprint, name: str, keys: Mapping[str, str | int]) -> list[Path]:
        """Write what OUT will be from the staged parts, with `keys` beside the model's own; return the staged files."""
        return container.write(self.stage, self.out, _header(plan, name, keys), self._planned(plan), plan.split)

    def _planned(self, plan: Blueprint) -> list[container.Part]:
        return [container.Part(t, plan.types[t.name]) for t in self.staged() if t.name in plan.types]


def _header(plan: Blueprint, name: str, keys: Mapping[str, str | int]) -> container.Header:
    return container.Header(plan.architecture, plan.vocabulary, name, mixture.file_type(plan.mix), keys)


def keys(recipe: Recipe) -> dict[str, str | int]:
    """Return llmq's own keys, which say how the file was made; REPORT, the record of the run, comes beside them."""
    own: dict[str, str | int] = {"llmq.version": __version__, "llmq.recipe": recipe.to_yaml()}
    return own | ({"quantize.imatrix.file": recipe.imatrix} if recipe.imatrix else {})


def _importance(
    recipe: Recipe, names: Mapping[str, str], shapes: Mapping[str, Sequence[int]]
) -> tuple[dict[str, Tensor], list[str]]:
    if recipe.imatrix is None:
        return {}, []
    means = imatrix.read(user_path(recipe.imatrix))
    found = {n.removesuffix(".weight"): means[ggml] for n, ggml in names.items() if ggml in means}
    if not found:
        raise LlmqError(f"{recipe.imatrix} names no tensor of this model; it was made from another one")
    for name, mean in found.items():
        if len(mean) != shapes[f"{name}.weight"][-1]:
            raise LlmqError(
                f"{recipe.imatrix} has {len(mean)} channels for {name}, the model {shapes[f'{name}.weight'][-1]}; it "
                "was made from another model"
            )
    blocks = [n for n, ggml in names.items() if ggml.startswith("blk.") and n.endswith("_proj.weight")]
    missing = [n for n in blocks if names[n] not in means]
    if not missing:
        return found, []
    return found, [
        f"{recipe.imatrix} has nothing on {len(missing)} linears, e.g. {missing[0]}; their errors weigh equally"
    ]


def _embedding(names: Mapping[str, str]) -> str:
    return next(n for n, ggml in names.items() if ggml == "token_embd.weight")
