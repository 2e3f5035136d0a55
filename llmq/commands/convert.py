"""`llmq export` and `llmq dequantize`: a packed checkpoint in another form, nothing solved anew.

Not here: the work (export/).
"""

from pathlib import Path
from typing import Annotated

import typer

from llmq.commands.terminal import console, progress, warn
from llmq.show import Rows


def export(
    src: Annotated[str, typer.Argument(help="GPTQ, AWQ or compressed-tensors checkpoint, by any tool.")],
    out: Annotated[Path, typer.Argument(help="OUT.gguf to write.")],
    requantize: Annotated[str | None, typer.Option(help="Type for linears whose codes cannot be kept.")] = None,
    embeddings: Annotated[str | None, typer.Option(help="Type of float embedding and head, e.g. Q6_K.")] = None,
    pre: Annotated[str | None, typer.Option(help="llama.cpp's name of the pre-tokenizer, if not found.")] = None,
    split_max_size: Annotated[str | None, typer.Option(help="Files of at most so much, e.g. 4G.")] = None,
    verify: Annotated[bool, typer.Option(help="Reopen and check what was written before it becomes OUT.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT when the export has succeeded.")] = False,
) -> None:
    """Write a quantized checkpoint as GGUF, with the codes it has.

    Example: `llmq export ./my-llama-int4 my-llama.gguf --embeddings Q6_K`
    """
    from llmq.export.gguf import export as run

    done = run(
        src,
        out,
        requantize=requantize,
        embeddings=embeddings,
        pre=pre,
        split_max_size=split_max_size,
        overwrite=overwrite,
        check=verify,
    )
    for warning in done["warnings"]:
        warn(warning)
    table = Rows(out)
    table.add("size", f"{done['bytes'] / 1e6:,.1f} MB in {len(done['files'])} file(s)")
    table.add("tensors", ", ".join(f"{n} {kind}" for kind, n in done["types"].items()))
    table.add("linears", ", ".join(f"{n} {outcome}" for outcome, n in done["outcomes"].items()))
    console.print(table)


def dequantize(
    src: Annotated[str, typer.Argument(help="Quantized checkpoint, by any tool: a folder, org/name or FILE.gguf.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    dtype: Annotated[str, typer.Option(help="Of what is decoded: bfloat16, float16 or float32.")] = "bfloat16",
    verify: Annotated[bool, typer.Option(help="Read again what was written before it becomes OUT.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT when it is whole.")] = False,
) -> None:
    """Write a quantized checkpoint (FP8, NVFP4, MXFP4, GPTQ, AWQ, compressed-tensors, GGUF) as a float one.

    Example: `llmq dequantize ./my-llama-fp8 ./my-llama --dtype bfloat16`
    """
    given = locals().copy()
    from llmq.api import dequantize as run

    with progress() as work:
        done = run(**given, warn=warn, progress=work)
    table = Rows(out)
    table.add("size", f"{done['bytes'] / 1e6:,.1f} MB in {len(done['tensors'])} tensors")
    table.add("decoded", ", ".join(f"{n} weights, {kind}" for kind, n in done["decoded"]["weights"].items()))
    console.print(table)
