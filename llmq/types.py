"""The domain: what flows from a float checkpoint to packed words. Read this first.

Data changes kind once per verb: floats -> stats -> codes -> words -> shard.

- `Grid` says where the values of a weight may lie; `Range` says which interval such a grid covers.
- `QTensor` is a solved weight with unpacked codes: the only thing a solver hands to a format, so that one solve can be
  written in many formats with identical codes.
- `Site` names the linears of a block that read one activation; they share their statistics.
- Steps, in the order they run: `Transform` maps floats to floats and preserves the function of the block; `Correction`
  maps floats to the floats that make up for what earlier blocks lost; `Solver` maps floats to a QTensor; `Refiner` maps
  a QTensor to one of less error; `Tuner` improves all QTensors of a block together.
- `Format` maps a QTensor to the named tensors of a checkpoint and back.

Shape suffixes: N output features, K input features, G groups along K, g columns of a group, T tokens.
Not here: any algorithm. Every protocol has its implementations in the folder of its plural name, one file each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from llmq.errors import LlmqError as LlmqError  # noqa: PLC0414
from llmq.guard.patterns import Pattern
from llmq.params import GgmlParams as GgmlParams  # noqa: PLC0414
from llmq.params import Lattice as Lattice  # noqa: PLC0414
from llmq.params import Params as Params  # noqa: PLC0414


class Grid(Protocol):
    """The values that a weight may take, group by group along K. Its parameters are `Params` or `GgmlParams`."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def group_size(self) -> int | None:
        """Columns that share a scale; None is per channel."""

    def fit(self, W_NK: Tensor, H_KK: Tensor | None = None) -> Any:
        """Choose where the grid of every group lies; `H_KK` weighs the errors where the range uses it."""

    def beyond(self, W_NK: Tensor) -> Tensor:
        """Say of each group or stored block whether the file cannot hold its scale: too small, or too large."""

    def nearest(self, w: Tensor, params: Any) -> Tensor:
        """Return the nearest codes, float32 integers; `params` broadcasts against `w`."""

    def decode(self, codes: Tensor, params: Any) -> Tensor:
        """Return the float32 values of `codes`; `params` broadcasts against `codes`."""

    def lattice(self, params: Any) -> Lattice | None:
        """Return `[N, G]` parameters as evenly spaced values; None where the values of a group are not."""

    def refine(
        self, error_NK: Tensor, gradient_NK: Tensor, codes: Tensor, params: Any, H_KK: Tensor, group_K: Tensor
    ) -> Any:
        """Return other params for solved codes `[N, K]`, proposed to lower `tr (W - Q) H (W - Q)^T` row by row.

        error_NK, gradient_NK: W - Q and (W - Q) H. group_K: int64 `[K]`, the group of each column.
        """


