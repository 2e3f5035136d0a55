"""Granularity: which values of a matrix share one scale, as a value.

    PerTensor()        all of them                       "tensor"
    PerRow()           a row: an output channel          "channel"
    PerGroup(128)      128 neighbouring columns of a row 128
    PerBlock(128, 64)  128 rows of 64 columns            "128x64"

Of a weight `[N, K]` the rows are output channels; of an activation `[T, K]` they are tokens.
Not here: how a scale is chosen (grids/), which of these a file can hold (formats/).
"""

import re
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from llmq.errors import LlmqError, printable


@dataclass(frozen=True)
class Granularity:
    """Which values share a scale. `str()` of it is how messages say it.

    strategy: compressed-tensors' word for it. words: ours, with the fields in braces.
    """

    strategy: ClassVar[str]
    words: ClassVar[str]

    @property
    def group_size(self) -> int | None:
        """Return the columns of a group, None where a scale is not for a group."""
        return None

    def columns(self, K: int) -> int:
        """Return how many of K columns share a scale."""
        return self.group_size or K

    def groups(self, K: int) -> int:
        """Return G, the scales along K columns. Raises ValueError where the groups do not divide them."""
        columns = self.columns(K)
        if K % columns:
            raise ValueError(f"group size {columns} does not divide K = {K}")
        return K // columns

    def height(self, N: int) -> int:
        """Return how many of N rows share a scale."""
        return 1

    def rows(self, N: int) -> int:
        """Return how many rows of scales a weight of N rows has."""
        return -(-N // self.height(N))

    def shape(self, N: int, K: int) -> tuple[int, ...]:
        """Return the shape of a weight's scales in a file. Raises ValueError as `groups`."""
        return self.rows(N), self.groups(K)

    def gathered(self, W_NK: Tensor) -> Tensor:
        """Return the values of a matrix with those that share a scale in one row, `[rows, G, values]`.

        The rows that blocks have beyond the matrix are zeros. Raises ValueError as `groups`.
        """
        N, K = W_NK.shape
        R, G, height = self.rows(N), self.groups(K), self.height(N)
        whole = W_NK if R * height == N else F.pad(W_NK, (0, 0, 0, R * height - N))
        return whole.reshape(R, height, G, K // G).transpose(1, 2).reshape(R, G, -1)

    def spread(self, scales: Tensor, N: int) -> Tensor:
        """Return scales `[rows, G]` for each of N rows, `[N, G]`."""
        height = self.height(N)
        return scales if height == 1 else scales.repeat_interleave(height, 0)[:N]

    def __str__(self) -> str:
        return self.words.format(**vars(self))


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for all."""

    strategy = "tensor"
    words = "per tensor"

    def height(self, N: int) -> int:
        """Return N."""
        return N

    def shape(self, N: int, K: int) -> tuple[int, ...]:
        """Return `(1,)`."""
        return (1,)


@dataclass(frozen=True)
class PerRow(Granularity):
    """One scale for a row."""

    strategy = "channel"
    words = "per channel"


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for `size` neighbouring columns of a row."""

    size: int
    strategy = "group"
    words = "group size {size}"

    @property
    def group_size(self) -> int:
        """Return the size."""
        return self.size


@dataclass(frozen=True)
class PerBlock(Granularity):
    """One scale for `tall` rows of `width` columns; the last block may lack rows."""

    tall: int
    width: int
    strategy = "block"
    words = "blocks of {tall} x {width}"

    def columns(self, K: int) -> int:
        """Return the width."""
        return self.width

    def height(self, N: int) -> int:
        """Return how many rows a block has, be they there or not."""
        return self.tall


def granularity(said: int | str) -> Granularity:
    """Return what a user says: columns, "channel" (or -1), "tensor" or "128x64". Raises LlmqError for anything else."""
    words = {"channel": PerRow(), "-1": PerRow(), "tensor": PerTensor()}
    if (text := str(said)) in words:
        return words[text]
    numbers = [int(n) for n in text.split("x")] if re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})?", text) else [0]
    if 0 in numbers:
        given = printable(repr(said), 80)
        raise LlmqError(f"group_size is a number of columns, 'channel', 'tensor' or a block '128x128', not {given}")
    return PerGroup(*numbers) if len(numbers) == 1 else PerBlock(*numbers)
