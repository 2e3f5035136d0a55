"""`llmq inspect` and `llmq list`: what a checkpoint holds, and what there is to choose from.

Not here: the work (inspection.py, distances.py, registry.py).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmq.commands.given import place_of_json
from llmq.commands.terminal import console, progress
from llmq.errors import LlmqError
from llmq.show import Rows, plain

if TYPE_CHECKING:
    from llmq.distances import Distances


def inspect(
    model: Annotated[str, typer.Argument(help="A checkpoint folder, Hub id or .gguf file.")],
    linears: Annotated[bool, typer.Option("--linears", help="One line for every linear.")] = False,
    baseline: Annotated[
        str | None, typer.Option(help="Another checkpoint of any format: how far each matrix is from it.")
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="With --baseline --linears: in the order of the 'error' or 'name'. [error]")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="With --baseline: write all to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --json.")] = False,
) -> None:
    """Show what a checkpoint holds: format, sizes, and the errors that llmq recorded; or its distance from another.

    Example: `llmq inspect ./my-llama-int4 --linears`
    """
    if by is not None and (baseline is None or not linears):
        raise LlmqError("--by orders the lines of --baseline and --linears; give both, or leave it out")
    if json_file is not None and baseline is None:
        raise LlmqError("--json holds the distance from another checkpoint; give --baseline, or leave it out")
    file = place_of_json(json_file, overwrite=overwrite)
    if baseline is not None:
        _distances(model, baseline, file, by or "error", linears=linears)
        return
    from llmq.inspection import inspect as look

    for table in look(model, linears=linears):
        console.print(table)


def _distances(model: str, baseline: str, file: Path | None, by: str, *, linears: bool) -> None:
    from llmq import distances
    from llmq.checkpoint.disk import write_text

    if by not in ("error", "name"):
        raise LlmqError(f"--by {by}: order by 'error', the worst first, or by 'name'")
    with progress() as work:
        found = distances.distances(model, baseline, work)
    for table in _linears(found, by) if linears else _summary(found):
        console.print(table)
    for line in distances.lines(found):
        console.print(plain(line), soft_wrap=True)
    if file:
        write_text(file, json.dumps(found.to_json(), indent=2) + "\n")


def _summary(found: "Distances") -> Iterator[Rows]:
    """Yield the distances by kind of matrix, worst first, and by block."""
    of_blocks = [(block, group) for block, group in found.by("block").items() if block is not None]
    of_kinds = sorted(found.by("kind").items(), key=lambda item: -max(d.error for d in item[1]))
    title = f"{found.a} against {found.b}: |A - B|^2 / |B|^2, in dB, and max |A - B|"
    for head, groups, told in (("matrix", of_kinds, title), ("block", of_blocks, "")):
        table = Rows(told, head, "of them", "mean error", "worst", "dB", "largest", "the worst", box=None)
        for key, group in groups:
            worst = max(group, key=lambda d: d.error)
            mean = sum(d.error for d in group) / len(group)
            figures = (
                f"{mean:.3e}",
                f"{worst.error:.3e}",
                f"{worst.decibels:.1f}",
                f"{max(d.largest for d in group):.4f}",
            )
            table.add(key, len(group), *figures, worst.name.removesuffix(".weight"))
        yield table


def _linears(found: "Distances", by: str) -> Iterator[Rows]:
    table = Rows(f"{found.a} against {found.b}", "matrix", "shape", "error", "dB", "largest", box=None)
    table.columns[0].overflow = "fold"
    for d in found.worst() if by == "error" else found.found:
        table.add(d.name, d.shape, f"{d.error:.3e}", f"{d.decibels:.1f}", f"{d.largest:.4f}")
    yield table


_FOLDERS = ("algorithms", "ranges", "grids", "formats", "export", "families")


def list_(
    what: Annotated[str | None, typer.Argument(help="schemes, algorithms, ranges, grids, formats, export ...")] = None,
) -> None:
    """List what there is to choose from: schemes, and all that `NAME:option=value` can name, with a line on each.

    Example: `llmq list schemes`
    """
    from llmq import registry

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
