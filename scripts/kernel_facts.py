"""Compile every kernel for GPUs that are not here, print what the machine code shows, fail on a broken promise.

    python scripts/kernel_facts.py [--targets sm_90,gfx942] [--only TEXT]

Columns: registers a thread, bytes of shared memory a program, tensor-core instructions, instructions of the main loop
per weight (or cached value), async copies of 128 bits and narrower ones. What none of it can say: time.
"""

from __future__ import annotations

import argparse
import sys

import triton

from llmq_kernels.aot import TARGETS, compile_for
from llmq_kernels.cases import CASES, violations
from llmq_kernels.facts import measure


def main() -> None:
    """Print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS), help="comma-separated, of " + ", ".join(TARGETS))
    parser.add_argument("--only", default="", help="compile the cases whose name has this text")
    options = parser.parse_args()
    print(f"Triton {triton.__version__}\n")
    print("| kernel | target | registers | shared | tensor cores | instr./weight | limit | async 128 / narrower |")
    print("|---|---|---|---|---|---|---|---|")
    broken = 0
    for case in CASES:
        for target in options.targets.split(","):
            if options.only not in case.name or target not in case.targets:
                continue
            facts = measure(compile_for(case.build_for(target), target), case.weights)
            counted = case.weights and not target.startswith("gfx")
            ipw = f"{facts.ipw:.2f} | {case.ipw[target]:.2f}" if counted else "- | -"
            copies = f"{facts.async128} / {facts.async_narrow}" if counted else "-"
            mma = " ".join(facts.mma) or "-"
            print(f"| {case.name} | {target} | {facts.registers} | {facts.shared} | {mma} | {ipw} | {copies} |")
            for line in violations(case, facts):
                broken += 1
                print(f"{case.name} on {target}: {line}", file=sys.stderr)
            sys.stdout.flush()
    sys.exit(f"{broken} broken promises" if broken else 0)


if __name__ == "__main__":
    main()
