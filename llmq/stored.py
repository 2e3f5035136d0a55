"""Grids that are their own byte layout, as ggml's types are: what a GGUF file can hold.

Not here: the layouts (grids/), the file (gguf/).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from llmq.types import Grid, Parameters


class StoredGrid(Grid):
    """A grid that is its own byte layout: rows of a weight as bytes, and back.

    once: the names of what is stored beside the rows of a weight.
    """

    once: ClassVar[tuple[str, ...]] = ()

    @property
    def kind(self) -> str:
        """What ggml calls the type."""
        return type(self).__name__.upper()

    @abstractmethod
    def row_bytes(self, K: int) -> int:
        """Return the bytes of a row of K columns. Raises ValueError where they do not fill whole stored blocks."""

    @abstractmethod
    def to_bytes(self, codes: Tensor, params: Parameters) -> Tensor:
        """Return the stored rows, uint8 `[N, row_bytes]`. Raises ValueError for params spread over columns."""

    @abstractmethod
    def from_bytes(self, rows: Tensor, once: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Parameters]:
        """Return codes, uint8 `[N, K]`, and params of stored rows, uint8 `[N, row_bytes]`. once: see `stored_once`."""

    def stored_once(self, params: Parameters) -> dict[str, Tensor]:
        """Return what is stored once for a weight, beside its rows, by local names: float32 `[1]` each, `once`."""
        return {}
