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


_FOLDERS = ("algorithms", "ranges", "grids", "formats", "export", "families")


def list_(
    what: Annotated[str | None, typer.Argument(help="schemes, algorithms, ranges, grids, formats, export ...")] = None,
) -> None:
    """List what there is to choose from: schemes, and all that `NAME:option=value` can name, with a line on each.

    Example: `llmq list schemes`
    """
    from llmq import registry
    from llmq.types import LlmqError

    if what not in (None, "schemes", *_FOLDERS):
        raise LlmqError(f"there is no list of {what!r}; there are schemes, {', '.join(_FOLDERS)}")
    if what in (None, "schemes"):
        console.print(_schemes())
    for folder in _FOLDERS if what is None else {what}.intersection(_FOLDERS):
        table = Rows(folder, "name", "what it is", box=None)
        for name, line in registry.describe(folder):
            table.add(name, line)
            if folder in ("algorithms", "ranges", "grids", "export") and (known := registry.options(folder, name)):
                table.add_row("", plain(f":{known}", "dim"))
        if table.row_count:  # no family needs a file today
            console.print(table)


def _schemes() -> Rows:
    from llmq.schemes import SCHEMES

    table = Rows("schemes", "--scheme", "bits", "runs on", "beware", "short for")
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for name, scheme in SCHEMES.items():
        short = [_said(key, value) for key, value in scheme.options.items()]
        table.add(name, scheme.bits, scheme.runs, scheme.beware, " ".join(short))
    return table


def _said(option: str, value: object) -> str:
    """Return an option as the command line has it."""
    dashed = "--" + option.replace("_", "-")
    if value is True:
        return dashed
    return f"{dashed} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
