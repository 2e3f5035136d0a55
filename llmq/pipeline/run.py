"""The run: a float checkpoint in, a packed one out, one decoder block at a time.

    tokens -> [block: load, transform, solve site by site, refine, tune, pack, write, forward]
           -> join -> finish -> record -> verify -> seal (synced, marked whole) -> commit (exchanged with OUT)

Data goes one way: floats -> stats -> codes -> words -> shard. What a finisher moves afterwards, the scales and norms of
the whole model, is put into the shards and measured anew.
Not here: what can be refused before (plan.py), what happens inside a block (block.py), the suspended forwards
(model/lanes.py), the files (checkpoint/), what is said of them (report.py).
"""

import math
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmq import calibration
from llmq.calibration.dealing import Dealt
from llmq.calibration.state import BATCH_TOKENS, Calibration, Probe
from llmq.calibration.token_gradients import squared_gradients
from llmq.checkpoint import Scratch, Sink
from llmq.checkpoint.batches import Batches
from llmq.model.ends import embed, of_their_own
from llmq.model.folding import Folded
from llmq.model.pretrained import check_ids, tokenizer_of
from llmq.model.skeleton import Skeleton
from llmq.pipeline.allocate import allocate
from llmq.pipeline.block import quantize_block, reads
from llmq.pipeline.loaded import Report
from llmq.pipeline.plan import Plan
from llmq.pipeline.records import Line, Record, rounded
from llmq.pipeline.report import summary, write_importance
from llmq.pipeline.sinks import IMATRIX, sink_of
from llmq.pipeline.whole_model import check_memory, finish
from llmq.progress import Work
from llmq.stats import MeanSquare
from llmq.types import LinearSpec, QTensor
from llmq.verify import require_right

PROBE_TOKENS = 9  # of one sequence, by which it is found which linears read what


def quantize(
    plan: Plan, out: Path, *, overwrite: bool = False, check: bool = True, work: Work | None = None
) -> dict[str, Any]:
    """Run a prepared plan and write OUT. Returns the content of its quantization.json.

    check: whether what was written is verified before it becomes OUT (verify/). work: is told how it goes on.
    Raises LlmqError where calibration text is missing or too short, a block's linears are not called once each, OUT
    cannot be written, or what was written is not what was solved; OUT is then untouched.
    """
    work = work or Work()
    blocks = len(plan.skeleton)
    with sink_of(plan, out, overwrite=overwrite) as sink, torch.no_grad():
        if sink.earlier is not None:
            sink.commit()
            return sink.earlier
        sink.require(sum(plan.disk().values()))
        if plan.method.finishers:
            check_memory(plan)
        state = _enter(plan, sink.room / "states", work)
        plan = allocate(plan, state, work)
        done = _Done(Scratch(sink.room / "hessians"))
        for i, read in enumerate(reads(plan)):
            work(i, blocks, f"block {i}")
            tensors, known, state = quantize_block(plan, i, state, work, read)
            work.step("write")
            sink.add(plan.staged(tensors))
            done.add(known)
            shutil.rmtree(sink.room / "states" / f"{i:05d}", ignore_errors=True)
        work(blocks, blocks, "embeddings and head")
        _outside(plan, state, sink, done, work)
        if done.importance:
            write_importance(plan, sink.staged_beside(IMATRIX), done.importance)
        recipe = plan.method.recipe.to_yaml()
        work(blocks, blocks, "writing")
        total = plan.assigned.join(sink, plan.config(), recipe)
        if plan.method.finishers:
            work(blocks, blocks, "tuning the whole model")
            _finish(plan, state, sink, done)
        record = plan.assigned.close(sink, summary(plan, done.record, total, sink.digests), recipe)
        if check:
            work(blocks, blocks, "verifying")
            require_right(sink.whole, progress=work)
        sink.seal(record)
        sink.commit()
    return record


@dataclass
class _Done:
    """What is known of the blocks so far, H of their linears on the disk."""

    hessians: Scratch
    record: Record = field(default_factory=Record)
    importance: dict[str, MeanSquare] = field(default_factory=dict)

    def add(self, known: Report) -> None:
        """Add a block."""
        self.record.add(known.record)
        self.importance |= known.importance
        for names, H_KK in known.hessians.items():
            self.hessians.keep(names, H_KK)


