"""The verbs: what each kind of step is given and what it gives back. Read this second, after types.py.

A method such as `qep,gptq,descent` is a list of steps. A step is one dataclass in one file of algorithms/; the class it
derives from says what it does, and when. In the order they run:

    Rotation     the model   floats -> floats   another basis for the weights, before anything is read
    Weighting    the model   how much each calibration token counts
    Transform    a block     floats -> floats   scales moved between modules; the block computes what it did
    Correction   a site      floats -> floats   makes up for what earlier blocks lost
    Solver       a site      floats -> codes
    Refiner      a site      codes -> codes     of less error
    Tuner        a block     codes -> codes     all of a block together, by its output
    Finisher     the model   scales and norms, by its predictions

A site is a matrix: its linears read the same activation, so that those on one grid are stacked along their rows before
they are solved, and split again afterwards (pipeline/site.py). A solver never sees which linear a row belongs to, nor
all rows at once: it is given a piece of them after the other.

    class Rtn(Solver):
        def solve(self, W_NK, grid, stats):
            return Solved(QTensor.rounded(W_NK, grid))

Not here: the steps themselves (algorithms/), who calls them (pipeline/).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from llmq.stats import Stat, Stats
from llmq.team import ALONE, Team
from llmq.types import Grid, QTensor, Scheme, Site


class Held(NamedTuple):
    """Float32 matrices that a step makes in memory at most, beside what it is given: `[K, K]`, and `[N, K]`."""

    KK: float
    NK: float


class Operations(NamedTuple):
    """What a step computes for a matrix of N rows and K columns, that of a site: how long it takes follows.

    factor: flops of Cholesky factors. products: of other float32 products. columns: of the column loop (_sweep.py).
    looks: codes that are looked at one by one (_walk.py). fits: values that a grid is fitted to. passes: values that
    are gone through, element by element.
    """

    factor: float = 0
    products: float = 0
    columns: float = 0
    looks: float = 0
    fits: float = 0
    passes: float = 0


class Step(ABC):
    """One step of a method.

    kind: what messages call it. alone: whether a method has one such step at most. held: what it takes of memory.
    """

    kind: ClassVar[str]
    alone: ClassVar[bool] = False
    held: ClassVar[Held] = Held(3, 8)

    def operations(self, N: int, K: int) -> Operations:
        """Return what the step computes for a site of N rows and K columns; nothing of note where it does not say."""
        return Operations()

    def forwards(self, samples: int, length: int) -> float:
        """Return how many forwards over the whole calibration the step takes, of a block or of the model.

        samples, length: sequences, and tokens of each. A backward counts as two forwards.
        """
        return 0.0


class Bases(NamedTuple):
    """Orthogonal matrices, float32: of the channels of one value head `[d, d]`, of the residual stream `[H, H]`."""

    head: Tensor | None
    stream: Tensor | None


class Rotation(Step):
    """Floats to floats, for the whole checkpoint: another basis for its weights; the function is unchanged.

    untie: whether a head that is tied to the embedding may become a tensor of its own.
    """

    kind = "rotation"
    alone = True
    untie: bool = False

    @abstractmethod
    def rotate(self, head_dim: int, hidden_size: int) -> Bases:
        """Return the bases to write a model of these sizes in."""


class Weighting(Step):
    """Says how much each calibration token counts in the errors that later steps lower."""

    kind = "weighting"
    alone = True

    @abstractmethod
    def weigh(self, squares: Sequence[Tensor]) -> Tensor:
        """Return the weights of the tokens of a site `[T]`, 1 on average.

        squares: for each of its linears, the squared gradient of the model's loss at its output, float32 `[T]`.
        """


@dataclass(frozen=True)
class SiteView:
    """What a transform sees of one site of a float block.

    modules: the block's modules by relative name (weights float32), left as they are.
    stats: the accumulators of the site's activation.
    calls: recorded `(args, kwargs)` of the parent module, where the transform asked for them.
    schemes: what each linear of the site becomes, None where it stays float.
    team: processes that all see the same and search together; each may try some of the candidates.
    """

    site: Site
    modules: Mapping[str, Any]
    stats: Stats
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    schemes: Sequence[Scheme | None]
    team: Team = ALONE

    @property
    def grids(self) -> list[Grid | None]:
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


class Transform(Step):
    """Floats to floats: finds scales with which a block quantizes better; its function is unchanged.

    preferred_range: the range a recipe that names none gets, or None; call_tokens: tokens of the parent's input that
    are kept for the search, 0 for none. of_integers: whether it reckons with evenly spaced values alone.
    """

    kind = "transform"
    of_integers: ClassVar[bool] = False
    preferred_range: ClassVar[str | None] = None
    call_tokens: int = 0

    @property
    def candidates(self) -> int:
        """How many candidates several processes deal; 1 where each searches for itself."""
        return 1

    @abstractmethod
    def needs(self, site: Site) -> tuple[type[Stat], ...]:
        """Return the statistics to collect at a site; none means that the site is left alone."""

    @abstractmethod
    def search(self, view: SiteView) -> Scaling | None:
        """Return the scales to fold into the block (model/folding.py), or None where nothing applies to the site.

        All sites are searched before any is folded, so that each sees the block's original weights.
        """


class SiteStep(Step):
    """A step that works on the matrix of a site with the statistics of the activation that it reads."""

    @abstractmethod
    def needs(self, grids: Sequence[Grid]) -> tuple[type[Stat], ...]:
        """Return the statistics to collect for linears on these grids; none means no calibration."""


class Correction(SiteStep):
    """Floats to floats: moves the weights of a site to where they make up for the error of their input.

    share: of the calibration, how much must run through the float model too.
    """

    kind = "correction"
    share: float = 1.0

    def judge(self, W_NK: Tensor, stats: Stats) -> Tensor:
        """Return numbers of each row, float32 `[N, m]`, whose sums over all rows of a linear `correct` wants to know.

        W_NK: float32, some rows of linears of the site.
        """
        return W_NK.new_zeros(len(W_NK), 0)

    @abstractmethod
    def correct(self, W_NK: Tensor, sums_Nm: Tensor, stats: Stats) -> Tensor:
        """Return the corrected rows. sums_Nm: for each row, the sums of what was judged over all rows of its linear."""

    def line(self, sums_m: Tensor, stats: Stats) -> dict[str, Any]:
        """Return what is recorded of a linear with these sums, once it is corrected."""
        return {}


@dataclass(frozen=True)
class Solved:
    """A solver's answer, with what `quantization.json` records of it.

    ratios: what is recorded as a ratio of two sums over rows, dividend and divisor.
    """

    q: QTensor
    report: dict[str, Any] = field(default_factory=dict)
    ratios: dict[str, tuple[float, float]] = field(default_factory=dict)


class Solver(SiteStep):
    """Floats to codes. desc_act: whether it may leave groups in another order than the columns, as g_idx says."""

    kind = "solver"
    alone = True
    desc_act: bool = False

    @abstractmethod
    def solve(self, W_NK: Tensor, grid: Grid, stats: Stats) -> Solved:
        """Return float32 `W_NK` on a grid."""


class Refiner(SiteStep):
    """Codes to better codes."""

    kind = "refiner"

    @abstractmethod
    def refine(self, W_NK: Tensor, solved: Solved, stats: Stats) -> Solved:
        """Return what was solved for float32 `W_NK` with less error, row by row, never with more."""


@dataclass(frozen=True)
class BlockView:
    """What a tuner sees of a solved block.

    block: the transformers block, with the dequantized weights in place.
    solved: its quantized linears by relative name. targets: the float32 weight `[N, K]` that each was made of.
    inputs: the hidden states that enter it, `[B, S, H]` a batch, as the quantized blocks before it made them.
    outputs: what the float model's block makes of its own input, batch by batch.
    calls: the other arguments of the block, batch by batch.
    seed: for whatever the tuner draws at random.
    """

    block: Any
    solved: Mapping[str, Solved]
    targets: Mapping[str, Tensor]
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    seed: int


class Tuner(Step):
    """Codes to better codes, for all linears of a block together, by the block's output."""

    kind = "tuner"

    @abstractmethod
    def tune(self, view: BlockView) -> dict[str, Solved]:
        """Return the block's quantized linears, never with a greater error of the block's output than before."""


