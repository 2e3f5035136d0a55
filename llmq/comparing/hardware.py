"""Which GPU multiplies which weights and inputs, and whether a model fits it: data sheets, no measurement.

    gpu("RTX 4090")                    24 GB, Ada
    runs(plan, 3e9, gpu("RTX 4090"))   Answer(True, "")

Facts: NVIDIA's and AMD's data sheets; which kernels vLLM and llama.cpp have for a generation, as docs/floats.md says.
Not here: which runtime reads a file (readers.py), how fast it is (pipeline/machines.py).
"""

import re
from typing import NamedTuple

from llmq.errors import LlmqError, printable
from llmq.pipeline.machines import MACHINES
from llmq.recipe import Recipe

TURING, AMPERE, ADA, HOPPER, BLACKWELL = "Turing", "Ampere", "Ada", "Hopper", "Blackwell"
CDNA3, APPLE = "CDNA 3", "Apple"
_NVIDIA = (TURING, AMPERE, ADA, HOPPER, BLACKWELL)


class Gpu(NamedTuple):
    """A GPU: its name, its memory in GB, its generation."""

    name: str
    memory: float
    generation: str


class Answer(NamedTuple):
    """Whether it runs, and why not, or how: by the weights alone."""

    runs: bool
    why: str


_OF_MACHINES = {
    "a100": AMPERE, "h100": HOPPER, "h200": HOPPER, "b200": BLACKWELL, "l40s": ADA, "rtx4090": ADA, "mi300x": CDNA3,
}  # fmt: skip
_OTHERS = {
    "t4": (16, TURING), "rtx2080ti": (11, TURING), "a10": (24, AMPERE), "rtx3060": (12, AMPERE),
    "rtx3090": (24, AMPERE), "l4": (24, ADA), "rtx4060": (8, ADA), "rtx4080": (16, ADA), "rtx5080": (16, BLACKWELL),
    "rtx5090": (32, BLACKWELL),
}  # fmt: skip
GPUS = {n: Gpu(n, MACHINES[n].memory, g) for n, g in _OF_MACHINES.items()} | {
    n: Gpu(n, memory, g) for n, (memory, g) in _OTHERS.items()
}
"""The GPUs that `--on` knows."""
_FROM: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "int": ((AMPERE, ADA, HOPPER, BLACKWELL, CDNA3), ()),
    "fp8": ((ADA, HOPPER, BLACKWELL, CDNA3), (AMPERE,)),
    "nvfp4": ((BLACKWELL,), (TURING, AMPERE, ADA, HOPPER)),
    "mxfp4": ((BLACKWELL,), (AMPERE, ADA, HOPPER)),
    "mxfp8": (_NVIDIA, ()),
}
"""By the grid of the inputs: generations that multiply it, and those that take the weights alone."""
_WEIGHTS: dict[str, tuple[str, ...]] = {"nvfp4": _NVIDIA, "mxfp4": (AMPERE, ADA, HOPPER, BLACKWELL), "mxfp8": _NVIDIA}
"""By the grid of weights beside float inputs, where not every generation multiplies it."""


def gpu(name: str) -> Gpu:
    """Return the GPU of that name, however it is spelled. Raises LlmqError, with all names, for another."""
    bare = re.sub(r"nvidia|geforce|amd|instinct|tesla|sxm|pcie|\b\d+ ?gb\b|[\s_-]", "", name.lower())
    bare = f"rtx{bare}" if f"rtx{bare}" in GPUS else bare
    if bare not in GPUS:
        raise LlmqError(f"--on {printable(name, 80)}: no such GPU is known (there are: {', '.join(GPUS)})")
    return GPUS[bare]


def runs(recipe: Recipe, size: float, on: Gpu) -> Answer:
    """Say whether a GPU runs a model of some bytes. recipe: how it was made."""
    if size > 0.95 * on.memory * 1e9:
        return Answer(False, f"its {size / 1e9:.1f} GB do not fit {on.memory:g} GB")
    if (recipe.format or "").startswith("mlx"):
        return Answer(on.generation == APPLE, "MLX runs on Macs")
    if recipe.gguf:
        return Answer(True, "")
    inputs = "int" if recipe.act_bits else (recipe.inputs or "").partition(":")[0]
    weights = (recipe.weights or "int").partition(":")[0]
    if not inputs:
        return _of(on, weights, _WEIGHTS.get(weights, (*_NVIDIA, CDNA3)), ())
    return _of(on, inputs, *_FROM.get(inputs, ((*_NVIDIA, CDNA3), ())))


def _of(on: Gpu, kind: str, native: tuple[str, ...], alone: tuple[str, ...]) -> Answer:
    if on.generation in native:
        return Answer(True, "")
    if on.generation in alone:
        return Answer(True, f"{on.generation} has no {kind} products: by the weights alone")
    return Answer(False, f"{on.generation} does not multiply {kind}: {', '.join((*native, *alone))} do")
