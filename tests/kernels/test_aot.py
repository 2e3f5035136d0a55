"""Rung 2: every kernel compiled for GPUs that are not here, and the facts that its machine code must show."""

from dataclasses import replace

import pytest

from llmq_kernels.aot import compile_for
from llmq_kernels.cases import CASES, violations
from llmq_kernels.facts import Facts, measure

# sm_89 runs sm_80's code with less shared memory: compiled where that could matter, all of it by scripts/kernel_facts.
ONLY_SOME = {
    "sm_89": ("g128 decode", "prefill", "W3A16", "attention int8"),
    "gfx942": ("W4A16 asym g128", "FP4 decode", "W8A8", "KV", "panel"),
}


def compiled():
    for case in CASES:
        for target in case.targets:
            if target not in ONLY_SOME or any(t in case.name for t in ONLY_SOME[target]):
                yield pytest.param(case, target, id=f"{case.name}-{target}")


@pytest.mark.parametrize(("case", "target"), compiled())
def test_the_machine_code_keeps_what_the_case_promises(case, target):
    facts = measure(compile_for(case.build_for(target), target), case.weights)
    assert not violations(case, facts), facts


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
