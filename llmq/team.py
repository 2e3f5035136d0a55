"""Several processes that do one run together; a single process is a team of one, and nobody need know.

    team = join()                         # torchrun's, where RANK and WORLD_SIZE say so; else a team of one
    mine = team.own(pieces)               # those that this process works on
    found = team.dealt([work(p) for p in mine])              # what all processes found, in the order of the pieces
    costs = team.first(lambda: measure())                    # what the first process makes, for all

All processes run the same lines; where one calls the team, all do. Sums are added up in the order of the processes, so
that they have the same bits as in one process that adds part after part. torch.distributed is the engine: gloo between
CPUs, nccl between GPUs.
Not here: what is dealt (calibration/dealing.py, pipeline/solving.py, pipeline/site.py), which process this is
(launched.py).
"""

from __future__ import annotations

import atexit
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from llmq import launched
from llmq.errors import LlmqError, one_line
from llmq.meeting import meet

T = TypeVar("T")
Tensors = dict[str, Tensor]
Reduction = Callable[[Tensor, Tensor], Tensor]
"""Returns two tensors as one, in the memory of the first."""

_AT_ONCE = 2**22  # elements that are on their way at a time
_PATIENCE = timedelta(days=7)  # one that dies is noticed at once; one that waits for another's long work is right to


