"""What a user reads afterwards: sizes, the summary table and the model card written beside the weights."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from llmq.types import Format, LinearSpec


def size(linears: Iterable[LinearSpec], fmt: Format, total: int, source: int) -> dict[str, Any]:
    """Return the bytes of the file before and after, and the bits per quantized weight, scales and zeros counted."""
    weights = packed = 0
    for s in linears:
        weights += s.N * s.K
        packed += packed_bytes(fmt, s)
    return {
        "float_bytes": source,
        "bytes": total,
        "quantized_weights": weights,
        "bits_per_weight": round(8 * packed / weights, 4) if weights else None,
    }


def packed_bytes(fmt: Format, linear: LinearSpec) -> int:
    """Return the bytes of a linear's tensors on disk, its bias apart."""
    return sum(prod(t.shape) * t.element_size() for t in fmt.layout(linear).values())


def error(summary: dict[str, Any]) -> tuple[str, float, str, float]:
    """Return the kind of error recorded, its mean over the linears, and the worst linear with its error."""
    lines = summary["linears"]
    kind = "output_error" if any("output_error" in v for v in lines.values()) else "weight_error"
    values = {k: v[kind] for k, v in lines.items() if kind in v}
    worst = max(values, key=lambda k: values[k])
    return kind, sum(values.values()) / len(values), worst, values[worst]


def model_card(name: str, summary: dict[str, Any], config: dict[str, Any]) -> str:
    """Return README.md of the quantized checkpoint."""
    recipe, sizes = summary["recipe"], summary["size"]
    kind, mean, worst, worst_error = error(summary)
    steps = "\n".join(f"{k}: {v}" for k, v in recipe.items() if v not in (None, [], ()))
    act = f", {recipe['act_bits']}-bit activations" if recipe["act_bits"] else ""
    return f"""---
base_model: {config.get("_name_or_path") or name}
library_name: transformers
tags: [{config["quantization_config"]["quant_method"]}, {recipe["bits"]}-bit, llmq]
---
# {name}, {recipe["bits"]}-bit weights{act}

Quantized with llmq {summary["llmq"]}; per-linear figures are in `quantization.json`, the recipe in `recipe.yaml`
(`llmq quantize SRC OUT --recipe recipe.yaml` repeats it).

| | float | quantized |
|---|---|---|
| bytes | {sizes["float_bytes"]:,} | {sizes["bytes"]:,} |
| bits per quantized weight, scales and zeros counted | | {sizes["bits_per_weight"]} |
| mean {kind.replace("_", " ")}, squared and relative | | {mean:.3e} |
| worst linear | | {worst_error:.3e} (`{worst}`) |

```python
import llmq
model = llmq.load("PATH")                       # an ordinary transformers model
```

```yaml
{steps}
```
"""
