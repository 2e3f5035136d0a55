"""The plan of a run, made before any work: what each matrix becomes, and everything that can be refused.

    plan = outline("./my-llama", Recipe(bits=4, group_size=64))  from headers and config.json alone
    plan = prepare("./my-llama", Recipe(bits=4, group_size=64))  the same, with each weight read once, for what it says
    plan.linears["model.layers.0.mlp.up_proj"].scheme.weight     Int(bits=4, group=64, ...)
    plan.settled(schemes, recipe)                                the same with other schemes, as a budget of bits asks

What a file or a recipe has wrong is said here, in one line, not when its block comes.
Not here: what is refused (refusals.py, weights.py), running it (run.py), what a format makes of a model (formats/).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq import blend, registry
from llmq.calibration.writing import side_by_side
from llmq.checkpoint import Source, resolve
from llmq.checkpoint.decoding import as_floats, rounded_twice
from llmq.format import Assignment, FloatModel, packed_bytes
from llmq.model.adapter import Adapted, Adapter
from llmq.model.device import device_of
from llmq.model.experts import Experts
from llmq.model.pretrained import tokenizer_of
from llmq.model.rotated import Rotated
from llmq.model.skeleton import Skeleton
from llmq.pipeline import refusals, weights
from llmq.pipeline.experts import floats_apart, reader_limits, refuse_unlike
from llmq.pipeline.method import Method, method_of
from llmq.readers import Limit, Reader, readers, told
from llmq.recipe import Recipe
from llmq.team import ALONE, Team, join, placed
from llmq.types import LinearSpec, LlmqError, QTensor, Scheme, Site


@dataclass
class Plan:
    """A prepared run: what was read, what is planned, what a user should know before it starts.

    skeleton, model: the float model, as the run and as a format sees it. assigned: what becomes of every matrix.
    sites: of every block, with their producers, where transforms want these; else empty.
    alive: how many batches of the calibration stay suspended inside a block (model/lanes.py), None for all.
    """

    skeleton: Skeleton
    method: Method
    model: FloatModel
    assigned: Assignment
    device: torch.device
    warnings: list[str] = field(default_factory=list)
    sites: Sequence[tuple[Site, ...]] = ()
    team: Team = ALONE
    alive: int | None = None

    @property
    def source(self) -> Source:
        """The float weights, an adapter added and rotated where that is asked for."""
        return self.skeleton.source

    @cached_property
    def matrices(self) -> dict[str, LinearSpec]:
        """Every matrix that is quantized, by the name of its module."""
        shapes = {n: self.model.shapes[self.weight_of(n)] for n in self.assigned.schemes}
        table, schemes = self.model.embedding, self.assigned.schemes
        return {n: LinearSpec(n, N, K, schemes[n], n == table) for n, (N, K) in shapes.items()}

    @cached_property
    def linears(self) -> dict[str, LinearSpec]:
        """Those that the method solves: in the blocks, and the head where it is asked for."""
        return {n: s for n, s in self.matrices.items() if n not in self.rows}

    @cached_property
    def rows(self) -> dict[str, LinearSpec]:
        """Those that are rounded row by row, as a format wants it: the embedding, the head that nobody asked for."""
        solved = {*self.model.linears} | ({self.model.head} if self.method.recipe.lm_head else set())
        return {n: s for n, s in self.matrices.items() if n not in solved}

    @property
    def skipped(self) -> list[str]:
        """The linears that stay float; a head that is tied to a quantized embedding is that."""
        heads = [] if self._ties else [self.model.head]
        return [n for n in (*self.model.linears, *heads) if n not in self.matrices]

    @property
    def _ties(self) -> bool:
        """Whether the head multiplies with a quantized embedding."""
        tied = f"{self.model.head}.weight" not in self.model.shapes
        return tied and self.model.embedding in self.rows and self.model.head not in self.matrices

    @property
    def head(self) -> str | None:
        """The full name of the output head, where the method solves it."""
        return self.model.head if self.model.head in self.linears else None

    @property
    def float_source(self) -> Source:
        """The float model's weights, its adapter added, before any rotation: as a user would load it."""
        return self.source.base if isinstance(self.source, Rotated) else self.source

    def weight_of(self, linear: str) -> str:
        """Return the tensor that holds the float weight of a linear: the embedding's, where a head is tied to it."""
        if f"{linear}.weight" in self.source:
            return f"{linear}.weight"
        return f"{self.model.embedding}.weight"

    def importance(self, linear: str) -> Tensor | None:
        """Return what the squared error of each input channel of a linear counts, where the user gave it, `[K]`."""
        given = self.assigned.importance.get(linear)
        return None if given is None else given.to(self.device)

    def bytes(self) -> int:
        """Return the bytes of all tensors that will be written: packed, float, and what no checkpoint holds.

        Under a budget of bits it is the most that this allows.
        """
        matrices, floats = self.packed_sizes.values(), self.float_bytes.values()
        return sum(matrices) + sum(floats) + self.assigned.more_bytes() + self._cache_bytes()

    @cached_property
    def packed_sizes(self) -> dict[str, int]:
        """The bytes of each matrix that is quantized, by name; of those that share a budget of bits what is its own."""
        sizes = {n: packed_bytes(self.method.format, s) for n, s in self.matrices.items()}
        if self.method.recipe.target_bpw is None:
            return sizes
        shared = {n: s for n, s in self.linears.items() if n != self.head}
        rest = self.budget() - (sizes[self.head] if self.head else 0)
        each = rest / sum(s.N * s.K for s in shared.values()) if shared else 0
        return sizes | {n: round(each * s.N * s.K) for n, s in shared.items()}

    @cached_property
    def float_bytes(self) -> dict[str, int]:
        """The bytes of each tensor that stays float, as it is written, by its name."""
        sizes, shapes = self.source.sizes(), self.source.headers()
        left = [n for n in sizes if n.removesuffix(".weight") not in self.matrices]
        return {n: self.assigned.float_bytes(n, shapes[n][1], sizes[n]) for n in left}

    def _cache_bytes(self) -> int:
        """Return the bytes of the scales of keys and values: two for each block, of each head where that is asked."""
        recipe, text = self.method.recipe, self.skeleton.text
        heads = text.num_key_value_heads if recipe.kv == "head" else 1
        each = heads * self.method.format.scale_dtype(self.skeleton.stored_dtype).itemsize
        return 2 * len(self.skeleton) * each if recipe.kv_bits else 0

    def disk(self) -> dict[str, int]:
        """Return the bytes of disk that the run takes beside OUT while it lasts, by what they are.

        output: the shards. parts: the blocks that they are joined from. states: the calibration's hidden states, as of
        the last sync, before a block and behind it. squares: the weights of tokens. hessians: one for each linear at
        most, where finishers want them.
        """
        recipe, width = self.method.recipe, self.skeleton.text.hidden_size
        tokens = (recipe.samples or 0) * (recipe.seq_len or 0)
        states = ceil(3 * tokens * width * self.skeleton.dtype.itemsize * (1 + self.paired()))
        squares = 4 * tokens * len(self.linears) if self.method.weightings else 0
        hessians = sum(4 * s.K**2 for s in self.linears.values()) if self.method.finishers else 0
        beside = {"states": states, "squares": squares, "hessians": hessians}
        return {"output": self.bytes(), "parts": self.bytes(), **beside}

    def packed(self, name: str, q: QTensor) -> dict[str, Tensor]:
        """Return the packed tensors of a linear, by their full names."""
        return {f"{name}.{k}": t for k, t in self.method.format.pack(q, self.linears[name]).items()}

    def staged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors of the model by the names that they have where they are staged; see `floats_apart`."""
        whole = tensors if self._apart else self.source.joined(tensors)
        return {self.assigned.staged(name): tensor for name, tensor in whole.items()}

    @cached_property
    def _apart(self) -> bool:
        return floats_apart(self.skeleton.model, self.method.format.quant_method)

    @cached_property
    def beside(self) -> list[str]:
        """Modules with a matrix outside the linears of the blocks and the head: routers, what reads images, and so on.

        They stay as they are. Embeddings are not among them.
        """
        known = {*self.model.linears, self.model.head, *self.skeleton.embeddings()}
        shapes = {n: shape for n, (_, shape) in self.source.headers().items() if n.endswith(".weight")}
        return [m for n, shape in shapes.items() if len(shape) == 2 and (m := n.removesuffix(".weight")) not in known]

    def config(self) -> dict[str, Any]:
        """Return the `quantization_config`, which names what stays float as the model and as runtimes call it."""
        other = self.source.written
        names = {n: None for m in (*self.skipped, *self.beside, *self._tables()) for n in (m, other(m))}
        linears = {n: s for s in self.matrices.values() for n in (s.name, other(s.name))}
        return self.method.format.config([dataclasses.replace(s, name=n) for n, s in linears.items()], list(names))

    def _tables(self) -> list[str]:
        """Return the embeddings that stay float beside one that does not, and the head that is that one's."""
        every = self.skeleton.embeddings() if self.model.embedding in self.rows else []
        return [*([self.model.head] if self._ties else []), *(n for n in every if n not in self.matrices)]

    @property
    def limits(self) -> list[Limit]:
        """What runtimes do not take of how the checkpoint holds its experts."""
        form = self.method.format.quant_method
        return [] if self.method.recipe.gguf else reader_limits(self.float_source, self.linears, form)

    def readers(self, matrices: Sequence[LinearSpec] | None = None) -> list[Reader]:
        """Return which runtimes take what will be written, and why not.

        matrices: as they are now, where a budget of bits has been spent; None looks at all that they may become.
        """
        seen = self.possible() if matrices is None else matrices
        return readers(self.method.format.readers(seen, self.skipped), self.limits)

    def calibrates(self) -> bool:
        """Say whether any step needs activations."""
        grids = [s.scheme.weight for s in self.linears.values()]
        static = any(s.scheme.static for s in self.linears.values())
        recipe, method = self.method.recipe, self.method
        measured = recipe.target_bpw is not None or recipe.imatrix_out is not None or recipe.kv_bits is not None
        needs = method.needs(grids) if grids else ()  # where nothing is left to round, nothing is weighed
        steps = (method.weightings, method.transforms, needs, method.tuners, method.finishers)
        return measured or static or any(steps)

    def writes(self) -> int:
        """Return how many sequences the model writes side by side that writes its own calibration text, else 0."""
        recipe, dtype = self.method.recipe, self.skeleton.dtype
        samples = blend.written(recipe.calib, recipe.samples)
        if not samples:
            return 0
        weights = sum(self.source.sizes().values()) * dtype.itemsize // self.skeleton.stored_dtype.itemsize
        at_once = side_by_side(self.skeleton.model.config, weights, recipe.seq_len or 1, dtype)
        return min(samples, at_once)

    def told(self, given: Recipe) -> Plan:
        """Return the plan; one that does not calibrate keeps no options of calibration, and warns of those `given`."""
        if self.calibrates():
            return self
        names = ("calib", "varied", "samples", "seq_len", "seed", "experts")
        idle = ["--" + n.replace("_", "-") for n in names if getattr(given, n) is not None]
        who = f"method {self.method.recipe.method}" if self.linears else "a run that rounds no linear"
        say = f"{', '.join(idle)}: {who} reads no calibration text, they change nothing"
        none: dict[str, Any] = dict.fromkeys(names)
        method = dataclasses.replace(self.method, recipe=dataclasses.replace(self.method.recipe, **none))
        return dataclasses.replace(self, method=method, warnings=[*self.warnings, *([say] if idle else [])])

    def settled(self, schemes: Mapping[str, Scheme | None], recipe: Recipe) -> Plan:
        """Return the plan with other schemes for some matrices, None for float.

        recipe: what asks for them, for the record.
        """
        every = {**self.assigned.schemes, **schemes}
        assigned = dataclasses.replace(self.assigned, schemes={n: s for n, s in every.items() if s is not None})
        method = dataclasses.replace(self.method, recipe=recipe)
        plan = dataclasses.replace(self, method=method, assigned=assigned).told(recipe)
        before = self.method.format.check(self.possible(), self.skipped)  # of bits of which some were not chosen
        at = next((i for i, w in enumerate(self.warnings) if w in before), 0)
        told = [w for w in self.warnings if w not in before]  # what the user was told of the options that he gave
        now = method.format.check(list(plan.matrices.values()), self.skipped)
        return dataclasses.replace(plan, warnings=[*told[:at], *now, *told[at:]])

    def budget(self) -> float:
        """Return the bytes that `--target-bpw` gives the linears."""
        return (self.method.recipe.target_bpw or 0) * sum(s.N * s.K for s in self.linears.values()) / 8

    def possible(self) -> list[LinearSpec]:
        """Return every matrix as it will be, or may be under a budget of bits."""
        if not self.method.recipe.target_bpw:
            return list(self.matrices.values())
        chosen = [one for s in self.linears.values() for one in self.candidates(s).values() if one is not None]
        return [*chosen, *self.rows.values()]

    def candidates(self, spec: LinearSpec) -> dict[str, LinearSpec | None]:
        """Return what a linear may become under a budget of bits, by what an override says, None for float."""
        return self.assigned.possible(spec) or self.method.possible(spec)

    def sizes(self, spec: LinearSpec) -> dict[str, int]:
        """Return the bytes of a linear as each of the candidates of a budget of bits."""
        floats, form = spec.N * spec.K * self.skeleton.stored_dtype.itemsize, self.method.format
        return {n: floats if s is None else packed_bytes(form, s) for n, s in self.candidates(spec).items()}

    def paired(self) -> float:
        """Return the share of the calibration that runs through the float model too, for steps that compare the two."""
        return 1.0 if self.method.tuners else max((c.share for c in self.method.corrections), default=0.0)