@dataclass(frozen=True)
class ModelView:
    """What a finisher sees of the whole quantized model.

    scales: for each linear the change of its group scales, relative to them, float32 `[N, G]`. norms: gains of norms.
        Leaves that ask for gradients, to be moved in place.
    loss: returns the mean KL from the float model's predictions over one calibration sequence, of so many `rows`.
    seed: for whatever the finisher draws at random.
    keep: keeps tensors and facts (JSON) from which it can go on, should the run be killed. kept: what a run that was
        killed kept last, None where none did.
    """

    scales: list[Tensor]
    norms: list[Tensor]
    loss: Callable[[int], Tensor]
    rows: int
    seed: int
    keep: Callable[[Mapping[str, Tensor], Mapping[str, Any]], None] = lambda tensors, facts: None
    kept: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None


class Finisher(Step):
    """Scales and norms to better ones, for the whole model together, by its predictions."""

    kind = "finisher"

    @abstractmethod
    def finish(self, view: ModelView) -> dict[str, float]:
        """Move the parameters of the view; return what is recorded. Never to a greater loss on what it judges by."""


RUNNING_ORDER: tuple[type[Step], ...] = (
    Rotation, Weighting, Transform, Correction, Solver, Refiner, Tuner, Finisher,
)  # fmt: skip
"""The kinds of step in the order they run."""
