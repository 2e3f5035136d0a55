"""`llmq export` and `llmq dequantize`: a packed checkpoint in another form, nothing solved anew.

Not here: the work (export/).
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from llmq.commands.terminal import console, progress, warn
from llmq.show import Rows


def export(
    src: Annotated[str, typer.Argument(help="Quantized checkpoint, by any tool: a folder, org/name or FILE.gguf.")],
    out: Annotated[Path, typer.Argument(help="What to write: OUT.gguf, or a folder.")],
    to: Annotated[str | None, typer.Option(help="gguf:Q4_0, float ...; without it OUT's suffix says.")] = None,
    requantize: Annotated[str | None, typer.Option(help="What linears become whose codes cannot be kept.")] = None,
    type_: Annotated[str | None, typer.Option("--type", help="GGUF: the type that is to hold the codes.")] = None,
    embeddings: Annotated[
        str | None, typer.Option(help="float makes floats of packed ends; GGUF: their type, Q6_K.")
    ] = None,
    pre: Annotated[str | None, typer.Option(help="GGUF: llama.cpp's name of the pre-tokenizer.")] = None,
    split_max_size: Annotated[str | None, typer.Option(help="GGUF: files of at most so much, e.g. 4G.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float: bfloat16, float16 or float32.")] = None,
    verify: Annotated[bool, typer.Option(help="Reopen and check what was written before it becomes OUT.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT when the export has succeeded.")] = False,
) -> None:
    """Write a quantized checkpoint in another format, with the codes it has.

    Example: `llmq export ./my-llama-int4 my-llama.gguf --embeddings Q6_K`
    """
    given = {name.rstrip("_"): value for name, value in locals().copy().items()}
    from llmq.api import convert as run

    with progress() as work:
        done = run(**given, warn=warn, progress=work)
    _print(out, done)


def _print(out: Path, done: dict[str, Any]) -> None:
    table = Rows(out)
    in_files = f" in {len(done['files'])} file(s)" if "files" in done else ""
    table.add("size", f"{done['bytes'] / 1e6:,.1f} MB{in_files}")
    if "types" in done:
        table.add("tensors", ", ".join(f"{n} {kind}" for kind, n in done["types"].items()))
    if "outcomes" in done:
        table.add("linears", ", ".join(f"{n} {outcome}" for outcome, n in done["outcomes"].items()))
    if "decoded" in done:
        table.add("decoded", ", ".join(f"{n} weights, {kind}" for kind, n in done["decoded"]["weights"].items()))
    console.print(table)


def dequantize(
    src: Annotated[str, typer.Argument(help="Quantized checkpoint, by any tool: a folder, org/name or FILE.gguf.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    dtype: Annotated[str, typer.Option(help="Of what is decoded: bfloat16, float16 or float32.")] = "bfloat16",
    verify: Annotated[bool, typer.Option(help="Read again what was written before it becomes OUT.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT when it is whole.")] = False,
) -> None:
    """Write a quantized checkpoint (FP8, NVFP4, MXFP4, GPTQ, AWQ, compressed-tensors, GGUF) as a float one.

    Short for `llmq export SRC OUT --to float:DTYPE`.

    Example: `llmq dequantize ./my-llama-fp8 ./my-llama --dtype bfloat16`
    """
    given = locals().copy()
    from llmq.api import dequantize as run

    with progress() as work:
        done = run(**given, warn=warn, progress=work)
    _print(out, done)
