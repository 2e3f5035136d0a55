"""The calibration as it enters the blocks: the first, or the one at which a run goes on.

    tokens -> embeddings -> the hidden states that enter block 0, and the other arguments of every block's call

An earlier run of the same command has left hidden states, tokens' weights and text that the model wrote (journal.py);
the arguments of the calls are computed anew, which is cheap and gives the same.
Not here: what happens inside a block (block.py), the text (calibration/).
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from torch import Tensor, nn

from llmq import blend, calibration
from llmq.calibration import handed
from llmq.calibration.dealing import Dealt
from llmq.calibration.state import BATCH_TOKENS, Calibration, Probe
from llmq.calibration.token_gradients import seed_of, squared_gradients
from llmq.checkpoint import Journal
from llmq.checkpoint.batches import Batches
from llmq.checkpoint.digest import digest
from llmq.errors import LlmqError
from llmq.model.ends import entering as enter
from llmq.model.ends import of_their_own
from llmq.model.lanes import Call
from llmq.model.pretrained import check_ids, tokenizer_of
from llmq.model.skeleton import Skeleton
from llmq.pipeline.plan import Plan
from llmq.progress import Work

PROBE_TOKENS = 9  # of one sequence, by which it is found which linears read what


def entering(plan: Plan, journal: Journal, work: Work) -> Calibration:
    """Return the calibration as it enters the next block; empty where no step needs it.

    Raises LlmqError where its text is missing, too short, or not that with which an earlier run began.
    """
    if not plan.calibrates():
        return Calibration()
    ids = plan.team.first(lambda: _tokens(plan, journal, work))
    batches = ids.split(max(1, BATCH_TOKENS // ids.shape[1]))
    paired = math.ceil(plan.paired() * len(batches))
    ((short, call),) = enter(plan.skeleton, [ids[:1, :PROBE_TOKENS]], plan.device)
    calls: list[Sequence[Call]] = []
    dealt = Dealt.of([b.numel() for b in batches], plan.team)
    own = dealt.numbers
    coming = (h for n, h in enumerate(_noting(calls, enter(plan.skeleton, batches, plan.device))) if n in own)
    folder, device = journal.state, plan.device
    if journal.steps:
        found = [Batches.found(folder, kind, device) for kind in ("hidden", "floats")]
        hidden, floats = (of_all.of([n for n in of_all.numbers if n in own]) for of_all in found)
        deque(coming, maxlen=0)
    else:
        hidden = Batches(folder, "hidden", own, device).filled(coming)
        first = [n for n in own if n < paired]
        floats = Batches(folder, "floats", first, device).filled(hidden[i] for i in range(len(first)))
    squares = _squares(plan, journal, hidden, calls, work) if plan.method.weightings else {}
    apart = [of_their_own(c) for c in calls[:paired]]
    state = Calibration(hidden, floats, calls, apart, squares, ids, Probe(short, call), dealt)
    handed.put_back(state)
    return state


def _noting(calls: list[Sequence[Call]], coming: Iterable[tuple[Tensor, Sequence[Call]]]) -> Iterator[Tensor]:
    """Yield the hidden states of batches and keep the arguments of their calls."""
    for hidden, call in coming:
        calls.append(call)
        yield hidden


def _tokens(plan: Plan, journal: Journal, work: Work) -> Tensor:
    """Return the tokens: those that the model wrote, once in a run, or the text's, which must stay the same."""
    recipe = plan.method.recipe
    what = f"calibration text: {blend.named(recipe.calib)}"
    work(0, 1, what)

    writer = calibration.Writer(partial(_writer, plan), lambda done, total: work(done, total, what))

    def read() -> Tensor:
        how = (recipe.samples, recipe.seq_len, recipe.seed, writer, plan.warnings.append)
        return calibration.tokens(recipe.calib, tokenizer_of(plan.source.path), *how)

    if blend.written(recipe.calib, recipe.samples):
        ids = journal.once("text", lambda: ({"ids": read()}, {})).tensors["ids"].read()
    else:
        ids = read()
        _require_same(blend.named(recipe.calib), ids, journal)
    check_ids(ids, plan.skeleton.model)
    return ids


def _require_same(text: str, ids: Tensor, journal: Journal) -> None:
    """Raise LlmqError where an earlier run of the same command read other tokens from the text."""
    now, before = digest(ids), journal.read("text")
    if before is None:
        journal.keep("text", {}, {"sha256": now})
    elif (then := before.facts["sha256"]) != now:
        raise LlmqError(
            f"calibration text {text} has changed since the run began (sha256 of its tokens {then[:12]}, not "
            f"{now[:12]}); give it as it was, or say --overwrite to begin anew"
        )


def _writer(plan: Plan) -> nn.Module:
    """Load the whole float model, so that it can write its own calibration text."""
    dtype, stored = plan.skeleton.dtype, plan.skeleton.stored_dtype  # bfloat16 takes minutes without its units
    calibration.check_memory(plan.source.bytes() * dtype.itemsize // stored.itemsize, plan.device)
    return Skeleton(plan.float_source, dtype).filled(plan.device)


def _squares(
    plan: Plan, journal: Journal, hidden: Batches, calls: Sequence[Sequence[Call]], work: Work
) -> dict[str, list[Tensor]]:
    """Return the squared gradients of the linears to come, computed once in a run, `[T]` a batch by full name.

    Each process computes those of its own batches; all have those of all.
    """
    made: dict[str, Tensor] = {}
    if not plan.team.first(lambda: journal.has("squares")):
        numbers, seed = hidden.numbers, plan.method.recipe.seed
        own, seeds = [calls[n] for n in numbers], [seed_of(seed, n) for n in numbers]
        found = squared_gradients(plan.skeleton, hidden, own, plan.device, seeds, work, plan.alive)
        mine = {f"{n:06d} {name}": s[i].cpu() for name, s in found.items() for i, n in enumerate(numbers)}
        made = {key: s for theirs in plan.team.gather(mine) for key, s in theirs.items()}
    kept = plan.team.first(lambda: journal.once("squares", lambda: (made, {}))).tensors
    over = tuple(plan.skeleton.full_name(i, "") for i in range(min(journal.steps, len(plan.skeleton))))
    squares: dict[str, list[Tensor]] = {}
    for key in sorted(kept):  # batch by batch
        name = key.partition(" ")[2]
        if not name.startswith(over):
            squares.setdefault(name, []).append(kept[key].read().to(plan.device))
    return squares
