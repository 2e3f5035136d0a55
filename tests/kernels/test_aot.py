"""Rung 2: every kernel compiled for GPUs that are not here, and the facts that its machine code must show."""

import re
from dataclasses import replace

import pytest

from llmq_kernels.aot import compile_for
from llmq_kernels.cases import CASES, violations
from llmq_kernels.facts import Facts, measure

# Every case for sm_90, elsewhere one of each kernel: all cases of all targets by scripts/kernel_facts.py.
ONLY_SOME = {
    "sm_80": (
        "W4A16 asym g128 decode",
        "W4A16 asym g128 prefill",
        "W3A16 asym g128 decode",
        "NVFP4 decode",
        "W4A16 asym g128 experts",
        "experts prefill",
        "W8A8 prefill",
        "attention int4",
        "panel",
    ),
    "sm_89": ("prefill", "attention int8"),  # which runs sm_80's code with less shared memory
    "gfx942": (
        "W4A16 asym g128 decode",
        "W4A16 asym g128 experts",
        "expert plan",
        "W8A8 prefill",
        "NVFP4 decode",
        "attention int8",
        "GPTQ panel",
    ),
}


def compiled():
    for case in CASES:
        for target in case.targets:
            if target not in ONLY_SOME or any(case.name.endswith(t) for t in ONLY_SOME[target]):
                yield pytest.param(case, target, id=f"{case.name}-{target}")


@pytest.mark.parametrize(("case", "target"), compiled())
def test_the_machine_code_keeps_what_the_case_promises(case, target):
    facts = measure(compile_for(case.build_for(target), target), case.weights)
    assert not violations(case, facts), facts


TALL = [c for c in CASES if " x " in c.name]


@pytest.mark.parametrize("case", TALL, ids=[c.name for c in TALL])
def test_warp_groups_multiply_out_of_registers_and_issue_no_longer_than_they_multiply(case):
    """64 x 256: by 64 tokens a weight is multiplied in the time of 4 instructions, at 4,096 multiply-adds a cycle."""
    compiled = compile_for(case.build_for("sm_90"), "sm_90")
    BM = case.build(True).constants["BM"]
    assert measure(compiled, case.weights).ipw <= BM * 2 / 4096 * 128
    operands = re.findall(r"wgmma\.mma_async[^{;]*\{[^}]*\},\s*(\{?)", compiled.ptx)
    assert len(operands) >= 8 and all(first == "{" for first in operands)


def test_a_broken_promise_is_seen():
    case = CASES[0]
    good = Facts("sm_90", 128, 0, 0, 32256, ("HMMA",), 460, 1.8, 0, 8, 5)
    assert not violations(case, good)
    for change in (
        {"spills": 1},
        {"stack": 8},
        {"shared": 233_000},
        {"mma": ()},
        {"ipw": 2.0},
        {"i2f": 1},
        {"async128": 0},
    ):
        assert violations(case, Facts(**(good.__dict__ | change))), change
    fused = Facts(**(good.__dict__ | {"fused": 1}))
    assert violations(replace(case, fused=False), fused) and not violations(case, fused)
