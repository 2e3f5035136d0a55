"""The run: a float checkpoint in, a packed one out, one decoder block at a time.

    tokens -> [block: load, transform, solve site by site, refine, tune, pack, write, forward]
           -> join -> finish -> record -> verify -> seal (synced, marked whole) -> commit (exchanged with OUT)

Data goes one way: floats -> stats -> codes -> words -> shard. What a finisher moves afterwards, the scales and norms of
the whole model, is put into the shards and measured anew. What each block leaves is kept in a journal: the same command
goes on behind the last block that it tells of, and all that comes after the blocks is done again. Where a GPU computes,
a block is written, and journalled, while the next is solved (aside.py).
Not here: what can be refused before (plan.py), what happens inside a block (block.py), the suspended forwards
(model/lanes.py), what enters the first (entering.py), the files (checkpoint/), what is said of them (report.py).
"""

import dataclasses
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.aside import behind
from llmq.calibration import handed
from llmq.calibration.state import Calibration
from llmq.checkpoint import Journal, Sink
from llmq.checkpoint.stage import JOURNAL
from llmq.model.folding import Folded
from llmq.pipeline.allocate import allocate
from llmq.pipeline.block import quantize_block, reads
from llmq.pipeline.entering import entering
from llmq.pipeline.known import Known, kept
from llmq.pipeline.loaded import Report
from llmq.pipeline.plan import Plan
from llmq.pipeline.records import Line, rounded
from llmq.pipeline.report import summary, write_importance
from llmq.pipeline.sinks import IMATRIX, sink_of, where
from llmq.pipeline.whole_model import check_memory, finish
from llmq.progress import Work
from llmq.types import LinearSpec, QTensor
from llmq.verify import require_right

log = logging.getLogger(__name__)


def quantize(
    plan: Plan, out: Path, *, overwrite: bool = False, check: bool = True, work: Work | None = None
) -> dict[str, Any]:
    """Run a prepared plan and write OUT. Returns the content of its quantization.json.

    check: whether what was written is verified before it becomes OUT (verify/). work: is told how it goes on.
    Of several processes the first one writes; all return the same.
    Raises LlmqError where calibration text is missing or too short, a block's linears are not called once each, OUT
    cannot be written, or what was written is not what was solved; OUT is then untouched.
    """
    work, team = work or Work(), plan.team
    with torch.no_grad():
        if not team.leads:
            _follow(plan, work)
            return team.first(dict)
        with sink_of(plan, out, overwrite=overwrite) as sink:
            record = _committed(plan, sink) if sink.earlier is not None else _led(plan, sink, work, check=check)
        return team.first(lambda: record)


def _committed(plan: Plan, sink: Sink) -> dict[str, Any]:
    """Put the result of an earlier run of this very command in place; the others have nothing to do."""
    plan.team.first(lambda: None)
    sink.commit()
    return sink.earlier or {}


def _led(plan: Plan, sink: Sink, work: Work, *, check: bool) -> dict[str, Any]:
    """Quantize, with the other processes, and write OUT. Returns the record."""
    blocks = len(plan.skeleton)
    journal = _resumed(sink, blocks)
    sink.require(sum(plan.disk().values()))
    if plan.method.finishers:
        check_memory(plan)
    plan.team.first(lambda: (journal.folder, journal.steps))
    state = entering(plan, journal, work)
    plan = allocate(plan, state, journal, work)
    known = _blocks(plan, state, sink, journal, work)
    if known.importance:
        write_importance(plan, sink.staged_beside(IMATRIX), known.importance)
    recipe = plan.method.recipe.to_yaml()
    work(blocks, blocks, "writing")
    total = plan.assigned.join(sink, plan.config(), recipe)
    if plan.method.finishers:
        work(blocks, blocks, "tuning the whole model")
        _finish(plan, state.ids, sink, known, journal)
    record = summary(plan, known.record, total, sink.digests)
    record = plan.assigned.close(sink, record, recipe, plan.readers(list(plan.matrices.values())))
    if check:
        work(blocks, blocks, "verifying")
        require_right(sink.whole, progress=work)
    sink.seal(record)
    sink.commit()
    return record


def _follow(plan: Plan, work: Work) -> None:
    """Take part in a run that the first process leads and writes."""
    told: tuple[Path, int] | None = plan.team.first(lambda: None)
    if told is None:
        return
    journal = Journal.followed(*told)
    state = entering(plan, journal, work)
    plan = allocate(plan, state, journal, work)
    for _ in _solved(plan, state, journal.steps, work):
        pass


def _resumed(sink: Sink, blocks: int) -> Journal:
    """Return the journal of the run, in which an earlier run of the same command may have finished blocks."""
    journal = Journal(sink.room / JOURNAL)
    sink.go_back(journal.parts)
    sink.promise = partial(_promise, journal, blocks, overwrite=sink.overwrite)
    if sink.goes_on:
        log.warning("going on from %s", where(journal.steps, blocks))
    _tell_threads(journal)
    return journal


