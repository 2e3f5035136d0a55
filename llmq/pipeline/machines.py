"""Machines that are not there: what data sheets say of them, and rates that follow. Arithmetic, no measurement.

    rates = on_paper(machine("h100"), plan)

Matrix units reach four tenths of the peak on the sheet, float32 units six tenths, memory seven; column loops, whose
panels wait for one another, four tenths of what float32 products reach. Disk, checksums and the like are one core's.
Sources: NVIDIA's data sheets of the A100 80GB SXM, H100 SXM, H200 SXM, L40S, B200 (an eighth of HGX B200) and GeForce
RTX 4090, AMD's of the Instinct MI300X; dense figures, without sparsity.
Not here: what this machine does (rates.py).
"""

from typing import NamedTuple

import torch

from llmq.calibration.writing import WRITE_BATCH
from llmq.pipeline.plan import Plan
from llmq.pipeline.rates import MEASURED_ONCE, Rates
from llmq.types import LlmqError


class Machine(NamedTuple):
    """A GPU by its data sheet.

    memory: GB. bf16, f32: dense TFLOP/s, of matrix units and of float32 units. bandwidth: of memory, GB/s. link: to
    others of one host, GB/s one way; what is beside PCIe alone has PCIe's.
    """

    memory: float
    bf16: float
    f32: float
    bandwidth: float
    link: float


MACHINES = {
    "a100": Machine(80, 312, 19.5, 2039, 300),
    "h100": Machine(80, 989, 67, 3350, 450),
    "h200": Machine(141, 989, 67, 4800, 450),
    "b200": Machine(180, 2250, 75, 7700, 900),
    "l40s": Machine(48, 362, 91.6, 864, 32),
    "rtx4090": Machine(24, 165, 82.6, 1008, 32),
    "mi300x": Machine(192, 1307, 163.4, 5300, 448),
}
NETWORK = 50.0
"""GB/s one way between hosts for each GPU: 400 Gb/s, as such hosts are sold with."""
HOST = 8
"""GPUs of a host."""
_REACHED = {"bf16": 0.4, "f32": 0.6, "bandwidth": 0.7, "columns": 0.4}
_HOST_RATES = {
    "read": 2e9, "write": 1e9, "digest": 1.9e9, "packing": 8e8, "decoding": 5e8, **MEASURED_ONCE
}  # fmt: skip


def machine(name: str) -> Machine:
    """Return the machine of that name. Raises LlmqError, with all names, for another."""
    if name.lower() not in MACHINES:
        raise LlmqError(f"--device-like {name!r}: no such machine is known (there are: {', '.join(MACHINES)})")
    return MACHINES[name.lower()]


def on_paper(like: Machine, plan: Plan) -> Rates:
    """Return rates by arithmetic."""
    f32 = like.f32 * 1e12 * _REACHED["f32"]
    matrix = like.bf16 * 1e12 * _REACHED["bf16"] if plan.skeleton.dtype == torch.bfloat16 else f32
    values = like.bandwidth * 1e9 * _REACHED["bandwidth"] / 8  # float32, read and written
    tried = 1 + max((getattr(r, "steps", 0) * 2 for r in _ranges(plan)), default=0)  # intervals of a search
    rows = plan.writes() or WRITE_BATCH  # for each of which the weights pass once
    computed = {
        "forward": matrix,
        "writing": min(matrix, 16 * values * rows / plan.skeleton.dtype.itemsize),
        "statistics": matrix,
        "products": f32,
        "factor": f32 / 4,
        "columns": f32 * _REACHED["columns"],
        "looks": f32 * _REACHED["columns"] / _columns(plan),  # a sweep is products over all columns there
        "passes": values,
        "fits": values / (6 * tried),
    }
    return Rates(computed | _HOST_RATES)


def _columns(plan: Plan) -> float:
    """Return the columns of a linear, in the mean over weights."""
    specs = plan.matrices.values()
    return sum(s.N * s.K**2 for s in specs) / max(1, sum(s.N * s.K for s in specs)) or 1


def _ranges(plan: Plan) -> list[object]:
    grids = {s.scheme.weight for s in plan.matrices.values()}
    return [r for g in grids if (r := getattr(g, "range", None)) is not None]
