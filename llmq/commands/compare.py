"""`llmq compare`: several ways to quantize one model, in one table.

Not here: the work (comparing/).
"""

import json
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmq.checkpoint.place import is_gguf
from llmq.commands.borrowed import borrowing
from llmq.commands.given import place_of_json, scored
from llmq.commands.measure import evaluate
from llmq.commands.quantize import quantize
from llmq.commands.terminal import console, progress, warn
from llmq.errors import LlmqError, one_line
from llmq.show import Rows, plain

if TYPE_CHECKING:
    from llmq.comparing.results import Comparison, Row

_USAGE: Any = typer.BadParameter.__mro__[1]  # the UsageError of the click that typer has, whichever that is
_OF_THE_COMMAND = ("json_file", "log_json", "schemes", "options")
_NO_RECIPE = (
    "src", "out", "recipe", "adapter", "runtime", "device", "max_memory", "device_memory", "allow_code", "verify",
    "overwrite", "log_json", "imatrix_out",
)  # fmt: skip


@borrowing(
    {
        quantize: ("calib", "varied", "samples", "seq_len", "seed"),
        evaluate: ("text", "dataset", "convention", "window", "windows"),
    }
)
def compare(
    src: Annotated[str, typer.Argument(help="Float checkpoint: a folder, org/name or org/name@REVISION.")],
    schemes: Annotated[
        list[str], typer.Option(help="w4a16,awq,q4_k_m,w8a8 ...; again for 'NAME=--bits 3 --group-size 64'.")
    ],
    quality: Annotated[str | None, typer.Option(help="Of those that name no method. [balanced]")] = None,
    group_size: Annotated[str | None, typer.Option(help="Of integer weights with float inputs. [128]")] = None,
    budget: Annotated[str | None, typer.Option(help="Mark what is larger, e.g. 6GiB.")] = None,
    on: Annotated[str | None, typer.Option(help="A GPU that is to run it: 'RTX 4090', h100, l4 ...")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report of all of them to this file.")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Keep the checkpoints in this folder; an interrupted comparison goes on there.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all of it to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files of --json and --html.")] = False,
    log_json: Annotated[Path | None, typer.Option(help="Log every step for machines: a JSON object a line.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    **options: Any,
) -> None:
    """Quantize a model in several ways and say what each costs: size, KL, perplexity, seconds, speed here.

    Example: `llmq compare ./my-llama --schemes w4a16,awq,q4_k_m,w8a8 --calib text.txt --text held-out.txt`
    """
    given = {n: value for n, value in locals().copy().items() if n not in _OF_THE_COMMAND} | options
    from llmq.checkpoint.disk import write_text
    from llmq.comparing import compare as run

    file = place_of_json(json_file, overwrite=overwrite, replaces=html is not None)
    given |= scored(given["text"], given["dataset"], given["convention"])
    words, named = _parted(schemes)
    with progress(log_json) as work:
        found = run(schemes=words, named=named, warn=warn, progress=work, **given)
    console.print(table(found))
    for line in lines(found, on):
        console.print(plain(line), soft_wrap=True)
    if file:
        write_text(file, json.dumps(found.to_json(), indent=2) + "\n")


def _parted(texts: Iterable[str]) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Return the short words, and the options of `NAME=options of quantize`."""
    words, named = list[str](), dict[str, dict[str, Any]]()
    for text in texts:
        name, is_named, options = text.partition("=")
        if not is_named or not options.strip().startswith("-"):
            words += text.split(",")
        elif name.strip() in named:
            raise LlmqError(f"--schemes names {name.strip()!r} twice; give each once, or another name")
        else:
            named[name.strip()] = _options(options, text)
    return words, named


def _options(text: str, whole: str) -> dict[str, Any]:
    """Return options of `quantize` as the command line would read them. Raises LlmqError for what it would refuse."""
    app = typer.Typer(add_completion=False)
    app.command(context_settings={"help_option_names": []})(quantize)  # no option that prints and ends
    command = typer.main.get_command(app)
    try:
        context = command.make_context("quantize", ["SRC", "OUT", *shlex.split(text)], resilient_parsing=False)
    except _USAGE as e:
        raise LlmqError(f"--schemes {whole!r}: {e.format_message()}") from e
    except ValueError as e:  # a quote that is not closed
        raise LlmqError(f"--schemes {whole!r}: {one_line(e)}") from e
    said = {n for n in context.params if getattr(context.get_parameter_source(n), "name", "") != "DEFAULT"}
    beside = sorted(said & set(_NO_RECIPE) - {"src", "out"})
    if beside:
        raise LlmqError(f"--schemes {whole!r}: --{beside[0].replace('_', '-')} is not of a recipe; leave it out there")
    given = {n.rstrip("_"): context.params[n] for n in said - set(_NO_RECIPE)}
    return {n: tuple(v) if isinstance(v, list) else v for n, v in given.items()}


def table(found: "Comparison") -> Rows:
    """Return the rows, the smallest first; a star is on the Pareto front of size and KL."""
    of = next(iter(found.rows)).evaluation
    title = f"{found.source}: {found.float_bytes / 1e6:,.1f} MB, perplexity {of['baseline_perplexity']:.3f}"
    out = Rows(title, "", "scheme", "MB", "perplexity", "KL ± (95 %)", "top-1", "quantized", "tokens/s", box=None)
    for column in out.columns[2:]:
        column.justify = "right"
    out.columns[1].overflow = "fold"
    for row in sorted(found.rows, key=lambda r: r.bytes):
        out.add(
            "*" * row.front + "-" * (row.beyond or row.runs is False), row.name, f"{row.bytes / 1e6:,.1f}",
            f"{row.evaluation['perplexity']:.3f}", _spread(row), f"{row.evaluation['top1']:.2%}",
            f"{row.seconds:.0f} s", "" if row.speed is None else f"{row.speed:.1f}",
        )  # fmt: skip
    return out


def _spread(row: "Row") -> str:
    half = "?" if row.spread is None else f"{row.spread:.4f}"
    return f"{row.kl:.4f} ± {half}"


def lines(found: "Comparison", on: str | None) -> Iterable[str]:
    """Yield in words what the table has no room for."""
    yield "* on the Pareto front: no other is smaller and closer. tokens/s: one sequence, on this machine"
    of_gguf = [row for row in found.rows if is_gguf(row.out)]
    if of_gguf:
        yield "GGUF files are scored by their weights, decoded; their speed is llama.cpp's"
    if any(row.speed is None for row in of_gguf):
        yield "no speed of GGUF files without llama.cpp: pip install 'llmq-quant[llama-cpp]'"
    for row in found.rows:
        if row.shares:
            yield f"{row.name} has the codes of {row.shares}: one solve, exported"
        if row.beyond:
            yield f"{row.name} is beyond the budget"
        if row.note:
            yield f"{row.name} {'runs' if row.runs else 'does not run'} on {on}: {row.note}"
    yield from found.advice
