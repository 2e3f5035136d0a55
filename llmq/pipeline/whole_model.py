"""The whole quantized model, once more, with gradients: what finishers see, and what they made of it.

The checkpoint as it stands before it is moved to OUT is opened beside its float model, each linear as its decoded
weight times a factor for each group; both are held in memory, and the blocks' activations are computed twice.
Not here: what moves the parameters (algorithms/distill.py), writing and measuring them (run.py).
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmq import registry
from llmq.calibration import free_memory
from llmq.checkpoint import Journal, Source
from llmq.evaluation.scores import Predictor
from llmq.minifloat import rescaled
from llmq.model.skeleton import Skeleton
from llmq.pipeline.plan import Plan
from llmq.runtime.linear import QuantLinear
from llmq.steps import Finisher, ModelView
from llmq.types import FloatParams, LlmqError, QTensor

_POSITIONS = 128  # whose logits exist at a time
_BYTES_A_WEIGHT = 6  # decoded in float32, its code, and its packed code; a block's backward pass beside that is small
_LENGTH = 256  # tokens of a training sequence: twice the steps of 512 at the same cost, and a lower KL


class _Scaled(nn.Module):
    """A quantized linear as its decoded weight `[N, K]` with one factor, 1 + change, for each group `[N, G]`."""

    def __init__(self, linear: QuantLinear) -> None:
        super().__init__()
        self.linear, self.q = [linear], linear.unpack()  # in a list: no submodule
        self.weight = self.q.dequantize()
        self.change = nn.Parameter(torch.zeros_like(self.q.params.scale, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        bias = self.linear[0].bias
        factor = self._factor()
        if self.q.g_idx is None:  # groups of neighbours: the gradient is a sum, where that of an index is a scatter
            weight = (self.weight.unflatten(1, (factor.shape[1], -1)) * factor.unsqueeze(-1)).flatten(1)
        else:
            weight = self.weight * factor[:, self.q.group_K]
        return F.linear(x, weight, None if bias is None else bias.to(x.dtype))

    def _factor(self) -> Tensor:
        """Return the factors; where files hold few scales, those of the nearest, with the gradient of what is asked."""
        factor = 1 + self.change
        if not isinstance(self.q.params, FloatParams) or self.q.params.stored is None:
            return factor
        return factor + (self.moved().params.scale / self.q.params.scale - factor.detach())

    def moved(self) -> QTensor:
        """Return the linear with the scales as they are now, as they are stored."""
        scale = self.q.params.scale.float() * (1 + self.change.detach())
        return dataclasses.replace(self.q, params=rescaled(self.q.params, scale))


class Finished(NamedTuple):
    """What finishers made of the model: its linears, its norms' gains (both by full name), and a line for each."""

    linears: dict[str, QTensor]
    norms: dict[str, Tensor]
    report: dict[str, Any]


def check_memory(plan: Plan) -> None:
    """Raise LlmqError where the models that finishers hold, and what they hand from one to the other, do not fit."""
    need, free = finisher_bytes(plan), free_memory(plan.device)
    if need > free:
        raise LlmqError(
            f"{registry.dump(plan.method.finishers[0])} needs the whole model in memory, decoded, {need / 1e9:.1f} GB "
            f"of which {free / 1e9:.1f} GB are free; leave it out of --method, or give fewer --samples"
        )


def finisher_bytes(plan: Plan) -> int:
    """Return the bytes of the models that finishers hold, and of what they hand from one to the other."""
    recipe, width = plan.method.recipe, plan.skeleton.text.hidden_size
    weights = plan.source.bytes() // plan.skeleton.stored_dtype.itemsize
    return weights * _BYTES_A_WEIGHT + 4 * recipe.samples * recipe.seq_len * width


def finish(
    finishers: Sequence[Finisher],
    folder: Path,
    source: Source,
    tokens: Tensor,
    seed: int,
    device: torch.device,
    journal: Journal,
) -> Finished:
    """Run finishers on the checkpoint in `folder`, made from the float one, `source`; neither is written to.

    tokens: int64 `[samples, seq_len]`, cut into shorter sequences where they are long. journal: of how far each came.
    """
    from llmq.loading import load

    pieces = -(-tokens.shape[1] // _LENGTH)
    if tokens.shape[1] % pieces == 0:
        tokens = tokens.reshape(len(tokens) * pieces, -1)
    teacher = Predictor(Skeleton(source, torch.float32).filled(device), "the float model")
    with torch.no_grad():
        truth = [teacher.states(row.tolist()) for row in tokens]
    teacher.model = None  # the head is all that is still needed
    student = load(folder, dtype=torch.float32, device=device, backend="reference")
    predictor = Predictor(student, "the quantized model")
    linears = dict(_open_up(student))
    norms = {n: p for n, p in student.named_parameters() if "norm" in n}
    for p in student.parameters():
        p.requires_grad_(False)
    tuned = [*norms.values(), *(m.change for m in linears.values())]
    for p in tuned:
        p.requires_grad_(True)

    def loss(row: int) -> Tensor:
        states = predictor.states(tokens[row].tolist())
        parts = zip(states.detach().split(_POSITIONS), truth[row].split(_POSITIONS), strict=True)
        values, slopes = zip(*(_divergence(s, t, predictor, teacher) for s, t in parts), strict=True)
        return cast(Tensor, _WithSlope.apply(states, torch.stack(values).sum(), torch.cat(slopes))) / len(states)

    view = ModelView([m.change for m in linears.values()], list(norms.values()), loss, len(tokens), seed)
    report = {registry.dump(f): f.finish(_going_on(view, journal, f"finisher-{i}")) for i, f in enumerate(finishers)}
    return Finished({n: m.moved() for n, m in linears.items()}, {n: p.detach() for n, p in norms.items()}, report)


def _going_on(view: ModelView, journal: Journal, name: str) -> ModelView:
    """Return the view for one finisher, which may go on from what it kept."""
    kept = journal.read(name)
    before = None if kept is None else ({n: t.read() for n, t in kept.tensors.items()}, kept.facts)
    return dataclasses.replace(view, keep=partial(journal.keep, name), kept=before)


def _open_up(model: Any) -> Iterator[tuple[str, _Scaled]]:
    """Replace every quantized linear, have the blocks recompute their activations, and yield the replacements."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            parent, _, leaf = name.rpartition(".")
            scaled = _Scaled(module)
            setattr(model.get_submodule(parent), leaf, scaled)
            yield name, scaled
    depth = model.config.get_text_config().num_hidden_layers
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    for block in blocks:
        block.forward = _recomputed(block.forward)


def _recomputed(forward: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return call


class _WithSlope(torch.autograd.Function):
    """A loss that comes with its gradient by the states, `slope`.

    Both are computed in one visit of the logits, a few positions at a time: the logits of a whole sequence need not be
    kept for the backward pass, nor computed again in it.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


def _divergence(states: Tensor, truth: Tensor, student: Predictor, teacher: Predictor) -> tuple[Tensor, Tensor]:
    """Return the sum over some positions of KL(teacher || student), and its gradient by the student's states."""
    with torch.no_grad():
        log_p = teacher.log_probs(truth)
    with torch.enable_grad():
        at = states.requires_grad_()
        value = (log_p.exp() * (log_p - student.log_probs(at))).sum()
    (slope,) = torch.autograd.grad(value, at)
    return value.detach(), slope
