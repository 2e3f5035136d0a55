"""The main job: a float checkpoint in, a packed one out, one decoder block at a time.

    tokens -> [block: load, transform, solve site by site, refine, tune, pack, write, forward] -> join -> rename

Data goes one way: floats -> stats -> codes -> words -> shard.
Not here: what can be refused before (job.py), what happens inside a block (block.py), the suspended forwards
(stream.py), the files (checkpoint.py, publish.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq import calibration
from llmq.allocate import allocate
from llmq.block import Streams, accumulate, quantize_block, solve
from llmq.checkpoint import Sink
from llmq.gguf.pipeline import GgufSink
from llmq.job import Job
from llmq.publish import publish, publish_gguf, write_importance
from llmq.saliency import squared_gradients
from llmq.stream import Skeleton, embed
from llmq.types import LinearSpec, LlmqError, QTensor, Target

BATCH_TOKENS = 4096  # tokens of one suspended batch
_ROWS_AT_ONCE = 2**24  # weights of an embedding in float32 at a time
Progress = Callable[[int, int, str], None]
"""Called with blocks done, blocks in all and what is going on."""


def quantize(job: Job, out: Path, *, overwrite: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Run a prepared job and write OUT. Returns the content of its quantization.json.

    Raises LlmqError where calibration text is missing or too short, a block's linears are not called once each, or OUT
    cannot be written; OUT is then untouched.
    """
    report = progress or (lambda done, total, what: None)
    sink_class = GgufSink if job.gguf else Sink
    with sink_class(out, overwrite=overwrite) as sink, torch.no_grad():
        sink.require(2 * job.bytes())  # parts and the shards joined from them
        streams = _enter(job, report)
        job = allocate(job, streams, report)
        record: dict[str, Any] = {}
        for i in range(len(job.skeleton)):
            report(i, len(job.skeleton), f"block {i}")
            record |= quantize_block(job, i, streams, sink)
        what = "tuning the whole model, writing" if job.plan.finishers else "writing"
        report(len(job.skeleton), len(job.skeleton), what)
        record |= _outside(job, streams, sink)
        if streams.measured:
            write_importance(job, {n: (m.sum, m.count) for n, m in streams.measured.items() if m.sum is not None})
        if isinstance(sink, GgufSink):
            summary = publish_gguf(job, sink, record)
        else:
            summary = publish(job, sink, record, streams.tokens)
        sink.commit()
    return summary


def _enter(job: Job, report: Progress) -> Streams:
    """Return the calibration tokens as they enter block 0; empty where no step needs them."""
    if not job.calibrates():
        return Streams()
    from transformers import AutoTokenizer

    recipe = job.plan.recipe
    report(0, len(job.skeleton), f"calibration text: {recipe.calib}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(job.source.path, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise LlmqError(f"{job.source.path} has no tokenizer, which calibration needs; copy its tokenizer files") from e
    writer = partial(_writer, job)
    tokens = calibration.tokens(recipe.calib, tokenizer, recipe.samples, recipe.seq_len, recipe.seed, writer)
    hidden, calls = embed(job.skeleton, tokens, max(1, BATCH_TOKENS // recipe.seq_len), job.device)
    squares = {}
    if job.plan.weightings:
        squares = squared_gradients(job.skeleton, hidden, calls, job.device, recipe.seed, report)
    return Streams(hidden, hidden[: math.ceil(job.paired() * len(hidden))], calls, squares, tokens)


def _writer(job: Job) -> nn.Module:
    """Load the whole float model, so that it can write its own calibration text."""
    dtype, stored = job.skeleton.dtype, job.skeleton.stored_dtype  # writing in bfloat16 takes minutes without its units
    calibration.check_memory(job.source.bytes() * dtype.itemsize // stored.itemsize, job.device)
    return Skeleton(job.float_source, dtype).filled(job.device)


def _outside(job: Job, streams: Streams, sink: Sink) -> dict[str, Any]:
    """Write what belongs to no block: embeddings, final norm, head (quantized, if asked)."""
    head = job.head
    record: dict[str, Any] = {}
    for name in job.skeleton.outside():
        module = name.removesuffix(".weight")
        if module in job.rows:
            packed, record[module] = _round_rows(job, job.rows[module])
            sink.add({name: packed})
        elif module != head:
            sink.add({name: job.source.get(name)})
    if head is None:
        return record
    tied = f"{head}.weight" not in job.source
    embedding = job.skeleton.name_of(job.skeleton.model.get_input_embeddings())
    weight = job.source.get(f"{embedding}.weight" if tied else f"{head}.weight")
    target = Target(head, weight.to(job.device, torch.float32), job.linears[head].scheme.weight)
    stats = {c: c() for c in job.plan.needs([target.grid])}
    if stats:
        accumulate(stats, _normed(job, streams.hidden), _normed(job, streams.floats) if streams.floats else None)
    ((_, solved),) = solve(job, [target], stats)
    sink.add({f"{head}.{k}": v for k, v in job.plan.format.pack(solved.q, job.linears[head]).items()})
    return {head: dict(solved.report)}


def _round_rows(job: Job, linear: LinearSpec) -> tuple[Tensor, dict[str, Any]]:
    """Round an embedding or a head to nearest, some rows at a time; return its stored rows and its report line."""
    grid, weight = linear.scheme.weight, job.source.get(f"{linear.name}.weight")
    importance = job.gguf.importance.get(linear.name) if job.gguf else None
    step = max(1, _ROWS_AT_ONCE // linear.K)
    packed, error, energy = [], 0.0, 0.0
    for i in range(0, linear.N, step):
        W_nK = weight[i : i + step].float()
        params = grid.fit(W_nK, importance)
        codes = grid.nearest(W_nK, params.columns(linear.K)).to(torch.uint8)
        q = QTensor(codes, params, grid)
        (rows,) = job.plan.format.pack(q, linear).values()
        packed.append(rows)
        error += (q.dequantize() - W_nK).square().sum().item()
        energy += W_nK.square().sum().item()
    return torch.cat(packed), {"method": "rtn", "bits": grid.bits, "weight_error": error / max(energy, 1e-30)}


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
