"""The domain: what flows from a float checkpoint to packed words. Read this first.

Data changes kind once per verb: floats -> stats -> codes -> words -> shard.

- `Grid` says where the values of a weight may lie; `Range` says which interval such a grid covers.
- `QTensor` is a solved weight with unpacked codes: the only thing a solver hands to a format, so that one solve can be
  written in many formats with identical codes.
- `Site` names the linears of a block that read one activation; they share their statistics.

Shape suffixes: N output features, K input features, G groups along K, g columns of a group, T tokens.
Not here: what a format does with them (format.py), the steps of a method (steps.py), any implementation, which has a
file of its own in the folder of its plural name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from llmq.errors import LlmqError as LlmqError  # noqa: PLC0414
from llmq.granularity import Granularity, PerBlock, PerGroup, PerRow, PerTensor
from llmq.params import FloatParams as FloatParams  # noqa: PLC0414
from llmq.params import GgmlParams as GgmlParams  # noqa: PLC0414
from llmq.params import Held as Held  # noqa: PLC0414
from llmq.params import Lattice as Lattice  # noqa: PLC0414
from llmq.params import Levels as Levels  # noqa: PLC0414
from llmq.params import Parameters as Parameters  # noqa: PLC0414
from llmq.params import Params as Params  # noqa: PLC0414


class Grid(ABC):
    """The values that a weight may take, laid over it by parameters, such as the scales of its groups.

    A grid is made once, for many weights; `fit` says where it lies on one of them. Example: Int(bits=4, group=32) has
    16 values for each 32 columns of a row; `fit(W_NK)` returns their scales and zeros, `[N, K / 32]`, and `nearest` and
    `decode` go from values to codes and back. What a kind of grid does not override is as here.
    """

    @property
    @abstractmethod
    def bits(self) -> int:
        """Bits of a code."""

    @property
    @abstractmethod
    def granularity(self) -> Granularity:
        """Which values share a scale."""

    @property
    def wants_hessian(self) -> bool:
        """Whether `fit` needs the Hessian, not its diagonal alone."""
        return False

    @abstractmethod
    def fit(self, W_NK: Tensor, H_KK: Tensor | None = None) -> Parameters:
        """Choose where the grid of every group of float32 `W_NK` lies.

        H_KK: weighs the errors, where the grid weighs any; the diagonal `[K]` alone will do.
        Raises ValueError where the groups do not divide K.
        """

    @abstractmethod
    def nearest(self, w: Tensor, params: Parameters) -> Tensor:
        """Return the nearest codes, float32 integers; `params` broadcasts against `w`."""

    @abstractmethod
    def decode(self, codes: Tensor, params: Parameters) -> Tensor:
        """Return the float32 values of `codes`; `params` broadcasts against `codes`."""

    def lattice(self, params: Parameters) -> Lattice | None:
        """Return what `[N, G]` parameters mean to compiled loops; None where a grid is rounded by torch alone."""
        return None

    def refine(
        self, error_NK: Tensor, gradient_NK: Tensor, codes: Tensor, params: Parameters, H_KK: Tensor, group_K: Tensor
    ) -> Parameters:
        """Return other params for solved codes `[N, K]`, proposed to lower `tr (W - Q) H (W - Q)^T` row by row.

        error_NK, gradient_NK: W - Q and (W - Q) H. group_K: int64 `[K]`, the group of each column.
        """
        return params

    @property
    def held(self) -> Held:
        """The scales that the file holds."""
        return Held(0.0, 0.0, math.inf)

    def covering(self, W_NK: Tensor) -> Tensor:
        """Return the scale with which each group or stored block of a float matrix is just covered, not rounded yet.

        What is lost of a group is told by it: one whose scale the file does not hold is lost, or clipped.
        """
        return torch.zeros(1)

    def strain(self, W_NK: Tensor, params: Parameters) -> dict[str, int]:
        """Count the groups of a matrix solved with `params` whose scale the file does not hold, see `Held.strain`."""
        return self.held.strain(self.covering(W_NK))

    def args(self) -> Arguments | None:
        """Return how compressed-tensors describes the grid; None where it has no words for it."""
        return None

    def spanning(self, weights: Sequence[Tensor], grids: Sequence[Grid] = ()) -> Grid:
        """Return the grid for weights `[N, K]` on `grids` that runtimes fuse: what is stored once they then share."""
        return self

    def plain(self) -> Grid:
        """Return the grid with the cheapest way to fit it, for a search that rounds many times."""
        return self

    def stored_in(self, dtype: torch.dtype) -> Grid:
        """Return the grid for a format that stores scales in `dtype`; see `Format.scale_dtype`."""
        return self

    def with_bits(self, bits: int) -> Grid:
        """Return the grid with codes of so many bits. Raises LlmqError for one that has no others."""
        raise LlmqError(f"a {type(self).__name__} grid has {self.bits} bits, not {bits}; leave --target-bpw out")

    def stacks_with(self, other: Grid) -> bool:
        """Say whether the rows of a weight on `other`, below those of one on this grid, are fitted as they would be."""
        return self == other


Arguments = dict[str, int | str | bool | list[int] | None]
"""How compressed-tensors describes a grid: `{"num_bits": 4, "type": "int", "symmetric": True, ...}`."""


class RangedGrid(Grid):
    """A grid that covers an interval of values: what ranges place.

    range: how `fit` chooses intervals; None (a grid read from a checkpoint) is min-max.
    """

    range: Range | None = None

    @property
    @abstractmethod
    def sym(self) -> bool:
        """Whether the grid is symmetric about zero."""

    @property
    def falls(self) -> bool:
        """Whether a symmetric grid has a level more on one side, so that it is another one with a negative scale."""
        return False

    @abstractmethod
    def params(self, lo: Tensor, hi: Tensor) -> Parameters:
        """Return the parameters whose grid covers `[lo, hi]`; one that falls does where lo > hi."""

    @property
    def wants_hessian(self) -> bool:
        """Whether the range weighs errors by the group's whole part of H."""
        return getattr(self.range, "wants_hessian", False)

    def plain(self) -> Self:
        """Return the grid with the min-max range."""
        return self if self.range is None else replace(self, range=None)  # type: ignore[type-var]  # a dataclass

    def stacks_with(self, other: Grid) -> bool:
        """See `Grid.stacks_with`; two weights share no scale of several rows."""
        alike = isinstance(other, RangedGrid) and self == other and self.range == other.range
        return alike and isinstance(self.granularity, PerRow | PerGroup)

    @property
    @abstractmethod
    def reach(self) -> float:
        """The magnitude that a grid of scale 1 reaches on both sides."""

    def factors(self, least: float, steps: int) -> list[float]:
        """Return by what a search multiplies the interval of all values: 1 first, `least` the smallest."""
        return torch.linspace(1, least, steps).tolist()

    @property
    def static(self) -> bool:
        """Whether calibration fixes something of the grid, where it is that of an activation."""
        return isinstance(self.granularity, PerTensor)

    def calibrated(self, magnitudes: Tensor, counts: Tensor) -> Parameters:
        """Return what calibration fixes of an activation's grid, `[1]` each.

        magnitudes, counts: of its values, `[n]` each, the largest one last. Scales are positive: runtimes want them so.
        """
        params = self.fit_values(magnitudes[None], counts[None])
        return replace(params, scale=params.scale.abs())

    def largest(self, params: Parameters) -> Tensor:
        """Return the largest magnitude that a calibrated grid keeps, `[1]`."""
        return self.reach * params.scale.float()

    def fake_quantize(self, x: Tensor, fixed: Parameters | None = None) -> Tensor:
        """Return the values that an activation `[..., K]` is rounded to at run time, in the dtype of `x`.

        fixed: what calibration fixed, for a grid that is `static`. Raises ValueError where that is missing.
        """
        raise LlmqError(f"no runtime rounds activations to a {type(self).__name__} grid")

    def fit(self, W_NK: Tensor, H_KK: Tensor | None = None) -> Parameters:
        """Choose the parameters `[N, G]` of float32 `W_NK`, errors weighed by the diagonal of `H_KK` if given.

        `H_KK` may be that diagonal alone, `[K]`. A range that wants the Hessian is handed its diagonal blocks
        `[G, g, g]` in place of the diagonal `[G, g]`. Raises ValueError where the groups do not divide K.
        """
        N, by = len(W_NK), self.granularity
        params = self.fit_values(by.gathered(W_NK), self._weight(H_KK, by, N))
        return params.map(lambda p: by.spread(p, N))

    def fit_values(self, w: Tensor, weight: Tensor | None) -> Parameters:
        """Choose parameters for each row of values `w[..., g]`; weight: of their errors, broadcast to `w`."""
        if self.range is None:
            return self.params(w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0))
        return self.params(*self.range.interval(w, self, weight))

    def _weight(self, H_KK: Tensor | None, by: Granularity, N: int) -> Tensor | None:
        if H_KK is None:
            return None
        G, height = by.groups(len(H_KK)), by.height(N)
        if not self.wants_hessian:
            diagonal = (H_KK if H_KK.dim() == 1 else H_KK.diagonal()).reshape(G, 1, -1)
            return diagonal.expand(G, height, -1).reshape(G, -1)
        g, i = len(H_KK) // G, torch.arange(G, device=H_KK.device)
        return H_KK.reshape(G, g, G, g)[i, :, i, :]


