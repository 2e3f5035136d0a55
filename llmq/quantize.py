"""The main job: a float checkpoint in, a packed one out, one decoder block at a time.

    prepare   everything that can be refused, before any work
    quantize  tokens -> [block: load, transform, solve site by site, pack, write, forward] -> join -> rename

Data goes one way: floats -> stats -> codes -> words -> shard. `stream.py` owns the suspended forwards, `checkpoint.py`
the files; this file decides what happens at each site.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq import __version__, calibration, card, spec
from llmq.checkpoint import Sink, Source, resolve
from llmq.grids.int import Int
from llmq.recipe import Plan, Recipe, check_patterns, plan
from llmq.stats import Hessian, Histogram
from llmq.stream import Call, Lanes, Skeleton, discover, embed, family_sites, refuse_other_matrices
from llmq.types import LinearSpec, LlmqError, Params, QTensor, Site, SiteView, Target

BATCH_TOKENS = 4096  # tokens of one suspended batch
Progress = Callable[[int, int, str], None]
"""Called with blocks done, blocks in all and what is going on."""


@dataclass
class Job:
    """A prepared run: what was read, what is planned, what a user should know before it starts."""

    source: Source
    skeleton: Skeleton
    plan: Plan
    linears: dict[str, LinearSpec]
    skipped: list[str]
    device: torch.device
    warnings: list[str] = field(default_factory=list)

    @property
    def head(self) -> str | None:
        """The full name of the output head, where it is quantized."""
        name = _head_name(self.skeleton)
        return name if name in self.linears else None

    def bytes(self) -> int:
        """Return the size of the weights that will be written."""
        fmt, quantized = self.plan.format, {f"{n}.weight" for n in self.linears}
        floats = sum(n for name, n in self.source.sizes().items() if name not in quantized)
        return floats + sum(card.packed_bytes(fmt, s) for s in self.linears.values())

    def calibrates(self) -> bool:
        """Say whether any step needs activations."""
        grids = [s.scheme.weight for s in self.linears.values()]
        static = any(s.scheme.activation and not s.scheme.activation.dynamic for s in self.linears.values())
        return bool(self.plan.transforms) or static or bool(self.plan.solver.needs(grids))


def prepare(src: str, recipe: Recipe, device: str = "auto") -> Job:
    """Read and plan. Raises LlmqError for everything that can be known to fail before any work."""
    source = Source(resolve(src))
    if "quantization_config" in source.config:
        raise LlmqError(f"{src} is quantized already; give the float checkpoint that it was made from")
    where = _device(device)
    stored = source.get(source.names()[0]).dtype
    steps = plan(recipe, stored)
    skeleton = Skeleton(source, _compute_dtype(steps, stored, where))
    refuse_other_matrices(skeleton.blocks[0])
    linears, skipped = {}, []
    for name, module in _linears(skeleton, with_head=recipe.lm_head):
        scheme = steps.scheme(name)
        if scheme is None:
            skipped.append(name)
        else:
            linears[name] = LinearSpec(name, module.out_features, module.in_features, scheme)
    check_patterns(recipe, [*linears, *skipped])
    if not linears:
        raise LlmqError("every linear is skipped; nothing to quantize")
    if not recipe.lm_head:
        skipped.append(_head_name(skeleton))
    warnings = steps.format.plan(list(linears.values()))
    source.check()
    return Job(source, skeleton, steps, linears, skipped, where, warnings)


def quantize(job: Job, out: Path, *, overwrite: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Run a prepared job and write OUT. Returns the content of its quantization.json.

    Raises LlmqError where calibration text is missing or too short, a block's linears are not called once each, or OUT
    cannot be written; OUT is then untouched.
    """
    report = progress or (lambda done, total, what: None)
    with Sink(out, overwrite=overwrite) as sink, torch.no_grad():
        sink.require(2 * job.bytes())  # parts and the shards joined from them
        hidden, calls = _first_hidden(job, report)
        record: dict[str, Any] = {}
        for i in range(len(job.skeleton)):
            report(i, len(job.skeleton), f"block {i}")
            hidden, lines = _block(job, i, hidden, calls, sink)
            record |= lines
        report(len(job.skeleton), len(job.skeleton), "writing")
        record |= _outside(job, hidden, sink)
        summary = _finish(job, sink, record)
        sink.commit()
    return summary


