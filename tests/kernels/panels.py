"""Panels of columns to round and to walk over, and whether the ops do what their references do, to the last bit.

Among the groups: one of scale 0, one that falls (a negative scale); matrices by rows and by columns.
"""

import torch

from llmq_kernels import panel

SHAPES = {  # name: (columns, rows, groups, bits, least code, values in the table)
    "a whole panel, two programs": (64, 40, 2, 4, 0, 0),
    "half a panel, one group, 2 bits": (21, 32, 1, 2, 0, 0),
    "a group for each column, 8 bits, restricted": (5, 3, 5, 8, 1, 0),
    "a table of 16 values": (24, 40, 2, 4, 0, 16),
    "a table of 250 values": (9, 33, 3, 8, 0, 250),
}


def table(count, zeros=2):
    """Return the values and edges of a table with so many zeros, all that is half-way going down; `[0]` for none."""
    if not count:
        return torch.empty(0), torch.empty(0)
    half = torch.linspace(0.1, 2, (count - zeros) // 2) ** 2
    values = torch.cat([-half.flip(0), torch.zeros(zeros), half])
    between = (values[1:] + values[:-1]) / 2
    more = 2 ** (count - 1).bit_length() - count
    ends = torch.full((1,), -torch.inf), torch.full((more,), torch.inf)
    return torch.cat([values, values[-1:].expand(more)]), torch.cat([ends[0], between, ends[1]])


def problem(P, N, G, bits, seed=0, values=0):
    """Return a gradient or target, a matrix, the groups, and the values of a grid."""
    draw = torch.Generator().manual_seed(seed)
    x, X = torch.randn(P, N, generator=draw), torch.randn(2 * P, P, generator=draw)
    scale = torch.rand(G, N, generator=draw) * 4 / 2**bits + 0.02
    scale[0, 0], scale[-1, 1] = 0, -scale[-1, 1]
    zero = torch.randint(0, 1 if values else 2**bits, (G, N), generator=draw).float()
    group = torch.arange(P) * G // P
    return x, X.T @ X / (2 * P), group, scale, zero, 0.1 * torch.randn(G, N, generator=draw), *table(values)


def round_alike(P, N, G, bits, low, values):
    """Say of errors and codes whether the op gives those of the reference."""
    w, H, group, *grid = problem(P, N, G, bits, values=values)
    t, f = w + 0.1 * torch.randn(P, N, generator=torch.Generator().manual_seed(1)), H.T / H.diagonal()
    kept, error, code = t.clone(), torch.full_like(w, torch.nan), torch.zeros(P, N, dtype=torch.uint8)
    panel.round_panel(w, t, f, group, *grid, float(low), 2.0**bits - 1, error, code)
    wanted = panel.round_reference(w, t, f, group, (*grid, float(low), 2.0**bits - 1))
    return torch.equal(error, wanted[0]), torch.equal(code, wanted[1]) and torch.equal(t, kept)


def walk_alike(P, N, G, bits, low, values):
    """Say of steps, codes, gradient and loss whether the op gives those of the reference."""
    g, H, group, scale, zero, _, *levels = problem(P, N, G, bits, values=values)
    old = torch.randint(low, values or 2**bits, (P, N), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    loss, step, new = torch.ones(N), torch.full_like(g, torch.nan), torch.zeros_like(old)
    theirs = g.clone(), loss.clone()
    panel.walk_panel(H.T, g, loss, old, group, scale, zero, *levels, float(low), 2.0**bits - 1, step, new)
    wanted = panel.walk_reference(H.T, *theirs, old, group, (scale, zero, *levels, float(low), 2.0**bits - 1))
    moved = bool((new != old).any()) and not torch.equal(loss, torch.ones(N))
    pairs = zip((step, new, g, loss), (*wanted, *theirs), strict=True)
    return (moved, *(torch.equal(a, b) for a, b in pairs))


def cases():
    """Yield the name of every check, and whether it holds."""
    for name, shape in SHAPES.items():
        yield f"round: {name}", all(round_alike(*shape))
        yield f"walk: {name}", all(walk_alike(*shape))
