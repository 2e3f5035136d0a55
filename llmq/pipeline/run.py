"""The main plan: a float checkpoint in, a packed one out, one decoder block at a time.

    tokens -> [block: load, transform, solve site by site, refine, tune, pack, write, forward]
           -> join -> finish -> record -> verify -> seal (synced, marked whole) -> commit (exchanged with OUT)

Data goes one way: floats -> stats -> codes -> words -> shard. What a finisher moves afterwards, the scales and norms of
the whole model, is put into the shards and measured anew.
Not here: what can be refused before (plan.py), what happens inside a block (block.py), the suspended forwards
(skeleton.py), the files (checkpoint/, report.py).
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
from llmq.calibration.token_gradients import squared_gradients
from llmq.checkpoint import Scratch, Sink
from llmq.gguf.pipeline import GgufSink
from llmq.model.folding import Folded
from llmq.model.pretrained import check_ids, tokenizer_of
from llmq.model.skeleton import Skeleton, embed
from llmq.pipeline.allocate import allocate
from llmq.pipeline.block import Streams, accumulate, mean_of, quantize_block, recorded, solve
from llmq.pipeline.plan import Plan
from llmq.pipeline.records import Line, Record
from llmq.pipeline.report import publish_gguf, publish_model, publish_record, write_importance
from llmq.pipeline.sinks import IMATRIX, sink_of
from llmq.pipeline.whole_model import check_memory, finish
from llmq.types import LinearSpec, QTensor, Target
from llmq.verify import require_right

BATCH_TOKENS = 4096  # tokens of one suspended batch
_ROWS_AT_ONCE = 2**24  # weights of an embedding in float32 at a time
Progress = Callable[[int, int, str], None]
"""Called with blocks done, blocks in all and what is going on."""


def quantize(
    plan: Plan, out: Path, *, overwrite: bool = False, check: bool = True, progress: Progress | None = None
) -> dict[str, Any]:
    """Run a prepared plan and write OUT. Returns the content of its quantization.json.

    check: whether what was written is verified before it becomes OUT (verify/).
    Raises LlmqError where calibration text is missing or too short, a block's linears are not called once each, OUT
    cannot be written, or what was written is not what was solved; OUT is then untouched.
    """
    report = progress or (lambda done, total, what: None)
    blocks = len(plan.skeleton)
    with sink_of(plan, out, overwrite=overwrite) as sink, torch.no_grad():
        if sink.earlier is not None:
            sink.commit()
            return sink.earlier
        sink.require(2 * plan.bytes() + _set_aside(plan))  # parts and the shards joined from them
        if plan.method.finishers:
            check_memory(plan)
        streams = _enter(plan, report)
        plan = allocate(plan, streams, report)
        if plan.method.finishers:
            streams.hessians = Scratch(sink.room / "hessians")
        record = Record()
        for i in range(blocks):
            report(i, blocks, f"block {i}")
            record.add(quantize_block(plan, i, streams, sink))
        record.add(_outside(plan, streams, sink))
        if streams.measured:
            sums = {n: (m.sum, m.count) for n, m in streams.measured.items() if m.sum is not None}
            write_importance(plan, sink.staged_beside(IMATRIX), sums)
        if isinstance(sink, GgufSink):
            report(blocks, blocks, "writing")
            summary = publish_gguf(plan, sink, record)
        else:
            total = publish_model(plan, sink)
            if streams.hessians is not None:
                report(blocks, blocks, "tuning the whole model")
                _finish(plan, streams, sink, record)
                streams.hessians.drop()
            report(blocks, blocks, "writing")
            summary = publish_record(plan, sink, record, total)
        if check:
            report(blocks, blocks, "verifying")
            require_right(sink.files()[0] if plan.gguf else sink.stage)
        sink.seal(summary)
        sink.commit()
    return summary


def _set_aside(plan: Plan) -> int:
    """Return the bytes of what finishers need beside the weights: a Hessian for each linear at most."""
    return sum(4 * s.K**2 for s in plan.linears.values()) if plan.method.finishers else 0


def _enter(plan: Plan, report: Progress) -> Streams:
    """Return the calibration tokens as they enter block 0; empty where no step needs them."""
    if not plan.calibrates():
        return Streams()
    recipe = plan.method.recipe
    report(0, len(plan.skeleton), f"calibration text: {recipe.calib}")
    tokenizer = tokenizer_of(plan.source.path)
    writer = partial(_writer, plan)
    how = (recipe.samples, recipe.seq_len, recipe.seed)
    tokens = calibration.tokens(recipe.calib, tokenizer, *how, writer, plan.warnings.append)
    check_ids(tokens, plan.skeleton.model)
    hidden, calls = embed(plan.skeleton, tokens, max(1, BATCH_TOKENS // recipe.seq_len), plan.device)
    squares = {}
    if plan.method.weightings:
        squares = squared_gradients(plan.skeleton, hidden, calls, plan.device, recipe.seed, report)
    return Streams(hidden, hidden[: math.ceil(plan.paired() * len(hidden))], calls, squares, tokens)


def _writer(plan: Plan) -> nn.Module:
    """Load the whole float model, so that it can write its own calibration text."""
    dtype, stored = (
        plan.skeleton.dtype,
        plan.skeleton.stored_dtype,
    )  # writing in bfloat16 takes minutes without its units
    calibration.check_memory(plan.source.bytes() * dtype.itemsize // stored.itemsize, plan.device)
    return Skeleton(plan.float_source, dtype).filled(plan.device)


def _finish(plan: Plan, streams: Streams, sink: Sink, record: Record) -> None:
    """Run the finishers on the staged checkpoint, put what they moved into it, and record its errors anew."""
    done = finish(
        plan.method.finishers, sink.stage, plan.float_source, streams.tokens, plan.method.recipe.seed, plan.device
    )
    record.finished, record.tuned = done.report, sorted(done.norms)
    sink.replace(done.norms.items())
    floats = Folded(plan.source, record.folds, plan.linears)
    for name, q in done.linears.items():
        sink.replace((f"{name}.{k}", t) for k, t in plan.method.format.pack(q, plan.linears[name]).items())
        W_NK = floats.get(plan.weight_of(name)).to(plan.device, torch.float32)
        H_KK = streams.hessians.get(name) if streams.hessians is not None else None
        line = Line().add(q, q.dequantize(), W_NK, None if H_KK is None else H_KK.to(plan.device))
        record.note(name, line.to_json())


def _outside(plan: Plan, streams: Streams, sink: Sink) -> Record:
    """Write what belongs to no block: embeddings, final norm, head (quantized, if asked)."""
    head = plan.head
    record = Record()
    for name in plan.skeleton.outside():
        module = name.removesuffix(".weight")
        if module in plan.rows:
            packed, line = _round_rows(plan, plan.rows[module])
            record.note(module, line)
            sink.add({name: packed})
        elif module != head:
            sink.add({plan.source.written(name): plan.source.get(name)})
    if head is None:
        return record
    W_NK = plan.source.get(plan.weight_of(head)).to(plan.device, torch.float32)
    target = Target(head, W_NK, plan.linears[head].scheme.weight)
    stats = {c: c() for c in plan.method.needs([target.grid])}
    if stats:
        accumulate(stats, _normed(plan, streams.hidden), _normed(plan, streams.floats) if streams.floats else None)
    ((_, solved),) = solve(plan, [target], stats)
    H_KK = mean_of(stats)
    if streams.hessians is not None and H_KK is not None:
        streams.hessians.keep([head], H_KK)
    record.note(head, recorded(plan, solved, solved.q.dequantize(), W_NK, H_KK).report)
    sink.add({f"{head}.{k}": v for k, v in plan.method.format.pack(solved.q, plan.linears[head]).items()})
    return record


def _round_rows(plan: Plan, linear: LinearSpec) -> tuple[Tensor, dict[str, Any]]:
    """Round an embedding or a head to nearest, some rows at a time; return its stored rows and its report line."""
    grid, weight = linear.scheme.weight, plan.source.get(f"{linear.name}.weight")
    importance = plan.gguf.importance.get(linear.name) if plan.gguf else None
    packed: list[Tensor] = []
    line = Line()
    for rows in weight.split(max(1, _ROWS_AT_ONCE // linear.K)):
        W_nK = rows.float()
        q = QTensor.rounded(W_nK, grid, importance)
        packed += plan.method.format.pack(q, linear).values()
        line.add(q, q.dequantize(), W_nK)
    return torch.cat(packed), {"method": "rtn", "bits": grid.bits, **line.to_json()}


def _normed(plan: Plan, hidden: list[Tensor]) -> Iterator[Tensor]:
    """Yield the head's input, batch by batch: the last block's output behind the final norm."""
    owner = plan.skeleton.model.get_submodule(plan.skeleton.prefix.rpartition(".")[0])
    norm: Any = owner.norm
    weight = plan.source.get(f"{plan.skeleton.prefix.rpartition('.')[0]}.norm.weight")
    norm.weight = nn.Parameter(weight.to(plan.device, plan.skeleton.dtype), requires_grad=False)
    for h in hidden:
        yield norm(h).reshape(-1, h.shape[-1])