class Range(Protocol):
    """Chooses the interval `[lo, hi]` that a grid covers, one for each row of values."""

    def interval(self, w: Tensor, grid: AffineGrid, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return lo <= 0 <= hi, each `w.shape[:-1]`, for values `w[..., g]` with error weights broadcast to `w`.

        A symmetric grid may be given lo >= 0 >= hi: it then falls (`AffineGrid.params`).
        """


class AffineGrid(Protocol):
    """What a range search may ask of a grid."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def sym(self) -> bool:
        """Whether the grid is symmetric about zero."""

    def params(self, lo: Tensor, hi: Tensor) -> Params:
        """Return the parameters whose grid covers `[lo, hi]`; a symmetric grid falls where lo > hi."""

    def bounds(self) -> tuple[float, float]:
        """Return the least and the largest code."""

    def nearest(self, w: Tensor, params: Params) -> Tensor:
        """See `Grid.nearest`."""

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """See `Grid.decode`."""


@dataclass(frozen=True)
class QTensor:
    """A solved weight, unpacked: the sole currency between solvers and formats.

    codes: uint8 `[N, K]`, in `[0, 2**bits - 1]`.
    params: `Params` (scale and zero, `[N, G]`), or `GgmlParams` on a ggml grid.
    g_idx: int32 `[K]`, the group of each column, or None where it is `k // group_size`.
    input: the static grid of the linear's input activation (`[1]` each, zero the unsigned code 128), or None.
    """

    codes: Tensor
    params: Any  # what the grid's fit returns
    grid: Grid
    g_idx: Tensor | None = None
    input: Params | None = None

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
class ActivationGrid:
    """How the input activation of a linear is quantized: int8.

    dynamic: one scale per token, computed at run time; else one scale per tensor, fixed by calibration.
    sym: symmetric about zero; else a token has a zero point too. Static scales are symmetric.
    """

    bits: int = 8
    dynamic: bool = True
    sym: bool = True

    def __post_init__(self) -> None:
        if not (self.dynamic or self.sym):
            raise ValueError("static activation scales are symmetric")


@dataclass(frozen=True)
class Scheme:
    """What one linear becomes: a weight grid and, for W8A8, an activation grid."""

    weight: Any  # a Grid; concrete classes are dataclasses with more fields than the protocol
    activation: ActivationGrid | None = None


@dataclass(frozen=True)
class LinearSpec:
    """A linear to quantize, before any work: full module name, shape `[N, K]` and scheme."""

    name: str
    N: int
    K: int
    scheme: Scheme


@dataclass(frozen=True)
class Site:
    """The linears of a block that read one activation, in call order.

    linears: module names relative to the block.
    producer: the module whose output they read and that can absorb a per-channel scale (a norm or a linear), or None.
    parent: the smallest module whose output shows the effect of quantizing them (AWQ's loss); "" is the block.
    per_head: attention alone lies between the producer's channels and the linears. It mixes tokens, not channels: any
        change of basis within a head passes through it.
    """

    linears: tuple[str, ...]
    producer: str | None = None
    parent: str = ""
    per_head: bool = False


@dataclass(frozen=True)
class Target:
    """A linear that a solver is asked to quantize: float32 `W_NK` and the grid to put it on.

    report: what earlier steps record of it in `quantization.json`.
    importance: what the squared error of each input channel counts, `[K]`, where the user gave it (an imatrix).
    """

    name: str
    W_NK: Tensor
    grid: Any
    report: Mapping[str, Any] = field(default_factory=dict)
    importance: Tensor | None = None


@dataclass(frozen=True)
class Solved:
    """A solver's answer for one linear, with what `quantization.json` records of it."""

    q: QTensor
    report: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Stat(Protocol):
    """An accumulator over the activations of a site; merging two ranks' accumulators is exact.

    paired: whether `update` also wants the activations of the float model for the same tokens.
    weighed: whether the activations come times the square root of their token's weight, where tokens are weighed.
    """

    paired: ClassVar[bool]
    weighed: ClassVar[bool]

    def update(self, X_TK: Tensor, F_TK: Tensor | None = None) -> None:
        """Add a batch of activations `[T, K]`, `F_TK` those of the float model where `paired`."""

    def merge(self, other: Any) -> None:
        """Add what another rank accumulated (a sum or a maximum, exactly)."""


Stats = Mapping[type, Any]
"""The accumulators of one site by their class."""


class Bases(NamedTuple):
    """Orthogonal matrices, float32: of the channels of one value head `[d, d]`, of the residual stream `[H, H]`."""

    head: Tensor | None
    stream: Tensor | None


class Rotation(Protocol):
    """Floats to floats, for the whole checkpoint: another basis for its weights; the function is unchanged.

    untie: whether a head that is tied to the embedding may become a tensor of its own.
    """

    untie: bool

    def rotate(self, head_dim: int, hidden_size: int) -> Bases:
        """Return the bases to write a model of these sizes in."""


class Weighting(Protocol):
    """Says how much each calibration token counts in the errors that later steps lower."""

    def weigh(self, squares: Sequence[Tensor]) -> Tensor:
        """Return the weights of the tokens of a site `[T]`, 1 on average.

        squares: for each of its linears, the squared gradient of the model's loss at its output, float32 `[T]`.
        """


class Correction(Protocol):
    """Floats to floats: moves the weights of a site to where they make up for the error of their input.

    share: of the calibration, how much must run through the float model too.
    """

    share: float

    def needs(self, grids: Sequence[Any]) -> tuple[type[Any], ...]:
        """Return the Stat classes to accumulate."""

    def correct(self, targets: Sequence[Target], stats: Stats) -> list[Target]:
        """Return the targets with corrected weights, in the order given."""


class Solver(Protocol):
    """Floats to codes, for the linears of one site at a time."""

    def needs(self, grids: Sequence[Any]) -> tuple[type[Any], ...]:
        """Return the Stat classes to accumulate for linears on these grids; none means no calibration."""

    def solve(self, targets: Sequence[Target], stats: Stats) -> list[Solved]:
        """Quantize the linears of a site, in the order given."""


class Refiner(Protocol):
    """Codes to better codes, for the linears of one site at a time."""

    def needs(self, grids: Sequence[Any]) -> tuple[type[Any], ...]:
        """Return the Stat classes to accumulate."""

    def refine(self, targets: Sequence[Target], solved: Sequence[Solved], stats: Stats) -> list[Solved]:
        """Return the solved linears with less error, in the order given; never with more."""


@dataclass(frozen=True)
class BlockView:
    """What a tuner sees of a solved block.

    block: the transformers block, with the dequantized weights in place.
    solved: its quantized linears by relative name. targets: what the solver was asked for each.
    inputs: the hidden states that enter it, `[B, S, H]` a batch, as the quantized blocks before it made them.
    outputs: what the float model's block makes of its own input, batch by batch.
    calls: the other arguments of the block, batch by batch.
    seed: for whatever the tuner draws at random.
    """

    block: Any
    solved: Mapping[str, Solved]
    targets: Mapping[str, Target]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    seed: int


class Tuner(Protocol):
    """Codes to better codes, for all linears of a block together, by the block's output."""

    def tune(self, view: BlockView) -> dict[str, Solved]:
        """Return the block's quantized linears, never with a greater error of the block's output than before."""


@dataclass(frozen=True)
class ModelView:
    """What a finisher sees of the whole quantized model.

    scales: for each linear the change of its group scales, relative to them, float32 `[N, G]`. norms: gains of norms.
        Leaves that ask for gradients, to be moved in place.
    loss: returns the mean KL from the float model's predictions over one calibration sequence, of so many `rows`.
    seed: for whatever the finisher draws at random.
    """

    scales: list[Tensor]
    norms: list[Tensor]
    loss: Callable[[int], Tensor]
    rows: int
    seed: int


class Finisher(Protocol):
    """Scales and norms to better ones, for the whole model together, by its predictions."""

    def finish(self, view: ModelView) -> dict[str, float]:
        """Move the parameters of the view; return what is recorded. Never to a greater loss on what it judges by."""


@dataclass(frozen=True)
class SiteView:
    """What a transform sees of one site of a float block.

    modules: the block's modules by relative name (weights float32), left as they are.
    stats: the accumulators of the site's activation.
    calls: recorded `(args, kwargs)` of the parent module, where the transform asked for them.
    schemes: what each linear of the site becomes, None where it stays float.
    head_dim: channels of one attention head.
    """

    site: Site
    modules: Mapping[str, Any]
    stats: Stats
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    schemes: Sequence[Scheme | None]
    head_dim: int

    @property
    def grids(self) -> list[Any]:
        """The grid of each linear's weight, None where it stays float."""
        return [s.weight if s else None for s in self.schemes]


class Scaling(NamedTuple):
    """What a transform found for a site.

    scale: float32 `[K]`, by which the columns of the site's linears are multiplied and its producer is divided;
        alike for the channels that read one channel of the producer.
    report: what `quantization.json` records of it at each of the linears.
    """

    scale: Tensor
    report: dict[str, Any]


class Transform(Protocol):
    """Floats to floats: finds scales with which a block quantizes better; its function is unchanged.

    preferred_range: the range a recipe that names none gets, or None; call_tokens: tokens of the parent's input that
    are kept for the search, 0 for none.
    """

    preferred_range: str | None
    call_tokens: int

    def needs(self, site: Site) -> tuple[type[Any], ...]:
        """Return the Stat classes to accumulate at a site; none means that the site is left alone."""

    def search(self, view: SiteView) -> Scaling | None:
        """Return the scales to fold into the block (folding.py), or None where nothing applies to the site.

        All sites are searched before any is folded, so that each sees the block's original weights.
        """


@dataclass(frozen=True)
class FloatModel:
    """A float model as formats see it before any work.

    config: transformers' config. tokenizer: loads transformers' tokenizer. shapes: of every tensor that the model
    reads. linears: the modules of its blocks that hold a matrix. head: the output head.
    """

    config: object
    tokenizer: Callable[[], object]
    shapes: Mapping[str, Sequence[int]]
    linears: Sequence[str]
    head: str


class Wanted(Protocol):
    """What a recipe wants of any model, for a format to say what that means for one."""

    @property
    def override(self) -> Sequence[str]:
        """Overrides as they were written, later ones win."""

    @property
    def skip(self) -> Sequence[Pattern]:
        """Which linears stay float."""

    @property
    def head(self) -> bool:
        """Whether the output head is asked for."""

    @property
    def weighs(self) -> bool:
        """Whether the method weighs errors by activations."""

    def schemes(self, linears: Sequence[str]) -> dict[str, Scheme]:
        """Return what the recipe's base scheme, overrides and skips make of linears; those not named stay float.

        Raises LlmqError for an override or a skip that matches none.
        """


@dataclass(frozen=True)
class Assignment:
    """What becomes of every matrix of a model, decided before any work.

    schemes: by the full name of the module; a matrix that is not named stays float.
    importance: what the squared error of each input channel counts, `[K]`, by module, where the user gave it.
    """

    schemes: Mapping[str, Scheme]
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    warnings: Sequence[str] = ()


class Format(Protocol):
    """Bits on disk, pure per linear. A dataclass whose fields are the options of the format.

    quant_method: the name in `quantization_config`.
    """

    quant_method: str

    @property
    def derived(self) -> frozenset[str]:
        """Local names of tensors that follow from the config and the rest, so that a peer's file may lack them."""

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which this format stores scales; the grid is fitted in it."""

    def assign(self, model: FloatModel, wanted: Wanted) -> Assignment:
        """Return what every matrix becomes under a recipe. Raises LlmqError for what the model does not admit."""

    def check(self, linears: Sequence[LinearSpec]) -> list[str]:
        """Before writing: refuse, by LlmqError, what the format cannot hold; return warnings about runtimes."""

    def pack(self, q: QTensor, spec: LinearSpec) -> dict[str, Tensor]:
        """Return the tensors of one linear by their local names, without its bias."""

    def unpack(self, tensors: Mapping[str, Tensor], spec: LinearSpec) -> QTensor:
        """Invert `pack`. Raises LlmqError that names the tensor when one is missing or has a wrong shape."""

    def layout(self, spec: LinearSpec) -> dict[str, Tensor]:
        """Return meta tensors of the names, shapes and dtypes that `pack` gives; files may hold other float widths."""

    def config(self, linears: Sequence[LinearSpec], skipped: Sequence[str]) -> dict[str, Any]:
        """Return the `quantization_config`; `skipped` are the linears of the model that stay float."""

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> tuple[Any, Callable[[str, int, int], Scheme | None]]:
        """Return the format of a `quantization_config` and `scheme(name, N, K)`, None for a module that is float."""