def prepare(src: str, recipe: Recipe, device: str = "auto", adapter: str | Path | None = None) -> Plan:
    """Read and plan. Raises LlmqError for everything that can be known to fail before any work.

    adapter: a LoRA adapter to add to the weights, a folder or a Hub id.
    """
    return weights.read(outline(src, recipe, device, adapter))


def outline(src: str, recipe: Recipe, device: str | torch.device = "auto", adapter: str | Path | None = None) -> Plan:
    """Plan by headers and config alone, as `prepare`, which then reads the weights. Raises LlmqError for what is wrong.

    device: by its name, or one that need not be there. A head that lies beside the embedding that the config ties it to
    is compared with it, and so read.
    """
    source = Source(resolve(src), None if adapter is None else resolve(str(adapter)))
    source.warnings += [*as_floats(source), *rounded_twice(source)]
    where = device if isinstance(device, torch.device) else device_of(placed(device))
    stored = source.dtype
    method = method_of(recipe, stored)
    skeleton = Skeleton(source, _compute_dtype(method, stored, where))
    if recipe.lm_head:
        refusals.head(skeleton)
    if source.adapter:
        skeleton.source = source = Adapted(skeleton, Adapter(source.adapter))
    for step in method.rotations:
        skeleton = Skeleton(Rotated(skeleton, step), skeleton.dtype)
    refusals.steps(method, skeleton)
    refusals.experts(recipe, skeleton)
    for layer in skeleton.model.modules():
        if isinstance(layer, Experts):
            layer.every = recipe.experts == "all"
    model = _model(skeleton)
    plan = Plan(skeleton, method, model, method.format.assign(model, method.wanted()), where, team=join(where))
    refusals.linears(method, list(plan.matrices.values()))
    if not recipe.gguf:
        refuse_unlike(plan.linears, skeleton.model)
    warnings = [*source.warnings, *method.format.check(plan.possible(), plan.skipped), *plan.assigned.warnings]
    warnings += told(plan.limits)
    refusals.budget(plan)
    return _calibrated(dataclasses.replace(plan, warnings=warnings).told(recipe), recipe)


