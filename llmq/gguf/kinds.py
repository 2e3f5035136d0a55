"""The types of ggml by name: those of gguf-py, and what its release 0.19 does not know.

    Q2_0    type 42, 64 columns in 18 bytes, file type 41    llama.cpp `ggml/include/ggml.h`, `include/llama.h`

Not here: the bytes of a type (grids/), which tensor gets which (mixture.py).
"""

from typing import NamedTuple

import gguf

from llmq import registry
from llmq.stored import StoredGrid


class Kind(NamedTuple):
    """A type of ggml. number: how files say it. columns, size: of a stored block, its bytes."""

    name: str
    number: int
    columns: int
    size: int


_GGUF = {kind.name: Kind(kind.name, int(kind), *sizes) for kind, sizes in gguf.GGML_QUANT_SIZES.items()}
KINDS = _GGUF | {"Q2_0": Kind("Q2_0", 42, 64, 18)}
QUANTIZED = frozenset(name for name, kind in KINDS.items() if kind.columns > 1)
BY_NUMBER = {kind.number: kind for kind in KINDS.values()}
FILE_TYPES = {t.name.partition("_")[2]: int(t) for t in gguf.LlamaFileType} | {"Q2_0": 41}
"""Values of `general.file_type`, which names the mixture of a file."""


def has_grid(name: str) -> bool:
    """Say whether llmq knows the codes of a type, and not its values alone."""
    return name in QUANTIZED and name.lower() in registry.names("grids")


def grid(name: str) -> StoredGrid:
    """Return the grid of a type; where a range may be chosen it is searched, as the others search themselves."""
    searched = ":range=mse" if registry.lacks("grids", name.lower(), "range") else ""
    found = registry.load("grids", f"{name.lower()}{searched}")
    if not isinstance(found, StoredGrid):
        raise TypeError(f"{name} is no type of ggml")
    return found
