"""The walk through a checkpoint, a block in memory at a time: every weight read and checked, and one forward made.

A few fixed tokens are enough: a code, a scale or a layer that is wrong everywhere shows in any. Beside the float model
the same tokens tell how far apart the two are.
Not here: reading a weight (folder.py, gguf.py), measuring quality (scores.py).
"""

from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from llmq.checkpoint.source import Source, View
from llmq.errors import LlmqError
from llmq.model.ends import logits, outside_loaded
from llmq.model.experts import in_experts
from llmq.model.forward import Forward
from llmq.model.pretrained import foreign
from llmq.model.skeleton import Skeleton
from llmq.progress import Progress, Work
from llmq.verify.against import Truth
from llmq.verify.report import Report

Read = Callable[[str, Report], Tensor | None]
"""Reads and checks a tensor of the model by name, decoded; None, and a line in the report, where it cannot be read."""
_TOKENS = 16
_ALIKE = 1e-5  # relative difference that rounding makes
_CPU = torch.device("cpu")


class Decoded(View):
    """A checkpoint whose tensors are a model's, by `names`, and come from a decoder.

    held: those that were read and checked just now. due: those that are checked when they are asked for, and by what;
    others are read again.
    """

    def __init__(self, base: Source, names: Iterable[str], read: Read) -> None:
        super().__init__(base)
        self._names, self.read, self.held = frozenset(names), read, dict[str, Tensor]()
        self.due: dict[str, Callable[[str], Tensor | None]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def get(self, name: str) -> Tensor:
        """Return a tensor, decoded. Raises LlmqError where it cannot be read."""
        if name in self.held:
            return self.held[name]
        found = self.due.pop(name)(name) if name in self.due else self.read(name, Report())
        return super().get(name) if found is None else found


def predicted(forward: Forward) -> Tensor:
    """Return the logits, float32 `[T, V]`, of the one batch behind the last block."""
    with outside_loaded(forward.skeleton, _CPU, head=True), torch.no_grad():
        return logits(forward.skeleton, forward.hidden[0])[0].float()


def walk(
    skeleton: Skeleton, names: list[str], truth: Truth | None, report: Report, progress: Progress | None = None
) -> None:
    """Read and check the model's tensors by name, compare them with the truth where there is one, run a forward.

    progress: called with the blocks done.
    """
    work = Work.of(progress)
    prefix, experts = f"{skeleton.prefix}.", in_experts(skeleton.model)
    with _reading(skeleton, [n for n in names if not n.startswith(prefix)], truth, report), foreign(_odd(skeleton)):
        forward = Forward(skeleton, [_tokens(skeleton)], _CPU, experts=False) if report.passed else None
    beside = Forward(truth.skeleton, [_tokens(truth.skeleton)], _CPU, experts=False) if truth and forward else None
    for i in range(len(skeleton)):
        work(i, len(skeleton), "verifying")
        with _reading(skeleton, [n for n in names if n.startswith(f"{prefix}{i}.")], truth, report, experts):
            if forward and report.passed and _moved(forward, i, report):
                check_states(f"the hidden states behind block {i}", forward.hidden[0], report)
        if beside and report.passed:
            beside.step(i)
    work(len(skeleton), len(skeleton), "verifying")
    if not forward or not report.passed:
        report.note("no forward was run to its end: what is wrong with the weights comes first")
        return
    found = predicted(forward)
    if check_states("the logits", found, report) and beside:
        compare(found, predicted(beside), report)


def _moved(forward: Forward, i: int, report: Report) -> bool:
    """Move past block `i`; say whether nothing wrong was met on the way, where weights of experts are read."""
    try:
        with foreign(_odd(forward.skeleton)):
            forward.step(i)
    except LlmqError:
        if report.passed:
            raise
    return report.passed


def _odd(skeleton: Skeleton) -> str:
    return f"{skeleton.source.path}: transformers does not run the model that its config or keys say"


def _tokens(skeleton: Skeleton) -> Tensor:
    """Return some tokens, always the same, int64 `[1, T]`."""
    vocabulary = skeleton.model.get_input_embeddings().weight.shape[0]
    return (torch.arange(1, _TOKENS + 1) * 7919 % vocabulary)[None]


@contextmanager
def _reading(
    skeleton: Skeleton, names: list[str], truth: Truth | None, report: Report, experts: Container[str] = ()
) -> Iterator[None]:
    """Hold some tensors, read and checked, for as long as the context is open.

    experts: modules whose tensors are not held, but checked as they are asked for, or else at the end.
    """
    source = skeleton.source
    if not isinstance(source, Decoded):
        raise TypeError("the skeleton's source decodes nothing")

    def check(name: str) -> Tensor | None:
        tensor = source.read(name, report)
        if truth and tensor is not None:
            truth.check(name, tensor, report)
        return tensor

    source.due = {n: check for n in names if n.rpartition(".")[0] in experts}
    for name in names:
        if name not in source.due and (tensor := check(name)) is not None:
            source.held[name] = tensor
    try:
        yield
        for name in list(source.due):
            check(name)
    finally:
        source.held.clear()
        source.due.clear()


def check_states(name: str, states: Tensor, report: Report) -> bool:
    """Check that hidden states or logits `[..., T, width]` are finite and not alike at all positions."""
    report.count("states of a forward")
    if not report.expect(bool(torch.isfinite(states).all()), f"{name} hold NaN or Inf"):
        return False
    rows = states.reshape(-1, states.shape[-1])
    spread = (rows - rows[:1]).norm() > _ALIKE * rows.norm()
    return report.expect(bool(spread), f"{name} are the same at every position")


def compare(logits: Tensor, truth: Tensor, report: Report) -> None:
    """Note how far the predictions are from the float model's: their mean KL, and the share of equal first choices."""
    log_p, log_q = truth.log_softmax(-1), logits.log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    same = (log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item()
    report.figures |= {"kl": kl, "same_first_choice": same}
    report.note(f"predictions of {len(logits)} tokens: KL from the float model {kl:.2e}, same first choice {same:.0%}")
