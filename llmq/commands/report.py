"""`llmq report`: what was done to checkpoints and what it cost, as a page.

Not here: the work (report/).
"""

from pathlib import Path
from typing import Annotated

import typer

from llmq.commands.terminal import console, progress
from llmq.show import Rows


def report(
    outs: Annotated[list[str], typer.Argument(metavar="OUT...", help="Checkpoints: folders, org/name or .gguf files.")],
    against: Annotated[str | None, typer.Option(help="The float checkpoint that they were made from.")] = None,
    adapter: Annotated[str | None, typer.Option(help="The LoRA adapter that was added to its weights.")] = None,
    linear: Annotated[str | None, typer.Option(help="Whose codes are shown, by its full name. [the worst]")] = None,
    html: Annotated[Path | None, typer.Option(help="The page. [OUT/report.html; of several ./report.html]")] = None,
    png: Annotated[Path | None, typer.Option(help="A folder for a picture of each plot.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier report and its pictures.")] = False,
) -> None:
    """Write a page on one checkpoint, or on several side by side: errors, codes, outliers, time, memory, KL.

    Example: `llmq report ./my-llama-int4 --against ./my-llama`
    """
    from llmq.checkpoint.place import beside, user_path
    from llmq.report import FILE, write

    local = len(outs) == 1 and user_path(outs[0]).exists()
    page = html or (beside(user_path(outs[0]), FILE) if local else Path(FILE))
    with progress() as work:
        files = write(
            outs, page, against=against, adapter=adapter, linear=linear, png=png, overwrite=overwrite, progress=work
        )
    table = Rows(files[0])
    table.add("size", f"{files[0].stat().st_size / 1e6:.2f} MB, nothing beside it is needed")
    if png is not None:
        table.add("pictures", f"{len(files) - 1} in {png}")
    console.print(table)
