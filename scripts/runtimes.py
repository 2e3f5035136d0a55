"""Which runtime takes which file, as llmq knows it: the rows of `llmq plan` and `llmq verify --runtime` as Markdown.

    python scripts/runtimes.py [--doc docs/runtimes.md]

A cell is what the plan of such a file says: `ran` where files of llmq of this kind were loaded and compared, `source`
where the runtime's source or documentation was read, `no`; a number leads to the reason or to what limits it. With
`--doc` the tables take their place there.
Not here: the rules (llmq/readers.py, llmq/formats/).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _docs import written

from llmq import registry
from llmq.gguf import kinds
from llmq.readable import EXPORTED_AS
from llmq.readers import RUNTIMES, Reader
from llmq.types import LinearSpec, Scheme

DENSE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
EXPERTS = tuple(f"mlp.experts.{e}.{n}_proj" for e in (0, 1) for n in ("gate", "up", "down"))


@dataclass(frozen=True)
class File:
    """A kind of file. form: its format. weights, inputs: grids as `--weights` and `--inputs` have them.

    names: its linears in a block. other: the weights of `mlp.down_proj`, where they differ. head: quantized too.
    table: the weights of the embedding, where it is quantized.
    """

    form: str
    weights: str
    inputs: str | None = None
    names: Sequence[str] = DENSE
    other: str | None = None
    head: bool = False
    table: str | None = None

    def readers(self) -> list[Reader]:
        """Return what each runtime makes of it."""
        form: Any = registry.load("formats", self.form)
        return list(form.readers(self.linears()))

    def linears(self) -> list[LinearSpec]:
        """Return its linears, of one block, perhaps the head and the embedding."""
        names = [f"model.layers.0.{n}" for n in self.names] + ["lm_head"] * self.head
        found = [LinearSpec(n, 256, 256, self._scheme(n)) for n in names]
        if self.table is None:
            return found
        return [*found, LinearSpec("model.embed_tokens", 256, 256, Scheme(registry.load("grids", self.table)), True)]

    def _scheme(self, name: str) -> Scheme:
        weights = self.other if self.other and name.endswith("down_proj") else self.weights
        if self.form == "gguf":
            return Scheme(kinds.grid(weights))
        grid: Callable[[str], Any] = lambda text: registry.load("grids", text)  # noqa: E731
        return Scheme(grid(weights), grid(self.inputs) if self.inputs else None)


@dataclass(frozen=True)
class Export:
    """What `llmq export` makes for runtimes alone. made: as its record has it."""

    made: str

    def readers(self) -> list[Reader]:
        """Return what each runtime makes of it."""
        return list(EXPORTED_AS[self.made])


GPTQ, CT = "gptq", "compressed_tensors"
FILES: dict[str, File | Export] = {
    "`gptq`, 4 bits, symmetric, groups of 128": File(GPTQ, "int:bits=4:group=128"),
    "... per channel": File(GPTQ, "int:bits=4:group=channel"),
    "... groups of 16": File(GPTQ, "int:bits=4:group=16"),
    "... asymmetric (v2)": File(GPTQ, "int:bits=4:group=128:asym"),
    "... in activation order (`gptq:desc_act`)": File("gptq:desc_act", "int:bits=4:group=128"),
    "... experts": File(GPTQ, "int:bits=4:group=128", names=EXPERTS),
    "... with `--lm-head`": File(GPTQ, "int:bits=4:group=128", head=True),
    "`gptq`, 8 bits": File(GPTQ, "int:bits=8:group=128"),
    "`gptq`, 3 bits (2 likewise)": File(GPTQ, "int:bits=3:group=128"),
    "`awq`, groups of 128": File("awq", "int:bits=4:group=128:asym"),
    "... with `--lm-head`  ": File("awq", "int:bits=4:group=128:asym", head=True),
    "`compressed-tensors`, 4 bits, symmetric": File(CT, "int:bits=4:group=128"),
    "... asymmetric": File(CT, "int:bits=4:group=128:asym"),
    "... asymmetric beside another scheme": File(CT, "int:bits=4:group=128:asym", other="int:bits=8:group=128"),
    "... experts ": File(CT, "int:bits=4:group=128", names=EXPERTS),
    "... 8 bits, alone or beside 4": File(CT, "int:bits=4:group=128", other="int:bits=8:group=128"),
    "... 3, 5, 6 bits, `--target-bpw`": File(CT, "int:bits=4:group=128", other="int:bits=6:group=128"),
    "... with `--lm-head` ": File(CT, "int:bits=4:group=128", head=True),
    "... with `--embeddings 8`, a head of its own": File(CT, "int:bits=4:group=128", head=True, table="int:bits=8"),
    "... with `--embeddings 8`, a tied head": File(CT, "int:bits=4:group=128", table="int:bits=8"),
    "W8A8, inputs per token": File(CT, "int:bits=8:group=channel", "int:bits=8:group=channel"),
    "W8A8, static inputs": File(CT, "int:bits=8:group=channel", "int:bits=8:group=tensor"),
    "W8A8, `--act-asym`": File(CT, "int:bits=8:group=channel", "int:bits=8:group=channel:asym"),
    "int8 keys and values (`--kv-dtype int8`)": File(f"{CT}:kv=tensor:kv_dtype=int8", "int:bits=4:group=128"),
    "fp8 keys and values": File(f"{CT}:kv=tensor", "int:bits=4:group=128"),
    "FP8 per channel, inputs per token": File(CT, "fp8", "fp8"),
    "FP8 per block, inputs per group": File(CT, "fp8:group=128x128", "fp8:group=128"),
    "FP8 per tensor, static inputs": File(CT, "fp8:group=tensor", "fp8:group=tensor"),
    "NVFP4 weights": File(CT, "nvfp4"),
    "NVFP4 weights and inputs": File(CT, "nvfp4", "nvfp4"),
    "MXFP4 weights": File(CT, "mxfp4"),
    "MXFP8 weights and inputs": File(CT, "mxfp8", "mxfp8"),
    "NVFP4 beside FP8": File(CT, "nvfp4", other="fp8"),
    "`modelopt`, FP8 or NVFP4": File("modelopt", "nvfp4", "nvfp4"),
    "GGUF Q4_0, Q8_0, Q4_K, Q6_K, IQ4_XS": File("gguf", "Q4_K"),
    "GGUF Q5_0, Q5_K, Q3_K ...": File("gguf", "Q5_K"),
    "ONNX (`--to onnx`)": Export("onnx:genai"),
    "ONNX (`--to onnx:qdq`)": Export("onnx:qdq"),
    "ExecuTorch (`--to executorch`)": Export("executorch"),
}  # fmt: skip


def tables() -> str:
    """Return the runtimes, and what each makes of the kinds of files, as Markdown."""
    notes: dict[str, int] = {}
    lines = ["| runtime | version | runs `OUT` by | of a format that it does not read |", "|---|---|---|---|"]
    lines += [f"| {name} | {r.version} | `{r.command}` | {r.instead} |" for name, r in RUNTIMES.items()]
    lines += ["", f"| file | {' | '.join(RUNTIMES)} |", f"|---|{'---|' * len(RUNTIMES)}"]
    for name, file in FILES.items():
        lines.append(f"| {name.rstrip()} | {' | '.join(_cell(r, notes) for r in file.readers())} |")
    return "\n".join([*lines, "", *(f"{n}. {why}" for why, n in notes.items())]) + "\n"


def _cell(row: Reader, notes: dict[str, int]) -> str:
    said = {True: row.known or "yes", False: "no", None: "?"}[row.accepts]
    if row.reason in ("", RUNTIMES[row.runtime].instead):
        return said
    return f"{said} {notes.setdefault(row.reason, len(notes) + 1)}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--doc", type=Path, help="the document whose tables are replaced")
    args = parser.parse_args()
    print(tables(), end="")
    if args.doc is not None:
        args.doc.write_text(written(args.doc, "runtimes.py", tables()))
