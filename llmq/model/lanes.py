"""All calibration batches of one decoder block, suspended together from site to site.

Each batch runs the unmodified transformers block in a coroutine (greenlet). A pre-hook on the first linear of each site
hands its activation out and switches away; when all batches have arrived, the driver solves the site, puts the
quantized weights in place and lets them run on to the next site. So every linear runs once per batch, in true
sequential order, with no model code of our own:

    with Lanes(block, sites, hidden, calls) as lanes:
        for site in sites:
            for X_TK in lanes.advance():      # what q, k and v are about to read, batch by batch
                ...
            ...                               # quantize q, k and v; the batches run on with what is in place
        out = list(lanes.finish())

Where memory is short, only the first batches wait. Every other one runs anew to each site, from its hidden states and
through the quantized weights that are in place by then, so it arrives with the same bits; it takes some 2.5 times the
forwards.
Not here: what is done at a site (pipeline/solving.py), which linears make one (sites.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from llmq.model.experts import entrance
from llmq.types import LlmqError, Site

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a block is called with besides the hidden states: `(args, kwargs)`."""


def run(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """Run a block on one batch of hidden states."""
    out = block(hidden, *call[0], **call[1])
    return out[0] if isinstance(out, tuple) else out


class Lanes:
    """All batches of one block, brought together from site to site. A context manager.

    hidden: what enters the block, a batch each, which is asked for when its turn comes.
    alive: how many of the batches stay suspended where they arrived, the first ones; None for all. The others leave no
        more behind than their activation.
    Raises LlmqError from `advance` where a batch does not arrive at the expected site: the block's linears are then not
    called once each, in order (experts, for example).
    """

    def __init__(
        self,
        block: nn.Module,
        sites: Sequence[Site],
        hidden: Sequence[Tensor],
        calls: Sequence[Call],
        alive: int | None = None,
    ) -> None:
        self.block, self.sites = block, sites
        self._lanes = [greenlet(run) for _ in range(len(hidden))]
        self._hidden, self._calls = hidden, calls
        self._alive = len(hidden) if alive is None else alive
        self._at = -1
        self._hooks: list[Any] = []

    def __enter__(self) -> Lanes:
        def suspend(index: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                driver = getcurrent().parent
                if driver is not None:
                    driver.switch((index, args[0]))

            return hook

        for i, site in enumerate(self.sites):
            self._hooks.append(entrance(self.block, site.linears[0]).register_forward_pre_hook(suspend(i)))
        return self

    def __exit__(self, *_: Any) -> None:
        for lane in self._lanes:
            if lane:
                lane.throw(GreenletExit)
        for hook in self._hooks:
            hook.remove()

    def advance(self) -> Iterator[Tensor]:
        """Let every batch run to the next site; yield its activation there, `[T, K]`, batch by batch."""
        self._at += 1
        for i in range(len(self._lanes)):
            yield self._arriving(i)

    def finish(self) -> Iterator[Tensor]:
        """Let every batch run to the end; yield the block's output, batch by batch."""
        self._at = len(self.sites)
        for i in range(len(self._lanes)):
            out = self._resume(i)
            if not isinstance(out, Tensor):
                raise LlmqError(
                    f"{self.sites[out[0]].linears[0]} is called more than once per batch; use rtn or --skip"
                )
            yield out

    def _arriving(self, i: int) -> Tensor:
        arrived = self._resume(i)
        if not _is_at(arrived, self._at):
            names = ", ".join(self.sites[self._at].linears)
            raise LlmqError(
                f"{names}: not called once per batch in the expected order; quantize such a block with rtn, or "
                "leave these linears out with --skip"
            )
        if i >= self._alive:
            self._lanes[i].throw(GreenletExit)
        activation: Tensor = arrived[1]
        return activation.reshape(-1, activation.shape[-1])

    def _resume(self, i: int) -> Any:
        """Let batch i run on, from the start where it did not wait; return where it arrived, or the block's output."""
        if self._lanes[i]:
            return self._lanes[i].switch()
        self._lanes[i] = lane = greenlet(run)
        arrived = lane.switch(self.block, self._hidden[i], self._calls[i])
        for passed in range(self._at):
            if not _is_at(arrived, passed):
                break
            arrived = lane.switch()
        return arrived


def _is_at(arrived: Any, site: int) -> bool:
    return isinstance(arrived, tuple) and arrived[0] == site
