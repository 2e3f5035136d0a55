"""What a machine with no GPU can know about a compiled kernel, read from its machine code.

    registers, stack, spills        an occupancy bound, and whether anything went to local memory
    shared                          against what one program may take on the target
    mma                             which tensor-core instructions are there
    ipw                             thread-instructions of the main loop per weight: against what the target can issue
                                    while memory delivers one weight (design: SMs * 128 * clock / weights per second)
    i2f, async128, async_narrow     of the main loop: int-to-float conversions, cp.async of 128 bits and of fewer
    fused                           multiply-adds of one rounding in the PTX (a division is none there)

The main loop is the innermost loop that multiplies on tensor cores. What this cannot say: time, achieved bandwidth.
NVIDIA code is read with the cuobjdump and nvdisasm of Triton's wheel, AMD code from its assembly text.

Not here: which facts a kernel must have (cases.py).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

from llmq_kernels.aot import Compiled

_BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Shared memory that one program may take: CUDA C++ Programming Guide, technical specifications; LDS of CDNA3.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
_MMA = ("HMMA", "HGMMA", "IMMA", "IGMMA", "QMMA", "QGMMA")


@dataclass(frozen=True)
class Facts:
    """The facts of one kernel on one target. ipw, i2f and the copies are those of the main loop."""

    target: str
    registers: int
    stack: int
    spills: int
    shared: int
    mma: tuple[str, ...]
    loop: int
    ipw: float
    i2f: int
    async128: int
    async_narrow: int
    fused: int = 0


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: its opcode with modifiers, its operands."""

    op: str
    operands: str

    @property
    def root(self) -> str:
        """The opcode without modifiers."""
        return self.op.split(".")[0]


def measure(compiled: Compiled, weights: int) -> Facts:
    """Return the facts of a kernel whose main loop consumes `weights` weights per program and trip (0: not counted)."""
    if compiled.target.startswith("gfx"):
        return _amd(compiled)
    usage, code, labels = _disassemble(compiled)
    body = main_loop(code, labels)
    ops = Counter(i.op for i in body)
    copies = [i for i in body if i.root == "LDGSTS"]
    wide = sum(".128" in i.op for i in copies)
    return Facts(
        compiled.target,
        usage["REG"],
        usage["STACK"],
        sum(i.root in ("STL", "LDL") for i in code),
        compiled.shared,
        tuple(sorted({i.root for i in code} & set(_MMA))),
        len(body),
        round(len(body) * compiled.num_warps * 32 / weights, 2) if weights else 0.0,
        sum(n for op, n in ops.items() if op.startswith("I2F")),
        wide,
        len(copies) - wide,
        compiled.ptx.count("fma.rn"),
    )


def main_loop(code: list[Instruction], labels: dict[str, int]) -> list[Instruction]:
    """Return the innermost loop with tensor-core instructions; of several, the longest; all code where none loops."""
    loops = []
    for i, instruction in enumerate(code):
        target = re.search(r"\.L_x_\d+", instruction.operands) if instruction.root == "BRA" else None
        begin = labels.get(target.group(), i) if target else i
        if begin < i:
            loops.append((begin, i))
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    bodies = [code[a : b + 1] for a, b in inner]
    with_mma = [b for b in bodies if any(i.root in _MMA for i in b)]
    return max(with_mma or bodies or [code], key=len)


def _disassemble(compiled: Compiled) -> tuple[dict[str, int], list[Instruction], dict[str, int]]:
    """Return resource usage, instructions, and the index of the instruction behind every label."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.binary)
        file.flush()
        usage = {k: int(v) for k, v in re.findall(r"(REG|STACK):(\d+)", _tool("cuobjdump", "-res-usage", file.name))}
        text = _tool("nvdisasm", "-c", file.name)
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label.group(1)] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*?);", line):
            code.append(Instruction(found.group(1), found.group(2)))
    return usage, code, labels


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([_BIN / name, *arguments], check=True, capture_output=True, text=True).stdout


def _amd(compiled: Compiled) -> Facts:
    """Return what the AMD assembly says: its loops are not counted, so ipw and copies are 0."""
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        return int(re.search(rf"{key}:?\s+(\d+)", text).group(1))  # type: ignore[union-attr]

    mma = tuple(sorted(set(re.findall(r"v_(mfma_\w+?)_", text))))
    # What spills on CDNA goes to accumulation registers first; memory is the scratch (private segment) alone.
    scratch = number(r"\.private_segment_fixed_size")
    registers = number(r"\.vgpr_count")
    return Facts(compiled.target, registers, scratch, 0, compiled.shared, mma, 0, 0.0, 0, 0, 0)