def _first_hidden(job: Job, report: Progress) -> tuple[list[Tensor], list[list[Call]]]:
    if not job.calibrates():
        return [], []
    from transformers import AutoTokenizer

    recipe = job.plan.recipe
    report(0, len(job.skeleton), f"calibration text: {recipe.calib}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(job.source.path, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise LlmqError(f"{job.source.path} has no tokenizer, which calibration needs; copy its tokenizer files") from e
    writer = partial(_writer, job)
    tokens = calibration.tokens(recipe.calib, tokenizer, recipe.samples, recipe.seq_len, recipe.seed, writer)
    return embed(job.skeleton, tokens, max(1, BATCH_TOKENS // recipe.seq_len), job.device)


def _writer(job: Job) -> nn.Module:
    """Load the whole float model, so that it can write its own calibration text."""
    from llmq.loading import load

    calibration.check_memory(job.source.bytes(), job.device)
    return load(job.source.path, device=job.device)


def _block(job: Job, i: int, hidden: list[Tensor], calls: list[list[Call]], sink: Sink) -> tuple[list[Tensor], dict]:
    prefix = f"{job.skeleton.prefix}.{i}."
    at = [c[i] for c in calls]
    with job.skeleton.loaded(i, job.device) as block:
        sites = _sites(job, block, hidden, at)
        record: dict[str, Any] = {}
        for step in job.plan.transforms:
            record |= _transform(job, step, block, sites, hidden, at, prefix)
        packed: dict[str, Tensor] = {}
        lanes = Lanes(block, sites, hidden, at) if hidden else None
        with lanes or nullcontext():
            for site in sites:
                solved = _solve_site(job, block, site, lanes, prefix)
                for name, (tensors, line) in solved.items():
                    packed |= tensors
                    record[name] = record.get(name, {}) | line
            last = i == len(job.skeleton) - 1 and job.head is None
            if lanes and not last:
                hidden = list(lanes.finish())
        sink.add(packed | _floats(job, block, prefix))
    return hidden, record


def _sites(job: Job, block: nn.Module, hidden: Sequence[Tensor], at: Sequence[Call]) -> tuple[Site, ...]:
    known = family_sites(job.skeleton.config.model_type, block)
    if known:
        return known
    if job.plan.transforms:
        names = ", ".join(spec.names("families"))
        raise LlmqError(
            f"model_type {job.skeleton.config.model_type!r} has no table of producers, which "
            f"{spec.dump(job.plan.transforms[0])} needs (there are: {names}); use rtn or gptq alone"
        )
    if hidden:
        return discover(block, hidden[0][:1], at[0])
    return tuple(Site((n,)) for n, m in block.named_modules() if isinstance(m, nn.Linear))


def _transform(
    job: Job, step: Any, block: nn.Module, sites: Sequence[Site], hidden: list[Tensor], at: list[Call], prefix: str
) -> dict[str, Any]:
    """Collect at every site of the float block, search all sites, then fold all."""
    modules = dict(block.named_modules())
    stats: list[dict[type, Any]] = []
    recorded: dict[str, list[Call]] = {}
    parents = {s.parent for s in sites if step.call_tokens and s.parent not in s.linears}
    hooks = [_record_calls(modules[p], p, recorded, step.call_tokens) for p in sorted(parents)]
    with Lanes(block, sites, hidden, at) as lanes:
        for site in sites:
            accumulators = {c: c() for c in step.needs(site)}
            for X_TK in lanes.advance():
                for a in accumulators.values():
                    a.update(X_TK)
            stats.append(accumulators)
    for hook in hooks:
        hook.remove()
    folds = []
    for site, found in zip(sites, stats, strict=True):
        if found:
            grids = [s.scheme.weight if (s := job.linears.get(prefix + n)) else None for n in site.linears]
            calls = recorded.get(site.parent, [])
            head_dim = _head_dim(job.skeleton.config)
            view = SiteView(site, modules, found, calls, grids, job.skeleton.stored_dtype, head_dim)
            folds.append((site, step.search(view)))
    return {prefix + n: line for site, apply in folds if apply for line in [apply()] for n in site.linears}


def _record_calls(module: nn.Module, name: str, into: dict[str, list[Call]], tokens: int) -> Any:
    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        kept = into.setdefault(name, [])
        if len(kept) * x.shape[:-1].numel() < tokens:
            kept.append((args, kwargs))

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def _solve_site(
    job: Job, block: nn.Module, site: Site, lanes: Lanes | None, prefix: str
) -> dict[str, tuple[dict[str, Tensor], dict[str, Any]]]:
    """Accumulate what the solver needs, solve, put the quantized weights in place; tensors and a report line each."""
    specs = {n: job.linears[prefix + n] for n in site.linears if prefix + n in job.linears}
    static = any(s.scheme.activation and not s.scheme.activation.dynamic for s in specs.values())
    grids = [s.scheme.weight for s in specs.values()]
    needs = {*(job.plan.solver.needs(grids) if specs else ()), *((Histogram,) if static else ())}
    stats = {c: c() for c in sorted(needs, key=lambda c: c.__name__)}
    if lanes:
        for X_TK in lanes.advance():
            for a in stats.values():
                a.update(X_TK)
    if not specs:
        return {}
    modules: dict[str, Any] = {n: block.get_submodule(n) for n in specs}
    targets = [Target(n, modules[n].weight.detach().float(), s.scheme.weight) for n, s in specs.items()]
    inputs = _input_params(job, stats[Histogram]) if static else None
    out = {}
    for target, solved in zip(targets, job.plan.solver.solve(targets, stats), strict=True):
        q = QTensor(solved.q.codes, solved.q.params, solved.q.grid, solved.q.g_idx, inputs)
        W_NK = q.dequantize()
        line = _report(job, target, W_NK, stats.get(Hessian)) | solved.report
        modules[target.name].weight.data = W_NK.to(job.skeleton.dtype)
        name = prefix + target.name
        out[name] = ({f"{name}.{k}": v for k, v in job.plan.format.pack(q, specs[target.name]).items()}, line)
    return out


def _report(job: Job, target: Target, decoded: Tensor, hessian: Hessian | None) -> dict[str, Any]:
    """Return the squared error relative to the energy: of the output over the calibration, else of the weight."""
    W_NK, E_NK = target.W_NK, decoded - target.W_NK
    line: dict[str, Any] = {"method": spec.dump(job.plan.solver), "bits": target.grid.bits}
    if hessian is None or hessian.sum is None:
        return line | {"weight_error": (E_NK.square().sum() / W_NK.square().sum().clamp(min=1e-30)).item()}
    H_KK = hessian.mean()
    energy = ((W_NK @ H_KK) * W_NK).sum().clamp(min=1e-30)
    return line | {"output_error": (((E_NK @ H_KK) * E_NK).sum() / energy).item()}


def _input_params(job: Job, histogram: Histogram) -> Params:
    """Return the static int8 grid of a site's input, `[1]` each, scale in the format's dtype."""
    range_ = spec.load("ranges", job.plan.recipe.act_range)
    scale_dtype = job.plan.format.scale_dtype(job.skeleton.stored_dtype)
    grid = Int(8, True, None, scale_dtype=scale_dtype, range=range_)
    values, counts = histogram.values()
    lo, hi = range_.interval(values[None], grid, counts[None])
    return grid.params(lo, hi)


def _floats(job: Job, block: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Return the block's tensors that stay float, in the stored dtype: norms, biases, skipped linears."""
    quantized = {n.removeprefix(prefix) + ".weight" for n in job.linears if n.startswith(prefix)}
    return {prefix + n: t.to(job.skeleton.stored_dtype) for n, t in block.state_dict().items() if n not in quantized}


def _outside(job: Job, hidden: list[Tensor], sink: Sink) -> dict[str, Any]:
    """Write what belongs to no block: embeddings, final norm, head (quantized, if asked)."""
    head = job.head
    for name in job.skeleton.outside():
        if head is None or name != f"{head}.weight":
            sink.add({name: job.source.get(name)})
    if head is None:
        return {}
    tied = f"{head}.weight" not in job.source
    embedding = next(n for n, m in job.skeleton.model.named_modules() if m is job.skeleton.model.get_input_embeddings())
    weight = job.source.get(f"{embedding}.weight" if tied else f"{head}.weight")
    target = Target(head, weight.to(job.device, torch.float32), job.linears[head].scheme.weight)
    stats = {c: c() for c in job.plan.solver.needs([target.grid])}
    for X_TK in _normed(job, hidden) if stats else ():
        for a in stats.values():
            a.update(X_TK)
    (solved,) = job.plan.solver.solve([target], stats)
    line = _report(job, target, solved.q.dequantize(), stats.get(Hessian)) | solved.report
    sink.add({f"{head}.{k}": v for k, v in job.plan.format.pack(solved.q, job.linears[head]).items()})
    return {head: line}


def _normed(job: Job, hidden: list[Tensor]) -> Iterator[Tensor]:
    """Yield the head's input, batch by batch: the last block's output behind the final norm."""
    owner = job.skeleton.model.get_submodule(job.skeleton.prefix.rpartition(".")[0])
    norm = getattr(owner, "norm", None)
    if norm is None:
        raise LlmqError("the final norm of this architecture is not known; leave the head float (no --lm-head)")
    weight = job.source.get(f"{job.skeleton.prefix.rpartition('.')[0]}.norm.weight")
    norm.weight = nn.Parameter(weight.to(job.device, job.skeleton.dtype), requires_grad=False)
    for h in hidden:
        yield norm(h).reshape(-1, h.shape[-1])


def _finish(job: Job, sink: Sink, record: dict[str, Any]) -> dict[str, Any]:
    """Join the shards and write config, recipe, records and model card. Returns quantization.json's content."""
    recipe, fmt = job.plan.recipe, job.plan.format
    qconfig = fmt.config(list(job.linears.values()), job.skipped)
    config = job.source.config | {"quantization_config": qconfig}
    if job.head is not None:
        config["tie_word_embeddings"] = False
    sink.copy_files(job.source.path)
    sink.text("config.json", json.dumps(config, indent=2) + "\n")
    if qconfig["quant_method"] == "gptq":
        sink.text("quantize_config.json", json.dumps(qconfig, indent=2) + "\n")
    sink.text("recipe.yaml", recipe.to_yaml())
    total = sink.join()
    summary = {
        "llmq": __version__,
        "torch": str(torch.__version__),
        "device": job.device.type,
        "dtype": str(job.skeleton.dtype).removeprefix("torch."),
        "recipe": json.loads(json.dumps(recipe.__dict__)),
        "warnings": job.warnings,
        "size": card.size(job.linears.values(), fmt, total, job.source.bytes()),
        "linears": record,
    }
    sink.text("quantization.json", json.dumps(summary, indent=2) + "\n")
    sink.text("README.md", card.model_card(job.source.path.name, summary, config))
    return summary


def _linears(skeleton: Skeleton, *, with_head: bool) -> Iterator[tuple[str, nn.Linear]]:
    yield from skeleton.linears()
    head = skeleton.model.get_output_embeddings()
    if with_head and isinstance(head, nn.Linear):
        yield _head_name(skeleton), head


def _head_name(skeleton: Skeleton) -> str:
    head = skeleton.model.get_output_embeddings()
    return next((n for n, m in skeleton.model.named_modules() if m is head), "lm_head")


def _head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        raise LlmqError(
            f"device {name!r} cannot be used ({str(e).partition(chr(10))[0]}); say cpu, cuda or auto"
        ) from e
    return device


def _compute_dtype(steps: Plan, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return what activations are computed in; transforms edit the weights, which takes float32."""
    name = steps.recipe.dtype
    if steps.transforms and name == "bfloat16":
        raise LlmqError(f"{spec.dump(steps.transforms[0])} folds scales into weights, which takes --dtype float32")
    if name != "auto" or steps.transforms:
        return torch.float32 if name == "auto" else getattr(torch, name)
    return stored if device.type != "cpu" or (stored == torch.bfloat16 and _cpu_has_bfloat16()) else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Say whether this CPU multiplies bfloat16 matrices natively; without, it is slower than float32."""
    return "amx_bf16" in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False
