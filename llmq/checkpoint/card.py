"""The model card, README.md of what llmq writes: what the Hub files it under, and what a reader wants to know first.

    model_card(record, ...)     of `llmq quantize`
    export_card(record, ...)    of a folder that `llmq export` made
    float_card(record, ...)     of one that `llmq dequantize` made
    gguf_card(record, ...)      of a GGUF file, which has no place for one: `llmq push` makes it
    with_figures(card, [...])   a card with what `llmq eval --keep` measured

Names and values stay text, whatever characters they have, and no path of the machine that made a checkpoint is in it.
Not here: the front matter (hub_metadata.py), the errors of single linears, which quantization.json has.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from llmq.checkpoint.hub import is_repository
from llmq.checkpoint.hub_metadata import SourceCard, base_model, library, metadata, task_of
from llmq.errors import printable
from llmq.guard.reading import number
from llmq.readers import RUNTIMES, Reader

_FIGURES = ("<!-- llmq eval --keep: begin -->", "<!-- llmq eval --keep: end -->")
_WEIGHT = re.compile(r"(:weight=[^:/\\]*)?\Z")  # of one calibration text among several
_MODEL = "MODEL"  # what a command calls the checkpoint, which has no name yet
_COLUMNS = (
    ("perplexity", "perplexity", ".3f"),
    ("of the float model", "baseline_perplexity", ".3f"),
    ("KL, mean", "kl_mean", ".4f"),
    ("KL, 99 %", "kl_p99", ".3f"),
    ("KL, 99.9 %", "kl_p999", ".3f"),
    ("same first choice", "top1", ".2%"),
)


def errors(summary: dict[str, Any]) -> Iterator[tuple[str, float, str, float]]:
    """Yield the kinds of error recorded, each with its mean over the linears and the worst of them with its error."""
    for kind in ("weight error", "output error"):
        key = kind.replace(" ", "_")
        values = {name: line[key] for name, line in summary["linears"].items() if key in line}
        if values:
            worst = max(values, key=lambda name: values[name])
            yield kind, sum(values.values()) / len(values), worst, values[worst]


def model_card(
    summary: dict[str, Any],
    method: str,
    config: Mapping[str, Any],
    card: SourceCard,
    readers: Sequence[Reader],
    name: str = _MODEL,
) -> str:
    """Return README.md of a quantized checkpoint.

    summary: the record of the run. method: the `quant_method`. config: the float model's config.json, by which it may
    know what it is called. card: what the source's own says. readers: which runtimes take it. name: of the checkpoint
    in commands.
    """
    recipe, source, size = summary["recipe"], summary["source"], summary["size"]
    bits = recipe["bits"] or Counter(line["bits"] for line in summary["linears"].values()).most_common(1)[0][0]
    inputs = "8-bit" if recipe["act_bits"] else (recipe.get("inputs") or "").partition(":")[0]
    act = f", {inputs} activations" if inputs else ""
    base = base_model(source["name"], config.get("_name_or_path"))
    about = metadata(base, "quantized", library(readers), task_of(config), [method, f"{bits}-bit", "llmq"], card)
    return f"""---
{_yaml(about)}---
# {_text(source["name"])}, {bits}-bit weights{act}

{_made(summary)}{_calibrated(summary)}; per-linear figures are in `quantization.json`.

| | float | quantized |
|---|---|---|
| bytes | {size["float_bytes"]:,} | {size["bytes"]:,} |
| bits per quantized weight, scales and zeros counted | | {size["bits_per_weight"]} |
{_error_rows(summary)}

{with_figures("", ())}
{_use(readers, name)}
{_repeat(recipe, source)}"""


def export_card(
    record: Mapping[str, Any],
    method: str,
    config: Mapping[str, Any],
    card: SourceCard,
    readers: Sequence[Reader],
    file: str = "quantization.json",
) -> str:
    """Return README.md of a checkpoint that was exported from a packed one; parameters as of `model_card`.

    record: `export` (llmq, from, to, outcomes), `source` and `size`. file: which holds the record.
    The base is what the packed one says that it was made from, or that one itself.
    """
    export, source, size = record["export"], record["source"], record["size"]
    base, card = card.base or base_model(source["name"], config.get("_name_or_path")), card.unlike(export["from"])
    about = metadata(base, "quantized", library(readers), task_of(config), [method, "llmq"], card)
    became = ", ".join(f"{n} linears: {_text(outcome)}" for outcome, n in export["outcomes"].items())
    return f"""---
{_yaml(about)}---
# {_text(source["name"])} as {_text(export["to"])}

Exported with llmq {export["llmq"]} from {_text(export["from"])} of {_origin(source)}, its codes kept where nothing else
is said ({became}); what became of each is in `{file}`.

