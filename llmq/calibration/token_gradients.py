"""How much each token counts at each linear: the squared gradient of the float model's loss there.

    s_t = mean_j (dL/dz_tj)^2,   z_t = W x_t,   L = -sum_t log p(y_t),   y_t drawn from the model's own prediction

With labels drawn from the model, L's Hessian is the Fisher matrix, which is also that of the KL divergence from the
float model: what an error at z_t does to the model's answer, to second order, with one number for a token.
One block is in memory at a time, forward and then backward, for as many sequences at once as `_HELD` bytes of hidden
states between the blocks allow.
Not here: what is made of the numbers (algorithms/fisher.py), where they are used (pipeline/block.py).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from llmq.model.ends import logits, outside_loaded
from llmq.model.experts import linears_of
from llmq.model.lanes import Call, run
from llmq.model.skeleton import Skeleton
from llmq.progress import Progress

_HELD = 2**30  # bytes of hidden states held between the blocks
POSITIONS = 128  # whose logits exist at a time


def squared_gradients(
    skeleton: Skeleton,
    hidden: Sequence[Tensor],
    calls: Sequence[Sequence[Call]],
    device: torch.device,
    seeds: Sequence[int],
    report: Progress,
    most: int | None = None,
) -> dict[str, list[Tensor]]:
    """Return s of every linear of every block by full name, float32 `[T]`, batch by batch.

    hidden: what enters block 0, `[B, S, H]` a batch. calls: the blocks' other arguments, indexed `[batch][block]`.
    seeds: what the labels of each batch are drawn by (`seed_of`), whoever draws them.
    most: how many batches may go through the blocks together at most, but for one; None for no bound.
    """
    found: dict[str, list[Tensor]] = {}
    step = held_at_once(hidden[0].nbytes, len(skeleton), most) if len(hidden) else 1
    for first in range(0, len(hidden), step):
        part = slice(first, first + step)
        draws = [torch.Generator(device).manual_seed(seed) for seed in seeds[part]]
        _add_squares(skeleton, hidden[part], calls[part], device, draws, found)
        report(min(first + step, len(hidden)), len(hidden), "gradients")
    return found


def seed_of(seed: int, number: int) -> int:
    """Return what the labels of the batch of that number are drawn by, in a run of that seed."""
    return (seed << 32) + number


def held_at_once(batch: int, blocks: int, most: int | None = None) -> int:
    """Return how many batches of so many bytes go through the blocks together: the hidden states of all are held."""
    fitting = _HELD // (batch * blocks)
    return max(1, fitting if most is None else min(fitting, most))


def _add_squares(
    skeleton: Skeleton,
    hidden: Sequence[Tensor],
    calls: Sequence[Sequence[Call]],
    device: torch.device,
    draws: Sequence[torch.Generator],
    found: dict[str, list[Tensor]],
) -> None:
    """Run these batches forward through all blocks, then backward, and add the squares to those `found` so far."""
    entered = [list(hidden)]
    blocks = range(len(skeleton))
    for i, read in enumerate(skeleton.reads(blocks, device)):
        with skeleton.loaded(i, device, read=read) as block:
            entered.append([run(block, h, c[i]) for h, c in zip(entered[-1], calls, strict=True)])
    slopes = _of_outputs(skeleton, entered.pop(), device, draws)
    for i, read in zip(reversed(blocks), skeleton.reads(reversed(blocks), device), strict=True):
        with skeleton.loaded(i, device, read=read) as block:
            inputs = entered.pop()
            for b, (h, c) in enumerate(zip(inputs, calls, strict=True)):
                slopes[b], squares = _through(block, h, c[i], slopes[b])
                for name, s in squares.items():
                    found.setdefault(skeleton.full_name(i, name), []).append(s)


def _of_outputs(
    skeleton: Skeleton, outputs: list[Tensor], device: torch.device, draws: Sequence[torch.Generator]
) -> list[Tensor]:
    """Return the gradient of L with respect to the last block's output, batch by batch."""
    with outside_loaded(skeleton, device, head=True):
        slopes = []
        for out, draw in zip(outputs, draws, strict=True):
            parts = out.reshape(-1, out.shape[-1]).split(POSITIONS)
            slopes.append(torch.cat([_of_positions(skeleton, x, draw) for x in parts]).reshape(out.shape))
        return slopes


def _of_positions(skeleton: Skeleton, x_TH: Tensor, draw: torch.Generator) -> Tensor:
    """Return the gradient of L with respect to a few positions, through what lies behind the blocks."""
    with torch.enable_grad():
        x = x_TH[None].detach().requires_grad_()
        log_p = logits(skeleton, x)[0].float().log_softmax(-1)
        labels = torch.multinomial(log_p.detach().exp(), 1, generator=draw)
        return torch.autograd.grad(-log_p.gather(1, labels).sum(), x)[0][0]


def _through(block: nn.Module, hidden: Tensor, call: Call, slope: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the gradient of L with respect to a block's input, and s of its linears."""
    squares: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def take(g: Tensor) -> None:
            squares[name] = g.detach().float().square().mean(-1).reshape(-1)

        def hook(_module: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
            out.register_hook(take)

        return hook

    hooks = [m.register_forward_hook(watch(n)) for n, m in linears_of(block).items()]
    try:
        with torch.enable_grad():
            x = hidden.detach().requires_grad_()
            (before,) = torch.autograd.grad(run(block, x, call), x, slope)
    finally:
        for hook in hooks:
            hook.remove()
    return before, squares
