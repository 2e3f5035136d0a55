"""What a user reads afterwards: the errors in a line, and the model card written beside the weights."""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import yaml

from llmq.checkpoint.hub import is_repository
from llmq.errors import printable


def errors(summary: dict[str, Any]) -> Iterator[tuple[str, float, str, float]]:
    """Yield the kinds of error recorded, each with its mean over the linears and the worst of them with its error."""
    for kind in ("weight error", "output error"):
        key = kind.replace(" ", "_")
        values = {name: line[key] for name, line in summary["linears"].items() if key in line}
        if values:
            worst = max(values, key=lambda name: values[name])
            yield kind, sum(values.values()) / len(values), worst, values[worst]


def model_card(summary: dict[str, Any], method: str, said: object) -> str:
    """Return README.md of the quantized checkpoint. Names and values stay text, whatever characters they have.

    method: the `quant_method`. said: what the float model's config says it is called.
    """
    recipe, sizes, source = summary["recipe"], summary["size"], summary["source"]
    bits = recipe["bits"] or Counter(line["bits"] for line in summary["linears"].values()).most_common(1)[0][0]
    about = {
        "base_model": _base_model(source["name"], said),
        "library_name": "transformers",
        "tags": [method, f"{bits}-bit", "llmq"],
    }
    steps = _yaml({k: v for k, v in recipe.items() if v not in (None, [], ())})
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", steps)), default=0))
    inputs = "8-bit" if recipe["act_bits"] else (recipe.get("inputs") or "").partition(":")[0]
    act = f", {inputs} activations" if inputs else ""
    return f"""---
{_yaml(about)}---
# {_text(source["name"])}, {bits}-bit weights{act}

{_made(summary)}; per-linear figures are in `quantization.json`. The recipe
in `recipe.yaml` repeats it:

```bash
{_command(source)}
```

| | float | quantized |
|---|---|---|
| bytes | {sizes["float_bytes"]:,} | {sizes["bytes"]:,} |
| bits per quantized weight, scales and zeros counted | | {sizes["bits_per_weight"]} |
{_error_rows(summary)}

```python
import llmq
model = llmq.load("PATH")                       # an ordinary transformers model
```

{fence}yaml
{steps}{fence}
"""


def export_card(record: dict[str, Any], method: str) -> str:
    """Return README.md of a checkpoint that was exported from a packed one. method: the `quant_method`."""
    export, source = record["export"], record["source"]
    about = {"base_model": source["name"], "library_name": "transformers", "tags": [method, "llmq"]}
    became = ", ".join(f"{n} linears: {_text(outcome)}" for outcome, n in export["outcomes"].items())
    return f"""---
{_yaml(about)}---
# {_text(source["name"])} as {_text(export["to"])}

Exported with llmq {export["llmq"]} from {_text(export["from"])} of {_origin(source)}, its codes kept where nothing else
is said ({became}); per-linear figures are in `quantization.json`.

| bytes | bits per quantized weight, scales and zeros counted |
|---|---|
| {record["size"]["bytes"]:,} | {record["size"]["bits_per_weight"]} |

```python
import llmq
model = llmq.load("PATH")                       # an ordinary transformers model
```
"""


def _made(summary: dict[str, Any]) -> str:
    """Return what the checkpoint was made with, and from what."""
    held = ", ".join(_text(kind) for kind in summary.get("decoded", {}).get("weights", {}))
    was = f", whose weights were quantized already ({held}) and decoded" if held else ""
    return f"Quantized with llmq {summary['llmq']} from {_origin(summary['source'])}{was}"


def _error_rows(summary: dict[str, Any]) -> str:
    """Return the errors of the linears as rows of the table."""
    return "\n".join(
        f"| mean {kind}, squared and relative (worst) | | {mean:.3e} ({most:.3e} {_text(worst)}) |"
        for kind, mean, worst, most in errors(summary)
    )


def _base_model(name: str, said: object) -> str:
    """Return what the Hub should link to: a repository, where the source or its config names one."""
    return said if isinstance(said, str) and is_repository(said) and not is_repository(name) else name


def _origin(source: dict[str, Any]) -> str:
    """Return a source, its commit and its adapter in words."""
    commit = f" at commit {_text(source['commit'])}" if source["commit"] else ""
    adapter = f" with the adapter {_origin(source['adapter'])}" if source.get("adapter") else ""
    return f"{_text(source['name'])}{commit}{adapter}"


def _command(source: dict[str, Any]) -> str:
    """Return what repeats a run; a folder, which another reader does not have, is left to be filled in."""
    adapter = f" --adapter {_argument(source['adapter'], 'ADAPTER')}" if source["adapter"] else ""
    return f"llmq quantize {_argument(source, 'SRC')} OUT --recipe recipe.yaml{adapter}"


def _argument(source: dict[str, Any], otherwise: str) -> str:
    name = f"{source['name']}@{source['commit']}"
    return name if is_repository(source["name"]) and re.fullmatch(r"\w+", source["commit"] or "") else otherwise


def _yaml(values: dict[str, Any]) -> str:
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=2**31)


def _text(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|&~])", r"\\\1", printable(text))
