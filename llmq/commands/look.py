"""`llmq inspect` and `llmq list`: what a checkpoint holds, and what there is to choose from.

Not here: the work (inspection.py, registry.py).
"""

from typing import Annotated

import typer

from llmq.commands.terminal import console
from llmq.show import Rows, plain


def inspect(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, Hub id or .gguf file.")],
    linears: Annotated[bool, typer.Option("--linears", help="One line for every linear.")] = False,
) -> None:
    """Show what a checkpoint holds: format, sizes, and the errors that llmq recorded.

    Example: `llmq inspect ./my-llama-int4 --linears`
    """
    from llmq.inspection import inspect as look

    for table in look(model, linears=linears):
        console.print(table)


def list_() -> None:
    """List algorithms, ranges, grids, formats and families, with a line on each and the options of `NAME:option=value`.

    Example: `llmq list`
    """
    from llmq import registry

    for folder in ("algorithms", "ranges", "grids", "formats", "families"):
        table = Rows(folder, "name", "what it is", box=None)
        for name, line in registry.describe(folder):
            table.add(name, line)
            if folder in ("algorithms", "ranges", "grids") and (known := registry.options(folder, name)):
                table.add_row("", plain(f":{known}", "dim"))
        if table.row_count:  # no family needs a file today
            console.print(table)