| bytes | bits per quantized weight, scales and zeros counted |
|---|---|
| {size["bytes"]:,} | {size.get("bits_per_weight") or ""} |

{with_figures("", ())}
{_use(readers, _MODEL)}"""


def float_card(record: Mapping[str, Any], config: Mapping[str, Any], card: SourceCard) -> str:
    """Return README.md of a float checkpoint that was decoded from a packed one.

    The Hub has no relation of that kind, so that none is said: the base is the packed one.
    """
    source, decoded = record["source"], record["decoded"]
    base, card = base_model(source["name"], card.base), card.unlike(str(decoded["quant_method"]))
    about = metadata(base, None, "transformers", task_of(config), ["llmq"], card)
    held = ", ".join(f"{n} {_text(kind)}" for kind, n in decoded["weights"].items())
    return f"""---
{_yaml(about)}---
# {_text(source["name"])}, decoded to {_text(str(decoded["dtype"]))}

Decoded with llmq {record["llmq"]} from {_origin(source)} ({held}); `dequantization.json` has checksums of all tensors.

```python
{RUNTIMES["transformers"].command.replace("OUT", _MODEL)}
```
"""


def gguf_card(
    record: Mapping[str, Any], name: str, types: str, base: str | None, card: SourceCard, readers: Sequence[Reader]
) -> str:
    """Return README.md of a GGUF file. record: what it says of its making. name: of the file. types: of its tensors.

    base: the repository that it says it was made from; the rest are those of `model_card`.
    """
    recipe, source = record.get("recipe"), record["source"]
    about = metadata(
        base or base_model(source["name"]), "quantized", library(readers), task_of({}), ["gguf", "llmq"], card
    )
    how = _made(record) if recipe else f"Exported with llmq {record['llmq']} from {_origin(source)}, its codes kept"
    size = record.get("size", {}).get("bits_per_weight")
    bits = f" ({size} bits per quantized weight, scales counted)" if size else ""
    return f"""---
{_yaml(about)}---
# {_text(source["name"])} as GGUF

{how}{_calibrated(record)}: {_text(types)}{bits}. What became of each linear is in its key `llmq.report`.

{with_figures("", ())}
{_use(readers, name)}
{_repeat(recipe, source, "OUT.gguf") if recipe else ""}"""


def with_figures(card: str, evaluations: Iterable[Mapping[str, Any]]) -> str:
    """Return a card with the figures that were kept of it, in the place that it has for them, else at its end.

    evaluations: `text`, `convention`, `baseline`, `perplexity`, `baseline_perplexity`, `kl_mean`, `kl_standard_error`,
    `kl_p99`, `kl_p999` and `top1` of each, None or missing where it was not measured; none empties the place. KL in
    nats, of the next token from the float model's; a text is called by its file's name. Without a text it is no row.
    """
    section = "\n".join([_FIGURES[0], *_figures([e for e in evaluations if e.get("text")]), _FIGURES[1]])
    before, begin, rest = card.partition(_FIGURES[0])
    _, end, after = rest.partition(_FIGURES[1])
    if begin and end:
        return before + section + after
    return f"{card.rstrip()}\n\n{section}\n" if card else f"{section}\n"


def _figures(evaluations: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not evaluations:
        return
    columns = [c for c in _COLUMNS if any(number(e.get(c[1])) is not None for e in evaluations)]
    yield "## Measured\n"
    yield "| " + " | ".join(["text", *(title for title, _, _ in columns)]) + " |"
    yield "|---" * (1 + len(columns)) + "|"
    for e in evaluations:
        yield "| " + " | ".join([_scored(e), *(_cell(e, key, form) for _, key, form in columns)]) + " |"
    against = dict.fromkeys(_text(_local(str(e["baseline"]))) for e in evaluations if e.get("baseline"))
    if against:
        yield f"\nKL divergence in nats, and the same first choice, against {', '.join(against)}."


def _scored(evaluation: Mapping[str, Any]) -> str:
    """Return what text was scored, and by which convention."""
    convention = evaluation.get("convention")
    said = f", convention {_text(str(convention))}" if convention else ""
    return _text(_local(str(evaluation.get("text") or "?"))) + said


def _cell(evaluation: Mapping[str, Any], key: str, form: str) -> str:
    found = number(evaluation.get(key))
    spread = number(evaluation.get("kl_standard_error")) if key == "kl_mean" else None
    return "" if found is None else f"{found:{form}}" + (f" ± {spread:{form}}" if spread is not None else "")


def _use(readers: Sequence[Reader], name: str) -> str:
    """Return how each runtime that takes the checkpoint runs it, and what it then says of it."""
    stands = f"`{name}` is this repository's name, or the folder that it was downloaded to.\n\n" * (name == _MODEL)
    rows = [f"| {r.runtime} {r.version} | `{r.command(name)}` | {_text(r.reason)} |" for r in readers if r.accepts]
    ours = f"| llmq | `llmq chat {name}` | `llmq serve` answers OpenAI's protocol |"
    return "\n".join([f"## Run it\n\n{stands}| runtime | command | |", "|---|---|---|", *rows, ours, ""])


def _repeat(recipe: Mapping[str, Any], source: Mapping[str, Any], out: str = "OUT") -> str:
    """Return the command and the recipe that made a checkpoint; of a file that it names, the name alone."""
    said = {k: _private(v) for k, v in recipe.items() if v not in (None, [], ())}
    own = [_argument_of(k, recipe[k]) for k in said if said[k] != recipe[k]]
    steps = _yaml(said)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", steps)), default=0))
    return f"""## Repeat it