def _tell_threads(journal: Journal) -> None:
    """Keep how many threads compute, by which products are rounded; say so where an earlier run had another number."""
    threads = torch.get_num_threads()
    before = journal.read("threads")
    if before is None:
        journal.keep("threads", {}, {"threads": threads})
    elif (then := before.facts["threads"]) != threads:
        log.warning("this run began with %d threads, not %d, which may change bits; set OMP_NUM_THREADS", then, threads)


def _promise(journal: Journal, blocks: int, *, overwrite: bool) -> str:
    """Return what an error says of the work so far; nothing where none would be missed."""
    if not journal.steps and not journal.made:
        return ""
    anew = "" if overwrite else "; --overwrite begins anew"
    return f"the same command goes on from {where(journal.steps, blocks)}{anew}"


def _blocks(plan: Plan, state: Calibration, sink: Sink, journal: Journal, work: Work) -> Known:
    """Write the blocks that are not done, then what belongs to none; return what is known of all."""
    known = Known()
    shapes = {n: shape for n, (_, shape) in plan.source.headers().items()}
    for i in range(journal.steps):
        known.add(journal.step(i), shapes)

    def write(i: int, tensors: dict[str, Tensor], report: Report) -> None:
        if i == len(plan.skeleton):
            report.record.linears = _outside(plan, sink) | report.record.linears
        if tensors:
            sink.add(plan.staged(tensors))
        known.add(journal.advance(*kept(report), sink.parts), shapes)

    with behind(plan.device) as do:
        for i, tensors, report in _solved(plan, state, journal.steps, work):
            work.step("write")
            do(partial(write, i, tensors, report))
            del tensors, report  # nobody holds them while the next block is solved
    return known


def _solved(plan: Plan, state: Calibration, first: int, work: Work) -> Iterator[tuple[int, dict[str, Tensor], Report]]:
    """Quantize block by block, together with the other processes; yield its number, its tensors, what is known of it.

    A head that the method solves is the last one, of which there is nothing where it does not. A block is yielded when
    all processes have written the state behind it.
    """
    blocks = len(plan.skeleton)
    for i, read in zip(range(first, blocks), reads(plan, first), strict=True):
        work(i, blocks, f"block {i}")
        tensors, report, state = quantize_block(plan, i, state, work, read)
        handed.keep(state)
        plan.team.meet()
        yield i, tensors, report
        del tensors, report
    if first <= blocks:
        work(blocks, blocks, "embeddings and head")
        tensors, report = ({}, Report()) if plan.head is None else quantize_block(plan, blocks, state, work)[:2]
        yield blocks, tensors, report


def _finish(plan: Plan, ids: Tensor, sink: Sink, known: Known, journal: Journal) -> None:
    """Run the finishers on the staged checkpoint, put what they moved into it, and record its errors anew."""
    record, seed = known.record, plan.method.recipe.seed
    found = finish(plan.method.finishers, sink.stage, plan.float_source, ids, seed, plan.device, journal)
    record.finished, record.tuned = found.report, sorted(found.norms)
    sink.replace(plan.staged(found.norms).items())
    floats = Folded(plan.source, record.folds, plan.linears)
    for name, q in found.linears.items():
        sink.replace(plan.staged(plan.packed(name, q)).items())
        W_NK = floats.get(plan.weight_of(name)).to(plan.device, torch.float32)
        H_KK = known.hessians[name].read().to(plan.device) if name in known.hessians else None
        record.note(name, Line().add(q, q.dequantize(), W_NK, H_KK).to_json())


def _outside(plan: Plan, sink: Sink) -> dict[str, dict[str, Any]]:
    """Write what belongs to no block, but for a head that the method solves; return the lines of what was rounded."""
    lines = {}
    for name in plan.skeleton.outside():
        module = name.removesuffix(".weight")
        if module in plan.rows:
            packed, lines[module] = _rounded(plan, plan.rows[module])
            sink.add(plan.staged({f"{module}.{local}": t for local, t in packed.items()}))
        elif module != plan.head:
            sink.add(plan.staged({name: plan.source.get(name)}))
    return lines


def _rounded(plan: Plan, linear: LinearSpec) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Round an embedding or a head to nearest; return its packed tensors by local names, and its report line."""
    weight, importance = plan.source.get(f"{linear.name}.weight"), plan.assigned.importance.get(linear.name)
    form, parts = plan.method.format, list[dict[str, Tensor]]()

    def pack(q: QTensor) -> None:
        parts.append(form.pack(q, dataclasses.replace(linear, N=len(q.codes))))

    line = rounded(weight, linear.scheme.weight, pack, importance)
    return form.stacked(parts), {"method": "rtn", "bits": linear.scheme.weight.bits, **line}
