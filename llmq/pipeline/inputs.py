"""Which inputs go with which weights: the pairs that some format and some runtime have.

    weights                     inputs
    int:bits=8                  int:bits=8, per token or per tensor             W8A8
    int:bits=4:group=128        fp8                                             W4AFP8: Hopper
    fp8, fp8:group=tensor       fp8, fp8:group=tensor
    fp8:group=128x128           fp8:group=128                                   DeepSeek's blocks
    nvfp4                       nvfp4
    mxfp4                       mxfp4, fp8:group=128
    mxfp8                       mxfp8

Inputs that stay float go with all. Facts: docs/floats.md.
Not here: where a static grid of an input lies (activations.py), the layouts that formats hold (`Format.check`).
"""

from llmq import registry
from llmq.granularity import PerTensor
from llmq.grids.int import Int
from llmq.types import Grid, LlmqError, RangedGrid, Scheme

_PAIRS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("int:bits=4:group=128", ("fp8",)),
    ("fp8", ("fp8", "fp8:group=tensor")),
    ("fp8:group=tensor", ("fp8", "fp8:group=tensor")),
    ("fp8:group=128x128", ("fp8:group=128",)),
    ("nvfp4", ("nvfp4",)),
    ("mxfp4", ("mxfp4", "fp8:group=128")),
    ("mxfp8", ("mxfp8",)),
)


def unpaired(scheme: Scheme) -> str:
    """Return why the inputs do not go with the weights, with what would, "" where they do."""
    weight, inputs = scheme.weight, scheme.activation
    if inputs is None or (isinstance(inputs, Int) and weight.bits == 8 and isinstance(weight, Int)):
        return ""
    if isinstance(inputs, Int) and isinstance(weight, Int):
        return f"8-bit activations need 8-bit weights, not {weight.bits}; say --weights int:bits=8"
    with_weight = [text for said, texts in _PAIRS for text in texts if _load(said) == weight]
    if any(_load(text) == inputs for text in with_weight):
        return ""
    dumped = registry.dump(inputs.plain())
    with_inputs = [said for said, texts in _PAIRS if any(_load(text) == inputs for text in texts)]
    remedy = f"say --inputs {' or '.join(with_weight)}" if with_weight else "leave --inputs out"
    remedy += f", --weights {' or '.join(with_inputs)}" if with_inputs else ""
    return f"no runtime multiplies {registry.dump(weight.plain())} weights with {dumped} inputs; {remedy}"


def input_grid(grid: Grid, said: str) -> RangedGrid:
    """Return a grid as one of inputs. Raises LlmqError, with what the user `said`, for one that inputs do not have."""
    if not isinstance(grid, RangedGrid):
        raise LlmqError(f"{said}: inputs lie on int, fp8, nvfp4, mxfp4 or mxfp8, not on {type(grid).__name__}")
    if isinstance(grid, Int) and (grid.bits != 8 or grid.restricted):
        raise LlmqError(f"{said}: integer inputs are int:bits=8 and not restricted")
    if grid.range is not None and not isinstance(grid.granularity, PerTensor):
        raise LlmqError(f"{said}: a range means nothing where scales are found at run time; leave it out")
    try:
        Scheme(grid, grid)
    except ValueError as e:
        raise LlmqError(f"{said}: {e}") from e
    return grid


def _load(text: str) -> Grid:
    grid: Grid = registry.load("grids", text)
    return grid
