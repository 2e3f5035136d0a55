"""Rotate: write the weights in another basis, in which outliers are spread; the function is unchanged.

heads     each key-value head's values, by one orthogonal Q `[d, d]`.
residual  the residual stream, by one orthogonal R `[H, H]`. A head that is tied to the embedding is untied by it.

Q and R are Hadamard matrices with random signs, times a random orthogonal factor where the size is no power of two.
Ashkboos et al. 2024, arXiv:2404.00456, section 4 (QuaRot): those of its rotations that leave a standard file. An
alternative to AWQ's scales rather than an addition to them.
Not here: turning a checkpoint's tensors by them (rotated.py), rounding (rtn.py, gptq.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmq.steps import Bases, Rotation


@dataclass(frozen=True)
class Rotate(Rotation):
    """Foldable rotations.

    heads: rotate what passes from the value to the output projection. residual: rotate the residual stream.
    untie: permit `residual` to give a model with tied embeddings a head of its own, which the file then holds too.
    seed: of the random signs.
    """

    heads: bool = True
    residual: bool = False
    untie: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.heads or self.residual):
            raise ValueError("heads and residual are both off: nothing is rotated")

    def rotate(self, head_dim: int, hidden_size: int) -> Bases:
        """Return the bases to write a model of these sizes in."""
        draw = torch.Generator().manual_seed(self.seed)
        Q_dd = orthogonal(head_dim, draw) if self.heads else None
        return Bases(Q_dd, orthogonal(hidden_size, draw) if self.residual else None)


def orthogonal(n: int, draw: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix, float32 `[n, n]`, whose entries are all about `n ** -0.5`.

    A Hadamard matrix of the largest power of 2 that divides n, times a random rotation of what is left, random signs.
    """
    power = n & -n
    H = torch.ones(1, 1, dtype=torch.float64)
    while len(H) < power:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    rest, _ = torch.linalg.qr(torch.randn(n // power, n // power, generator=draw, dtype=torch.float64))
    signs = torch.randint(2, (n, 1), generator=draw) * 2.0 - 1
    return (signs * torch.kron(rest.contiguous(), H * power**-0.5)).float()
