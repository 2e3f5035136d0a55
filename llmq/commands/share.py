"""`llmq push`: a finished checkpoint to the Hub, after a look at what would go.

Not here: what goes and how (sharing/).
"""

from typing import Annotated

import typer

from llmq.commands.terminal import console, warn
from llmq.show import Rows, lines, plain


def push(
    out: Annotated[str, typer.Argument(help="What llmq wrote: a folder or a .gguf file.")],
    repository: Annotated[str, typer.Argument(help="org/name; made where it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a repository that only its owners see.")] = False,
    branch: Annotated[
        str | None, typer.Option("--branch", "--revision", help="Where to commit; made where it is not there. [main]")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Send it; without this only what would go is shown.")] = False,
) -> None:
    """Send a checkpoint to the Hugging Face Hub. Without --yes nothing is sent: it shows files, sizes and the card.

    Example: `llmq push ./my-llama-int4 me/my-llama-int4 --private --yes`
    """
    from llmq.sharing.parcel import parcel
    from llmq.sharing.upload import check_repository, upload

    check_repository(repository)
    found = parcel(out)
    for note in found.notes:
        warn(note)
    sizes = found.sizes()
    where = f"{repository}{f', branch {branch}' if branch else ''}{', private' if private else ''}"
    console.print(plain(f"{out} to {where}:"), soft_wrap=True)
    table = Rows("")
    for name, size in sizes.items():
        table.add(name, f"{size:,} bytes")
    table.add(f"{len(sizes)} files", f"{sum(sizes.values()):,} bytes")
    console.print(table)
    if not yes:
        console.print(lines(found.card), soft_wrap=True)
        console.print(plain("checksums hold; nothing was sent: --yes sends it", "green"), soft_wrap=True)
        return
    console.print(plain(upload(found, repository, private=private, branch=branch), "green"), soft_wrap=True)
