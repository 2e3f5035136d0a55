"""A checkpoint folder in any format of llmq/formats: each is a target by its own name and with its own options.

    config.json, shards     the source's, with another quantization_config; what is not packed byte for byte
    README.md               what it was made of
    quantization.json       the source's record where llmq made it and all values are kept, else what became of linears
    and the tokenizer, chat templates and generation settings as they were

A linear is read as a QTensor, laid on the grid that the target has for its codes (`Folder.holding`), packed, and read
back: the outcome is what that comparison says. What cannot be kept is refused, or rounded to `--requantize GRID`.
Not here: the bytes (formats/), which grid holds which codes (formats/ too).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from llmq import __version__, registry
from llmq.checkpoint import Sink
from llmq.checkpoint.card import export_card
from llmq.checkpoint.dialects import without_quantization
from llmq.checkpoint.digest import file_digests, sealed
from llmq.checkpoint.hub_metadata import CARD
from llmq.checkpoint.packed import CACHE, natural
from llmq.checkpoint.place import RECORD
from llmq.errors import LlmqError
from llmq.export._kept import Kept, keep
from llmq.export._target import EXACT, OfCodes, Packed, open_packed, stage
from llmq.format import packed_bytes
from llmq.formats._common import block_path
from llmq.formats._folder import FolderFormat
from llmq.grids._biased import Biased
from llmq.progress import Progress
from llmq.readable import of_experts
from llmq.readers import Reader, readers
from llmq.types import LinearSpec, Params, Scheme
from llmq.verify import require_right

DECODED = "decoded"
"""What became of an embedding or a head that is float in OUT."""
_PART = 2**28  # bytes of tensors that are staged at a time
_ANEW = "or round it anew: --requantize GRID (int:bits=4:group=128 ...)"
_HEAD = "; or say --embeddings float"
_OURS = (  # what formats advise of `llmq quantize`, as `llmq export` calls it
    (r", or leave [^;]*? float: --[a-z-]+ [a-z]+", ""),
    (r"; use --format gguf(?=;|$)", ""),
    (r"--format (?=[a-z])", "--to "),
    (r"--weights (?=[a-z])", "--requantize "),
    (r"--bits (?=\d)", "--requantize int:bits="),
    (r"--group-size takes ", "--requantize int:group= takes "),
    (r"--group-size (?=\w)", "--requantize int:group="),
)


@dataclass(frozen=True)
class AsFormat(OfCodes):
    """A folder in the format `form`.

    to: what the user called it. decodes: whether embedding and output head become floats (`--embeddings float`).
    plans: what becomes of each linear, once checked; anew: those that are rounded again. centred: those whose zeros are
    seen to be all in the middle.
    """

    form: FolderFormat
    to: str
    decodes: bool = False
    plans: dict[str, LinearSpec] = field(default_factory=dict, init=False)
    anew: set[str] = field(default_factory=set, init=False)
    centred: set[str] = field(default_factory=set, init=False)

    def said(self) -> str:
        """See `Target.said`."""
        return registry.dump(self.form) + (":embeddings=float" if self.decodes else "")

    def with_options(self, given: Mapping[str, str], said: str) -> AsFormat:
        """See `Target.with_options`; `embeddings` may be `float`, whatever the format."""
        own = {key: value for key, value in given.items() if (key, value) != ("embeddings", "float")}
        decodes = self.decodes or len(own) < len(given)
        return replace(self, form=registry.filled(self.form, own, said), decodes=decodes)

    def open(self, src: str, requantize: str | None) -> Packed:
        """See `OfCodes.open`."""
        if requantize is not None:
            registry.load("grids", requantize, code=True)  # refuses before SRC is read
        return open_packed(src, requantize, minima=True)

    def check(self, opened: Packed) -> list[str]:
        """Refuse, by the layout of every linear, what the format cannot hold, and say what readers do not take.

        Where the layout leaves it open, by values: every linear is looked at before any work.
        """
        try:
            return self._checked(opened)
        except LlmqError as e:
            raise LlmqError(_as_ours(str(e))) from e

    def _checked(self, opened: Packed) -> list[str]:
        ordered = opened.packed.ordered
        if hasattr(self.form, "desc_act"):
            setattr(self.form, "desc_act", ordered)  # noqa: B010, an option of one format
        kept = [spec for spec in opened.linears if not self._decodes(spec)]
        for spec in kept:
            if spec.embedding and not self.form.embeddings:
                why = f"{self.to} holds no packed embeddings; say --embeddings float, or --to compressed-tensors"
                raise LlmqError(f"{spec.name}: its codes cannot be kept: {why}")
            self._plan(opened, spec, self._held)
        open_yet = any(self.form.doubtful(s) or self._gives_zeros(s) for s in kept) or self._hides_symmetry(opened)
        if opened.requantize is None:
            self.form.check(list(self.plans.values()), self._floats(opened))  # before any weight is read
        if ordered or open_yet or self._narrows(opened):
            for name in (n for n in self.plans if n not in self.anew):
                self._plan(opened, self.plans[name], lambda s: self._looked_at(s, opened))
        self._call_symmetric()
        self._alike(opened)
        return [*self.form.check(list(self.plans.values()), self._floats(opened)), *self._left_out(opened)]

    def _decodes(self, spec: LinearSpec) -> bool:
        """Say whether a linear becomes float: `--embeddings float` means what lies before and behind the blocks."""
        return self.decodes and (spec.embedding or block_path(spec.name) is None)

    def _floats(self, opened: Packed) -> list[str]:
        """Return the linears that are float in OUT."""
        return [*opened.skipped, *(s.name for s in opened.linears if self._decodes(s) and not s.embedding)]

    def _gives_zeros(self, spec: LinearSpec) -> bool:
        """Say whether minima that are floats of their own are to be zeros here, which their values decide."""
        planned = self.plans[spec.name].scheme.weight
        return isinstance(spec.scheme.weight, Biased) and not isinstance(planned, Biased)

    def foresee(self, opened: Packed) -> list[str]:
        """See `OfCodes.foresee`."""
        return self.form.check([self.form.holding(s) for s in opened.linears], opened.skipped)

    def _plan(self, opened: Packed, spec: LinearSpec, held: Callable[[LinearSpec], LinearSpec]) -> None:
        """Plan what becomes of a linear. Raises LlmqError where `held` does and the user asks for no rounding anew."""
        try:
            self.plans[spec.name] = held(spec)
        except LlmqError as e:
            if opened.requantize is None:
                why = str(e).removeprefix(f"{spec.name}: ")
                ends = _HEAD if block_path(spec.name) is None else ""
                raise LlmqError(f"{spec.name}: its codes cannot be kept: {why}; {_ANEW}{ends}") from e
            self.anew.add(spec.name)
            self.plans[spec.name] = self._anew(opened, spec)

    def _held(self, spec: LinearSpec) -> LinearSpec:
        held = self.form.holding(spec)
        self.form.check([held])
        return held

    def _looked_at(self, spec: LinearSpec, opened: Packed) -> LinearSpec:
        laid = keep(opened.packed.qtensor(spec.name), spec, self.form).laid
        if isinstance(laid.params, Params) and bool((laid.params.zero == 2 ** (laid.grid.bits - 1)).all()):
            self.centred.add(spec.name)
        return spec

    def _hides_symmetry(self, opened: Packed) -> bool:
        """Say whether the source's format does not tell that its zeros are all in the middle, and this one would."""
        return opened.method in ("awq", "mlx") and self.form.quant_method in ("gptq", "compressed-tensors")

    def _call_symmetric(self) -> None:
        """Call integers symmetric where all zeros of all linears are in the middle: more runtimes read such files."""
        if self.centred == self.plans.keys():
            for name, spec in self.plans.items():
                grid: Any = spec.scheme.weight
                self.plans[name] = replace(spec, scheme=replace(spec.scheme, weight=replace(grid, sym=True)))

    def _alike(self, opened: Packed) -> None:
        """Plan to round anew all others too, where linears that are make a mixture which the format refuses."""
        if opened.requantize is None:
            return
        try:
            self.form.check(list(self.plans.values()))
        except LlmqError:
            anew = {n: self._anew(opened, s) for n, s in self.plans.items()}
            self.anew.update(n for n, s in self.plans.items() if s.scheme != anew[n].scheme)
            self.plans.update({n: anew[n] for n in self.anew})

    def _anew(self, opened: Packed, spec: LinearSpec) -> LinearSpec:
        """Return a linear on the grid that the user asks for. Raises LlmqError where the format does not hold that."""
        grid: Any = registry.load("grids", str(opened.requantize), code=True)
        scheme = Scheme(grid.stored_in(self.form.scale_dtype(opened.source.dtype)))
        return self.form.holding(replace(spec, scheme=scheme))

    def _narrows(self, opened: Packed) -> bool:
        """Say whether some scales are stored here in another dtype than there."""
        metas = (t for n in opened.packed.linears for t in opened.packed.stored(n).values())
        kinds = {t.dtype for t in metas if t.is_floating_point() and t.dtype.itemsize > 1}
        return any(bool(self.form.scale_dtype(kind) != kind) for kind in kinds)

    def _left_out(self, opened: Packed) -> list[str]:
        found = []
        if any(s.scheme.activation and not self.plans[s.name].scheme.activation for s in opened.linears):
            found.append(f"the checkpoint quantizes activations too; {self.to} has no place for their scales")
        if any(n.endswith(CACHE) for n in opened.source.names()):
            found.append("the scales of the key-value cache are left out")
        return found

    def _kept(self, name: str, opened: Packed) -> Kept:
        q, spec = opened.packed.qtensor(name), self.plans[name]
        return Kept.rounded(q, spec, self.form) if name in self.anew else keep(q, spec, self.form)

    def write(self, opened: Packed, out: Sink, step: Progress) -> dict[str, Any]:
        """See `Target.write`."""
        outcomes, lines = Counter[str](), dict[str, Any]()
        stage(out, self._tensors(opened, outcomes, lines, step), _PART)
        out.copy_files(opened.folder)
        config = self._config(opened)
        out.json("config.json", config)
        if self.form.copy:
            out.json(self.form.copy, self.form.beside(self._quantization(opened)))
        total = out.join()
        record = self._record(opened, out, outcomes, lines, total)
        out.text(CARD, export_card(record, self.form.quant_method, config, opened.card, self._readers(opened)))
        files = file_digests(out.stage, out.files())
        out.json(RECORD, sealed(record | {"files": files}))
        return {"outcomes": dict(outcomes), "bytes": total, "warnings": opened.warnings}

    def _tensors(
        self, opened: Packed, outcomes: Counter[str], lines: dict[str, Any], step: Progress
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of OUT by its name there, and note what became of each linear."""
        raw, linears = opened.stored(), opened.packed.linears
        parts = {n: opened.packed.parts(n) for n in linears}
        where = {found[0].rpartition(".")[0]: n for n, found in parts.items()}
        taken = {name for found in parts.values() for name in found}
        names = sorted({n for n in raw.names() if n not in taken and not n.endswith(CACHE)} | where.keys(), key=natural)
        for i, name in enumerate(names):
            step(i, len(names), name)
            if name not in where:
                yield raw.written(name), raw.get(name)
                continue
            own = raw.written(name)
            if where[name] not in self.plans:
                outcomes[DECODED] += 1
                yield f"{own}.weight", opened.packed.qtensor(where[name]).dequantize().to(_dtype(opened))
                continue
            kept = self._kept(where[name], opened)
            outcomes[kept.outcome] += 1
            lines[where[name]] = kept.line
            yield from ((f"{own}.{local}", tensor) for local, tensor in kept.tensors.items())
        step(len(names), len(names), "writing")

    def _readers(self, opened: Packed) -> list[Reader]:
        """Return which runtimes take what is written."""
        rows = self.form.readers(list(self.plans.values()), self._floats(opened))
        return readers(rows, of_experts(opened.source, opened.packed, self.form.quant_method))

    def _config(self, opened: Packed) -> dict[str, Any]:
        saved = without_quantization(opened.source.config)
        tied = {"tie_word_embeddings": bool(opened.config.tie_word_embeddings)}
        return self.form.config_json(saved | tied, self._quantization(opened))

    def _quantization(self, opened: Packed) -> dict[str, Any]:
        """Return the `quantization_config`, which names modules as the model and as runtimes call them."""
        other = opened.source.written
        linears = {n: s for s in self.plans.values() for n in (s.name, other(s.name))}
        skipped = {n: None for m in opened.skipped for n in (m, other(m))}
        return self.form.config([replace(s, name=n) for n, s in linears.items()], list(skipped))

    def _record(
        self, opened: Packed, out: Sink, outcomes: Mapping[str, int], lines: Mapping[str, Any], total: int
    ) -> dict[str, Any]:
        """Return the record: llmq's own of the source where every value is kept, for it still holds, else a new one."""
        made, own = opened.made or {}, (opened.made or {}).get("linears")
        export = {"llmq": __version__, "from": opened.method, "to": self.to, "outcomes": dict(outcomes)}
        now = {"size": self._size(made.get("size", {}), total), "tensors": dict(out.digests), "export": export}
        if isinstance(own, dict) and own.keys() == lines.keys() and set(outcomes) == {EXACT}:
            held = {n: own[n] | {"sha256": line["sha256"]} for n, line in lines.items()}
            return {k: v for k, v in made.items() if k not in ("sha256", "files")} | {"linears": held, **now}
        record = {"llmq": __version__, "source": asdict(opened.source.origin), "warnings": opened.warnings}
        return record | {"linears": dict(lines), "exported": opened.made, **now}

    def _size(self, before: Mapping[str, Any], total: int) -> dict[str, Any]:
        weights = sum(s.N * s.K for s in self.plans.values())
        packed = sum(packed_bytes(self.form, s) for s in self.plans.values())
        size = {"bytes": total, "quantized_weights": weights, "bits_per_weight": round(8 * packed / weights, 4)}
        return {**before, **size}

    def verify(self, out: Sink) -> None:
        """See `Target.verify`."""
        require_right(out.whole)


def _dtype(opened: Packed) -> torch.dtype:
    """Return what a decoded tensor is stored in: the dtype of the config, else that of the checkpoint's floats."""
    said = getattr(opened.config.get_text_config(), "dtype", None)
    return said if isinstance(said, torch.dtype) else opened.source.dtype


def _as_ours(said: str) -> str:
    """Return a refusal with the options of `llmq export` for those of `llmq quantize`."""
    for pattern, ours in _OURS:
        said = re.sub(pattern, ours, said)
    return said