class AffineGrid(RangedGrid):
    """Evenly spaced values by integer codes: `w = scale * (code - zero)`. Its parameters are `Params`.

    It is what the integer formats hold.
    """

    @property
    @abstractmethod
    def scale_dtype(self) -> torch.dtype:
        """The dtype that scales are stored in."""

    @abstractmethod
    def params(self, lo: Tensor, hi: Tensor) -> Params:
        """See `RangedGrid.params`."""

    @abstractmethod
    def bounds(self) -> tuple[float, float]:
        """Return the least and the largest code."""

    @property
    def reach(self) -> float:
        """See `RangedGrid.reach`."""
        return 2.0 ** (self.bits - 1)

    @property
    def falls(self) -> bool:
        """See `RangedGrid.falls`: where all codes are in use."""
        return self.sym and self.bounds()[0] == 0

    def args(self) -> Arguments:
        """Return the description of integers."""
        by = self.granularity
        args: Arguments = {"num_bits": self.bits, "type": "int", "symmetric": self.sym}
        return args | {"strategy": by.strategy, "group_size": by.group_size, "dynamic": False}


class Range(Protocol):
    """Chooses the interval `[lo, hi]` that a grid covers, one for each row of values.

    One whose class says `wants_hessian = True` is given each group's whole part of H for its weight, `[G, g, g]`.
    """

    def interval(self, w: Tensor, grid: RangedGrid, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return lo <= 0 <= hi, each `w.shape[:-1]`, for values `w[..., g]` with error weights broadcast to `w`.

        A grid that falls may be given lo >= 0 >= hi (`RangedGrid.falls`).
        """


@dataclass(frozen=True)
class QTensor:
    """A solved weight, unpacked: the sole currency between solvers and formats.

    codes: uint8 `[N, K]`, in `[0, 2**bits - 1]`.
    params: `Params` (scale and zero, `[N, G]`), `FloatParams` on small floats, or `GgmlParams` on a ggml grid.
    g_idx: int32 `[K]`, the group of each column, or None where it is `k // group_size`.
    input: what calibration fixes of the grid of the input activation (`[1]` each; the zero of integers is the unsigned
        code 128), or None.
    """

    codes: Tensor
    params: Parameters
    grid: Grid
    g_idx: Tensor | None = None
    input: Parameters | None = None

    @property
    def group_K(self) -> Tensor:
        """The group of each column, int64 `[K]`."""
        K, G = self.codes.shape[1], self.params.scale.shape[1]
        return torch.arange(K, device=self.codes.device) // (K // G) if self.g_idx is None else self.g_idx.long()

    @classmethod
    def rounded(cls, W_NK: Tensor, grid: Grid, weight: Tensor | None = None) -> QTensor:
        """Fit a grid to float32 `W_NK` and round to nearest. weight: H, or its diagonal `[K]`, as `Grid.fit` takes it.

        Example: `QTensor.rounded(W_NK, Int(bits=4)).dequantize()` is what plain rounding makes of a weight.
        """
        params = grid.fit(W_NK, weight)
        codes = grid.nearest(W_NK, params.columns(W_NK.shape[1]))
        return cls(codes.to(torch.uint8), params, grid)

    def dequantize(self) -> Tensor:
        """Return the weight that a runtime multiplies with, float32 `[N, K]`."""
        N, K = self.codes.shape
        if self.g_idx is not None:
            return self.grid.decode(self.codes, self.params.columns(K, self.g_idx))
        codes_NGg = self.codes.reshape(N, self.params.scale.shape[1], -1)
        return self.grid.decode(codes_NGg, self.params.map(lambda p: p.unsqueeze(-1))).reshape(N, K)


@dataclass(frozen=True)
class Scheme:
    """What one linear becomes: the grid of its weight and, where its input is quantized too, that of its activation.

    activation: a scale per token (`PerRow`: the rows of an activation are tokens) or, of small floats, per group of a
        token, found at run time; or one for all of them, symmetric, fixed by calibration (`PerTensor`).
    """

    weight: Grid
    activation: RangedGrid | None = None

    def __post_init__(self) -> None:
        by = PerRow() if self.activation is None else self.activation.granularity
        if isinstance(by, PerBlock) or (isinstance(by, PerGroup) and isinstance(self.activation, AffineGrid)):
            raise ValueError(f"activations have scales per token (group=channel) or one (group=tensor), not {by}")
        if self.static and self.activation is not None and not self.activation.sym:
            raise ValueError("static activation scales are symmetric")

    @property
    def static(self) -> bool:
        """Whether calibration fixes something of the input's grid."""
        return self.activation is not None and self.activation.static


@dataclass(frozen=True)
class LinearSpec:
    """A linear to quantize, before any work: full module name, shape `[N, K]` and scheme.

    embedding: it is a table of N tokens, whose rows are looked up; a tied head multiplies with it too.
    """

    name: str
    N: int
    K: int
    scheme: Scheme
    embedding: bool = False


@dataclass(frozen=True)
class Producer:
    """The norm or linear whose output a site reads channel by channel, and nothing else reads: it can take the scales.

    module: its name relative to the block.
    rows: which of its output channels feeds each input channel of the site, `[K]`; None where each feeds its own.
    gain: how a norm stores what it multiplies by, "w" or "1 + w"; "" of a linear.
    per_head: attention alone lies between. It mixes tokens, not channels: any change of basis within a head passes.
    """

    module: str
    rows: tuple[int, ...] | None = None
    gain: str = ""
    per_head: bool = False

    def feeding(self, width: int) -> Tensor:
        """Return `rows` as a tensor, int64 `[K]`. width: how many output channels it has."""
        return torch.arange(width) if self.rows is None else torch.tensor(self.rows)


@dataclass(frozen=True)
class Site:
    """The linears of a block that read one activation, in call order.

    linears: module names relative to the block.
    producer: what their input comes from, where it can absorb a scale for each channel; None where nothing can.
    parent: the smallest module whose output shows the effect of quantizing them (AWQ's loss); "" is the block.
    """

    linears: tuple[str, ...]
    producer: Producer | None = None
    parent: str = ""