```bash
{_command(source, own, out)}
```

{fence}yaml
{steps}{fence}
"""


def _private(value: Any) -> Any:
    """Return a value of a recipe; of a file or folder of this machine its name, without where it lies."""
    if isinstance(value, list):
        return [_private(v) for v in value]
    if not isinstance(value, str) or not re.search(r"[/\\]", value):
        return value
    try:
        path = Path(_WEIGHT.sub("", value))
        there = path.is_absolute() or value.startswith(("~", ".")) or path.exists() or Path(value).exists()
    except (OSError, ValueError):  # a name too long, or no name
        there = False
    return _last(value) if there else value


def _local(text: str) -> str:
    """Return a text that may be a path of this machine without where that lies; `org/name` as it is."""
    return text if is_repository(text) else _last(text)


def _last(path: str) -> str:
    """Return the last part of a path, whatever system it is of."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1] or path


def _made(summary: Mapping[str, Any]) -> str:
    """Return what the checkpoint was made with, and from what."""
    held = ", ".join(_text(kind) for kind in summary.get("decoded", {}).get("weights", {}))
    was = f", whose weights were quantized already ({held}) and decoded" if held else ""
    return f"Quantized with llmq {summary['llmq']} from {_origin(summary['source'])}{was}"


def _calibrated(summary: Mapping[str, Any]) -> str:
    """Return what several calibration texts gave, each by its name; nothing of one, which the recipe names."""
    parts = [f"{p['share']:.0%} {_text(_private(p['source']))}" for p in summary.get("calibration", ())]
    return f", calibrated on samples of {', '.join(parts)}" if parts else ""


def _error_rows(summary: dict[str, Any]) -> str:
    """Return the errors of the linears as rows of the table."""
    return "\n".join(
        f"| mean {kind}, squared and relative (worst) | | {mean:.3e} ({most:.3e} {_text(worst)}) |"
        for kind, mean, worst, most in errors(summary)
    )


def _origin(source: Mapping[str, Any]) -> str:
    """Return a source, its commit and its adapter in words."""
    commit = f" at commit {_text(source['commit'])}" if source["commit"] else ""
    adapter = f" with the adapter {_origin(source['adapter'])}" if source.get("adapter") else ""
    return f"{_text(source['name'])}{commit}{adapter}"


def _argument_of(key: str, value: Any) -> str:
    """Return an option that names files of the machine, each left to be filled in: `--calib CALIB`.

    Of several calibration texts, all are said, with their weights, since those of a command replace the recipe's.
    """
    several = isinstance(value, list)
    words = []
    for i, word in enumerate(value if several else [value], start=1):
        blank = key.upper() + (f"_{i}{_WEIGHT.findall(word)[0]}" if several else "")
        words.append(f"--{key.replace('_', '-')} {shlex.quote(word) if _private(word) == word else blank}")
    return " ".join(words)


def _command(source: Mapping[str, Any], own: Iterable[str] = (), out: str = "OUT") -> str:
    """Return what repeats a run; a folder, which another reader does not have, is left to be filled in.

    own: more arguments.
    """
    adapter = f" --adapter {_argument(source['adapter'], 'ADAPTER')}" if source["adapter"] else ""
    return " ".join([f"llmq quantize {_argument(source, 'SRC')} {out} --recipe recipe.yaml{adapter}", *own])


def _argument(source: Mapping[str, Any], otherwise: str) -> str:
    name = f"{source['name']}@{source['commit']}"
    return name if is_repository(source["name"]) and re.fullmatch(r"\w+", source["commit"] or "") else otherwise


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=2**31)


def _text(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|&~])", r"\\\1", printable(text))
