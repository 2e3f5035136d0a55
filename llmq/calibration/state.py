"""The calibration as a value: every batch where it stands between two blocks.

A block is given a state and returns the next one (pipeline/block.py):

    tensors, report, state = quantize_block(plan, i, state)

The hidden states are by far the largest part, so they lie on the disk, a file for each batch (checkpoint/batches.py): a
block reads the old ones and writes new ones. A state can be read as often as one likes, until it is removed.
Not here: the tokens' text (text.py), what is accumulated of an activation (collect.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from llmq.calibration.dealing import Dealt
from llmq.checkpoint.batches import Batches
from llmq.model.lanes import Call

BATCH_TOKENS = 4096
"""Tokens of a batch, of so many sequences. No cap on memory changes it: sums would be rounded elsewhere."""


class Probe(NamedTuple):
    """One short sequence, by which it is found what the linears of a block read: no value of it counts.

    hidden: float `[1, S, H]`. calls: the other arguments of each block's call for a sequence of that length.
    """

    hidden: Tensor
    calls: Sequence[Call]


@dataclass(frozen=True)
class Calibration:
    """The calibration where it stands between two blocks, batch by batch; empty where no step reads activations.

    hidden: what the quantized blocks so far made of it. floats: what the float blocks made of its first batches, as
    many as the steps that compare the two want. Both of the batches that are this process' own.
    calls: the other arguments of a block's call, indexed `[batch][block]`, of all batches; float_calls: those of the
    float blocks, with objects of their own.
    squares: of every linear still to come, by full name, the squared gradients at its output, `[T]` a batch, where
    tokens are weighed. ids: the tokens themselves, int64 `[samples, seq_len]`. probe: a short sequence beside them.
    dealt: the parts that the batches make.
    """

    hidden: Batches = field(default_factory=Batches)
    floats: Batches = field(default_factory=Batches)
    calls: Sequence[Sequence[Call]] = ()
    float_calls: Sequence[Sequence[Call]] = ()
    squares: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    ids: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.int64))
    probe: Probe | None = None
    dealt: Dealt = field(default_factory=Dealt)

    def __post_init__(self) -> None:
        if self.hidden and list(self.hidden.numbers) != self.dealt.numbers:
            raise ValueError("the batches of a calibration are those that were dealt")

    @property
    def tokens(self) -> int:
        """How many tokens the calibration has."""
        return self.ids.numel()
