"""What llmq makes of each model_type: a table in Markdown, of what ran here on tiny random models of all families.

    python scripts/model_types.py [MODEL_TYPE ...] [--doc docs/models.md]

Each cell is a whole run on a model of scripts/_families.py, whose sliding windows are shorter than the calibration's
sequences: quantize, write, verify; `load` reopens the best of them and lets it write a few tokens. `yes` is what ran,
with how many linears were scaled of how many, where a transform does so; a number leads to the line, one for many
models, with which llmq refused. With `--doc` the table takes its place there.
Not here: whether what ran is right (tests/test_families.py compares logits, names and bytes).
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _docs import written
from _families import FAMILIES, SEQ_LEN, Family
from _tiny import make_prose
from rich.console import Console
from rich.progress import track

import llmq
from llmq.model.pretrained import foreign, shut

RUNS: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "group_size": 32, "format": "compressed-tensors"},
    "balanced": {"group_size": 32, "format": "compressed-tensors"},
    "AWQ": {"method": "awq,gptq", "group_size": 32, "format": "compressed-tensors"},
    "W8A8": {"bits": 8, "act_bits": 8},
    "GGUF": {"type": "Q8_0", "method": "rtn"},
}
SCALING = ("AWQ", "W8A8")


def outcomes(family: Family, folder: Path, calib: Path) -> dict[str, str]:
    """Return what became of each run on a family, by its column: `yes`, or why not."""
    src = folder / "float"
    with shut():
        family.save(src)
    found: dict[str, str] = {}
    for column, options in RUNS.items():
        out = folder / (f"{column}.gguf" if column == "GGUF" else column)
        rest = {} if options.get("method") == "rtn" else {"calib": calib, "samples": 16, "seq_len": SEQ_LEN}
        try:
            with foreign("a fault of llmq"):
                record = llmq.quantize(src, out, warn=lambda _: None, **options, **rest)
            found[column] = "yes" if column not in SCALING else f"yes, {_scaled(record)}"
        except llmq.LlmqError as e:
            found[column] = str(e).replace(f"{src}/", "").replace(str(src), "SRC")
    ran = next((c for c in ("balanced", "rtn") if found[c] == "yes"), None)
    return found | {"load": _loads(folder / ran) if ran else "nothing was written"}


def _scaled(record: Mapping[str, Any]) -> str:
    """Return how many of the quantized linears a transform has scaled: `14 of 14`."""
    scaled = {name for step in record["transforms"] for name in step.get("linears", ())}
    return f"{len(scaled)} of {len(record['linears'])}"


def _loads(out: Path) -> str:
    """Return `yes` where a written checkpoint loads and writes some tokens, else why not."""
    ids = torch.arange(2, 2 + SEQ_LEN)[None]
    try:
        model: Any = llmq.load(out)
        with foreign("a fault of llmq"):
            done = model.generate(input_ids=ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    except llmq.LlmqError as e:
        return str(e)
    return "yes" if done.shape[1] == SEQ_LEN + 4 else "it writes nothing"


def table(found: Mapping[str, Mapping[str, str]]) -> str:
    """Return the outcomes, by model_type and column, as a Markdown table with its notes."""
    notes: dict[str, int] = {}
    columns = list(next(iter(found.values())))
    rows = [f"| model_type | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for name, cells in found.items():
        said = [
            c if c.startswith("yes") else str(notes.setdefault(_general(c), len(notes) + 1)) for c in cells.values()
        ]
        rows.append(f"| {name} | {' | '.join(said)} |")
    return "\n".join([*rows, "", *(f"{n}. {why}" for why, n in notes.items())]) + "\n"


def _general(why: str) -> str:
    """Return a refusal without what differs from model to model: names of classes and types, shapes, block numbers."""
    why = re.sub(r"model_type '[^']+'", "model_type T", why.partition("\n")[0])
    return re.sub(r"\b[A-Z]\w+(Layer|Block|Experts|Router|Config|Model|ForCausalLM)\b", r"...\1", why)


def main(names: Sequence[str], doc: Path | None) -> None:
    """Run all families, or those named, and print the table."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {}
    with tempfile.TemporaryDirectory() as room:
        calib = Path(room, "calib.txt")
        calib.write_text(make_prose(1500))
        for name in track(names or list(FAMILIES), "running", console=Console(stderr=True)):
            found[name] = outcomes(FAMILIES[name], Path(room, name), calib)
    printed = table(found)
    print(printed, end="")
    if doc is not None:
        doc.write_text(written(doc, "model_types.py", printed))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*FAMILIES, []], metavar="MODEL_TYPE")
    parser.add_argument("--doc", type=Path, help="the document whose table is replaced")
    args = parser.parse_args()
    main(args.names, args.doc)
