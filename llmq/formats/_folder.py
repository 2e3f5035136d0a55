"""What the formats of a checkpoint folder share: which matrices they quantize, and what lies beside the weights.

    config.json         the model's, with the quantization_config (a copy of which GPTQ's older readers look for alone)
    recipe.yaml         what repeats the run
    README.md           the model card
    quantization.json   what became of each linear; checksums of all tensors and files
    and the tokenizer, chat templates and generation settings as they were

Not here: the words of a linear (gptq.py, awq.py, compressed_tensors.py), how OUT is written (checkpoint/sink.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from llmq.checkpoint import Sink
from llmq.checkpoint.card import model_card
from llmq.checkpoint.digest import file_digests, sealed
from llmq.checkpoint.hub_metadata import CARD, SourceCard, source_card
from llmq.checkpoint.place import RECORD
from llmq.format import Assignment, FloatModel, Format, Out, Wanted
from llmq.formats import _common
from llmq.grids._biased import Biased
from llmq.readers import Reader
from llmq.types import LinearSpec, LlmqError, Scheme


class Folder:
    """The base of these formats.

    copy: a file for the quantization_config alone, where readers look for one. inputs: whether quantized inputs of
    linears have a place in the file. embeddings: whether quantized embeddings have.
    """

    quant_method: str
    sink: ClassVar[type] = Sink
    copy: ClassVar[str | None] = None
    inputs: ClassVar[bool] = True
    embeddings: ClassVar[bool] = False

    def assign(self, model: FloatModel, wanted: Wanted) -> Assignment:
        """Return what the recipe says of the linears of the blocks, of the head where it is asked for, and beside them.

        Raises LlmqError where no linear is left to quantize, and for an embedding that the format does not hold.
        """
        schemes = wanted.schemes([*model.linears, *([model.head] if wanted.head else [])])
        left = self._misfits(schemes, model) if wanted.leaves else {}
        schemes = {n: scheme for n, scheme in schemes.items() if n not in left}
        if not schemes:
            why = _common.listed(left) or "every linear is skipped"
            raise LlmqError(f"{why}; nothing is left to quantize")
        schemes |= self._around(model, wanted)
        card, warnings = source_card(model.folder)
        warnings += [f"left float, as --on-misfit skip asks: {_common.listed(left)}"] if left else []
        return _Checkpoint(schemes=schemes, warnings=warnings, form=self, model=model, card=card)

    @property
    def derived(self) -> frozenset[str]:
        """See `Format.derived`; most store all that they read."""
        return frozenset()

    def readers(self, linears: Sequence[LinearSpec], skipped: Sequence[str] = ()) -> list[Reader]:
        """See `Format.readers`; a format of which nothing is known has none."""
        return []

    def stacked(self, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """See `Format.stacked`."""
        return {local: torch.cat([part[local] for part in parts]) for local in parts[0]}

    def embedding(self, name: str) -> Scheme | None:
        """See `Format.embedding`; most hold none."""
        return None

    def beside(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what the file named `copy` says; the config itself."""
        return config

    def holding(self, spec: LinearSpec) -> LinearSpec:
        """Return a linear of another format as this one holds its codes; scales may be repeated for finer groups."""
        grid, inputs = spec.scheme.weight, spec.scheme.activation if self.inputs else None
        grid = grid.integers if isinstance(grid, Biased) else grid
        return replace(spec, scheme=Scheme(grid, inputs))

    def doubtful(self, spec: LinearSpec) -> bool:
        """Say whether the values of a linear decide if the file holds them, not its scheme alone."""
        return False

    def config_json(self, saved: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        """Return config.json. saved: that of the float model. config: the `quantization_config`."""
        return {**saved, "quantization_config": config}

    def misfit(self, spec: LinearSpec) -> str | None:
        """Return why the file cannot hold a linear of that shape, None where it can."""
        return _common.undivided(spec)

    def _around(self, model: FloatModel, wanted: Wanted) -> dict[str, Scheme]:
        """Return what becomes of the embedding, and of a head of its own that no method solves, where that is asked."""
        if wanted.embedding is None:
            return {}
        if not self.embeddings:
            raise LlmqError(
                f"format {self.quant_method} holds no quantized embeddings; leave --embeddings out, or use "
                "--format compressed-tensors"
            )
        heads = [model.head] if f"{model.head}.weight" in model.shapes and not wanted.head else []
        return dict.fromkeys((model.embedding, *heads), wanted.embedding)

    def _misfits(self, schemes: Mapping[str, Scheme], model: FloatModel) -> dict[str, str]:
        """Return the linears that the file cannot hold, and why; not a tied head, which has no tensor."""
        shapes = {n: model.shapes[w] for n in schemes if (w := f"{n}.weight") in model.shapes}
        return _common.misfits([LinearSpec(n, N, K, schemes[n]) for n, (N, K) in shapes.items()], self.misfit)


class FolderFormat(Format, Protocol):
    """A format that derives from `Folder`, for those who handle any."""

    copy: ClassVar[str | None]
    embeddings: ClassVar[bool]

    def holding(self, spec: LinearSpec) -> LinearSpec:
        """See `Folder.holding`."""

    def config_json(self, saved: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Folder.config_json`."""

    def beside(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """See `Folder.beside`."""

    def doubtful(self, spec: LinearSpec) -> bool:
        """See `Folder.doubtful`."""


@dataclass(frozen=True, kw_only=True)
class _Checkpoint(Assignment):
    form: Folder
    model: FloatModel
    card: SourceCard

    def staged(self, name: str) -> str:
        """Return the name that runtimes know."""
        return self.model.written(name)

    def join(self, out: Out, config: Mapping[str, Any], recipe: str) -> int:
        """Write the configs and the recipe, and join the shards. A quantized head is no longer the embedding."""
        untied = {"tie_word_embeddings": False} if self.model.head in self.schemes else {}
        out.copy_files(self.model.folder)
        out.json("config.json", self.form.config_json({**self.model.saved, **untied}, config))
        if self.form.copy:
            out.json(self.form.copy, self.form.beside(config))
        out.text("recipe.yaml", recipe)
        return out.join()

    def close(self, out: Out, record: dict[str, Any], recipe: str, readers: Sequence[Reader]) -> dict[str, Any]:
        """Write the model card, and the record, which seals all other files."""
        out.text(CARD, model_card(record, self.form.quant_method, self.model.saved, self.card, readers))
        files = file_digests(out.stage, out.files())
        record = sealed(record | {"files": files})
        out.json(RECORD, record)
        return record
