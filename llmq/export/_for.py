"""What `--for RUNTIME` asks of a solve where the runtime reads none of the formats but what is exported from one.

    --for executorch     range mse:shift=false (no negative scales), compressed-tensors with scales in bfloat16; then
                         llmq export OUT OUT-executorch --to executorch

What the user says himself stays; where the target cannot hold that, it refuses the plan by name, with the remedy.
Not here: which runtime reads which file (readers.py), the targets, several outputs of one run (_several.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmq.export._several import fitted, foresee
from llmq.pipeline.plan import Plan
from llmq.readers import RUNTIMES, require, row, runtime


@dataclass(frozen=True)
class Way:
    """How a runtime gets what was solved. to: the target. falls: whether it holds negative scales, as far as is known.

    scales: the dtype of those that it holds; None takes any.
    """

    to: str
    falls: bool = True
    scales: str | None = None


WAYS = {
    "onnxruntime-genai": Way("onnx"),
    "OpenVINO": Way("onnx:qdq"),
    "TensorRT": Way("onnx:qdq", falls=False),
    "ExecuTorch": Way("executorch", falls=False, scales="bfloat16"),
}
"""By the names of readers.py."""


def asked(options: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a recipe's options with what a runtime needs of the grid, where they leave that open."""
    way = WAYS.get(runtime(name))
    if way is None or "gguf" in str(options.get("format")):
        return dict(options)
    return fitted(options, falls=way.falls, scales=way.scales)


def required(plan: Plan, name: str, out: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Raise LlmqError where a runtime takes neither the planned file nor what is exported from it; return what is told.

    out: what will be written, as the user calls it. before, after: the options as the user gave them, and by `asked`.
    """
    rows, found = plan.readers(), runtime(name)
    if found not in WAYS or row(rows, name).accepts:
        require(rows, name, out)
        return []
    to = WAYS[found].to
    told = foresee(plan, to)
    changed = ", ".join(f"--{key} {value}" for key, value in after.items() if before.get(key) != value)
    said = f"for {found} {RUNTIMES[found].version} "
    said += f"the grid is fitted with {changed}; " if changed else ""
    return [f"{said}`llmq export {out} {out}-{to.partition(':')[0]} --to {to}` makes what it reads", *told]