def _enter(plan: Plan, states: Path, work: Work) -> Calibration:
    """Return the calibration tokens as they enter block 0; empty where no step needs them.

    states: where the hidden states between two blocks lie.
    """
    if not plan.calibrates():
        return Calibration()
    recipe = plan.method.recipe
    work(0, len(plan.skeleton), f"calibration text: {recipe.calib}")
    tokenizer = tokenizer_of(plan.source.path)
    writer = partial(_writer, plan)
    how = (recipe.samples, recipe.seq_len, recipe.seed)
    ids = calibration.tokens(recipe.calib, tokenizer, *how, writer, plan.warnings.append)
    check_ids(ids, plan.skeleton.model)
    batches = ids.split(max(1, BATCH_TOKENS // recipe.seq_len))
    (*hidden, short), (*calls, call) = embed(plan.skeleton, [*batches, ids[:1, :PROBE_TOKENS]], plan.device)
    squares = {}
    if plan.method.weightings:
        squares = squared_gradients(plan.skeleton, hidden, calls, plan.device, recipe.seed, work)
    floats = hidden[: math.ceil(plan.paired() * len(hidden))]
    apart = [of_their_own(c) for c in calls[: len(floats)]]
    first = states / "00000"
    return Calibration(
        Batches(first, "hidden", range(len(hidden)), plan.device).filled(hidden),
        Batches(first, "floats", range(len(floats)), plan.device).filled(floats),
        calls,
        apart,
        squares,
        ids,
        Probe(short, call),
        Dealt.of([b.numel() for b in batches]),
    )


def _writer(plan: Plan) -> nn.Module:
    """Load the whole float model, so that it can write its own calibration text."""
    dtype, stored = plan.skeleton.dtype, plan.skeleton.stored_dtype  # bfloat16 takes minutes without its units
    calibration.check_memory(plan.source.bytes() * dtype.itemsize // stored.itemsize, plan.device)
    return Skeleton(plan.float_source, dtype).filled(plan.device)


def _finish(plan: Plan, state: Calibration, sink: Sink, done: _Done) -> None:
    """Run the finishers on the staged checkpoint, put what they moved into it, and record its errors anew."""
    record, seed = done.record, plan.method.recipe.seed
    found = finish(plan.method.finishers, sink.stage, plan.float_source, state.ids, seed, plan.device)
    record.finished, record.tuned = found.report, sorted(found.norms)
    sink.replace(plan.staged(found.norms).items())
    floats = Folded(plan.source, record.folds, plan.linears)
    for name, q in found.linears.items():
        sink.replace(plan.staged(plan.packed(name, q)).items())
        W_NK = floats.get(plan.weight_of(name)).to(plan.device, torch.float32)
        H_KK = done.hessians.get(name)
        line = Line().add(q, q.dequantize(), W_NK, None if H_KK is None else H_KK.to(plan.device))
        record.note(name, line.to_json())
    done.hessians.drop()


def _outside(plan: Plan, state: Calibration, sink: Sink, done: _Done, work: Work) -> None:
    """Write what belongs to no block: embeddings, final norm, head (quantized, if asked)."""
    for name in plan.skeleton.outside():
        module = name.removesuffix(".weight")
        if module in plan.rows:
            packed, line = _rounded(plan, plan.rows[module])
            done.record.note(module, line)
            sink.add(plan.staged({name: packed}))
        elif module != plan.head:
            sink.add(plan.staged({name: plan.source.get(name)}))
    if plan.head is not None:
        tensors, known, _ = quantize_block(plan, len(plan.skeleton), state, work)
        sink.add(plan.staged(tensors))
        done.add(known)


def _rounded(plan: Plan, linear: LinearSpec) -> tuple[Tensor, dict[str, Any]]:
    """Round an embedding or a head to nearest; return its stored rows and its report line."""
    weight, importance = plan.source.get(f"{linear.name}.weight"), plan.assigned.importance.get(linear.name)

    def pack(q: QTensor) -> Tensor:
        (stored,) = plan.method.format.pack(q, linear).values()
        return stored

    rows, line = rounded(weight, linear.scheme.weight, pack, importance)
    return rows, {"method": "rtn", "bits": linear.scheme.weight.bits, **line}