def _calibrated(plan: Plan, given: Recipe) -> Plan:
    """Return the plan, where no length of sequences is `given` with none that is longer than the model reads.

    Raises LlmqError for longer ones where the model has no position for them.
    """
    recipe, longest = plan.method.recipe, getattr(plan.skeleton.text, "max_position_embeddings", None)
    if not plan.calibrates() or not longest or (recipe.seq_len or 0) <= longest:
        return plan
    if given.seq_len is None:
        method = dataclasses.replace(plan.method, recipe=dataclasses.replace(recipe, seq_len=longest))
        return dataclasses.replace(plan, method=method)
    say = f"--seq-len {recipe.seq_len} is longer than the {longest} tokens that the model reads at once"
    if refusals.learns_positions(plan.skeleton, longest):
        raise LlmqError(f"{say}; give --seq-len {longest} or less")
    return dataclasses.replace(plan, warnings=[*plan.warnings, say])


def _model(skeleton: Skeleton) -> FloatModel:
    """Return what a format sees of a model."""
    source = skeleton.source
    return FloatModel(
        name=source.origin.name,
        folder=source.path,
        saved=source.config,
        config=skeleton.config,
        tokenizer=partial(tokenizer_of, source.path),
        shapes={n: shape for n, (_, shape) in source.headers().items() if n not in source.unread},
        linears=[n for n, _ in skeleton.linears()],
        head=skeleton.name_of(skeleton.model.get_output_embeddings()),
        embedding=skeleton.name_of(skeleton.model.get_input_embeddings()),
        written=source.written,
        carried=sorted(source.unread),
    )


def _compute_dtype(method: Method, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what activations are computed in; rotations and transforms edit the weights, which takes float32."""
    name, editing = method.recipe.dtype, (*method.rotations, *method.transforms)
    if editing and name == "bfloat16":
        raise LlmqError(f"{registry.dump(editing[0])} edits the weights before rounding, which takes --dtype float32")
    if name != "auto" or editing:
        return torch.float32 if name == "auto" else getattr(torch, name)
    return stored if device.type != "cpu" or (stored == torch.bfloat16 and _cpu_has_bfloat16()) else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Say whether this CPU multiplies bfloat16 matrices natively; without, it is slower than float32."""
    return "amx_bf16" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