class Team:
    """A team of one process.

    rank: the number of this process. size: how many there are.
    """

    rank = 0
    size = 1

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def own(self, things: Sequence[T]) -> list[T]:
        """Return those of several things that are dealt to this process: one after the other, in turns."""
        return list(things[self.rank :: self.size])

    def gather(self, mine: T) -> list[T]:
        """Return what each process has, in their order: numbers, words and lists of them, no large tensors."""
        return [mine]

    def meet(self) -> None:
        """Wait until all are here."""
        self.gather(None)

    def dealt(self, mine: Sequence[T]) -> list[T]:
        """Return what all made of their `own` things, in the order of the things."""
        each = self.gather(list(mine))
        return [each[i % self.size][i // self.size] for i in range(sum(map(len, each)))]

    def tensors(self, mine: Sequence[Tensors]) -> list[Tensors]:
        """Return the tensors that all made of their `own` things, as `dealt`, each on its own device."""
        return list(mine)

    def first(self, make: Callable[[], T]) -> T:
        """Return what the first process makes; the others wait for it."""
        return make()

    def joined(
        self, totals: Tensors, part: Tensors, reduction: Callable[[str], Reduction], owner: int | None = None
    ) -> Tensors:
        """Return totals with a part of each process reduced into them, in their order; a part may lack tensors.

        All have the same totals, before and afterwards; where they have an owner, that process alone has any.
        """
        for name, tensor in part.items():
            totals[name] = reduction(name)(totals[name], tensor) if name in totals else tensor
        return totals


ALONE = Team()


class Group(Team):
    """The processes of a torch.distributed group that was made. device: where this one's large tensors are."""

    def __init__(self, device: torch.device) -> None:
        import torch.distributed as dist

        self._dist: Any = dist
        self.device = device
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def gather(self, mine: T) -> list[T]:
        """See `Team.gather`."""
        every: list[Any] = [None] * self.size
        with _together():
            self._dist.all_gather_object(every, mine)
        return every

    def tensors(self, mine: Sequence[Tensors]) -> list[Tensors]:
        """See `Team.tensors`."""
        shapes = self.dealt([_shapes(tensors) for tensors in mine])
        return [self._sent(i, mine, each) for i, each in enumerate(shapes)]

    def _sent(self, i: int, mine: Sequence[Tensors], shapes: Mapping[str, Any]) -> Tensors:
        """Return the tensors of thing `i`, which its owner sends to all."""
        owner = i % self.size
        if owner == self.rank:
            found = {name: t.contiguous() for name, t in mine[i // self.size].items()}
        else:
            found = {name: self._zeros(shape) for name, shape in shapes.items()}
        for tensor in found.values():
            if tensor.numel():
                with _together():
                    self._dist.broadcast(_bytes(tensor), owner)
        return found

    def first(self, make: Callable[[], T]) -> T:
        """See `Team.first`."""
        made: list[Any] = [make() if self.leads else None]
        with _together():
            self._dist.broadcast_object_list(made, 0)
        return made[0]  # type: ignore[no-any-return]

    def joined(
        self, totals: Tensors, part: Tensors, reduction: Callable[[str], Reduction], owner: int | None = None
    ) -> Tensors:
        """See `Team.joined`."""
        shapes = {name: shape for each in self.gather(_shapes(part)) for name, shape in each.items()}
        for name, shape in shapes.items():
            mine = part[name] if name in part else self._zeros(shape)
            pieces = mine.reshape(-1).split(_AT_ONCE)
            if owner is not None and owner != self.rank:
                for piece in pieces:
                    self._given(piece, owner)
                continue
            total = totals.setdefault(name, torch.zeros_like(mine))
            for whole, piece in zip(total.view(-1).split(_AT_ONCE), pieces, strict=True):
                whole.copy_(self._reduced(whole, piece, reduction(name), owner))
        return totals

    def _zeros(self, like: tuple[Any, ...]) -> Tensor:
        shape, dtype, kind = like
        return torch.zeros(shape, dtype=dtype, device=None if kind == "cpu" else self.device)

    def _given(self, mine: Tensor, owner: int) -> list[Tensor]:
        """Give the owner a stretch of a part; return those of all processes there, nothing elsewhere."""
        every = [torch.empty_like(mine) for _ in range(self.size)] if owner == self.rank else []
        with _together():
            self._dist.gather(_bytes(mine.contiguous()), [_bytes(t) for t in every] or None, owner)
        return every

    def _reduced(self, total: Tensor, mine: Tensor, reduction: Reduction, owner: int | None = None) -> Tensor:
        """Return the total with the same stretch of every process reduced into it: each does a part for all.

        owner: this process, where it alone wants it.
        """
        if owner is not None:
            return functools.reduce(reduction, self._given(mine, owner), total)
        count, width = len(mine), -(-len(mine) // self.size)
        padded = [torch.cat([t, t.new_zeros(self.size * width - count)]) for t in (total, mine)]
        theirs = torch.empty_like(padded[1])
        with _together():
            self._dist.all_to_all_single(_bytes(theirs), _bytes(padded[1]))
        own = padded[0][self.rank * width : (self.rank + 1) * width]
        for term in theirs.view(self.size, width):
            own = reduction(own, term)
        every = torch.empty_like(padded[0])
        with _together():
            self._dist.all_gather(list(_bytes(every).chunk(self.size)), _bytes(own.contiguous()))
        return every[:count]


@contextmanager
def _together() -> Iterator[None]:
    """Raise LlmqError where another process has ended meanwhile."""
    try:
        yield
    except RuntimeError as e:  # what torch.distributed raises, whatever the engine met
        raise LlmqError("another process of this run has ended, see what it said; run the same command again") from e


def _shapes(tensors: Tensors) -> dict[str, Any]:
    return {name: (tuple(t.shape), t.dtype, t.device.type) for name, t in tensors.items()}


def _bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a contiguous tensor as it is sent: of any dtype, whatever the engine can add."""
    return tensor.view(-1).view(torch.uint8)


def join(device: torch.device) -> Team:
    """Return the team that this process belongs to, as torchrun and its like say in RANK and WORLD_SIZE.

    The processes of one machine share its cores, unless OMP_NUM_THREADS says how many threads each has.
    device: where this process' large tensors are.
    Raises LlmqError where the processes cannot connect.
    """
    if launched.size() == 1:
        return ALONE
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if "OMP_NUM_THREADS" not in os.environ:
            cores = psutil.cpu_count(logical=False) or 1
            torch.set_num_threads(max(1, cores // launched.beside()))
        try:
            store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
            engine = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            own = meet(store, rank, size)
            dist.init_process_group(engine, store=own, rank=rank, world_size=size, timeout=_PATIENCE)
        except (RuntimeError, ValueError) as e:  # what torch.distributed raises, whatever it met
            raise LlmqError(
                f"the {launched.size()} processes of this run cannot connect ({one_line(e)}); check that all reach "
                "MASTER_ADDR, and run the same command again, which goes on where it was"
            ) from e
        atexit.register(dist.destroy_process_group)
    return Group(device)


def placed(device: str) -> str:
    """Return the name of the device that is this process' own: of several GPUs of a machine, the one of its number."""
    return f"cuda:{launched.number_here()}" if device in ("auto", "cuda") and torch.cuda.is_available() else device
