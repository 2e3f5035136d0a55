"""The command line: a file of commands/ for the commands of one kind, and here what they share.

Bad input ends in one line on standard error and exit status 1, a signal in 128 and its number; neither leaves a
half-written OUT. Who reads the output may go away: that ends no command.
Not here: the commands (commands/), any work: each command parses, calls the library and prints.
"""

import logging
import shlex
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from llmq import launched, signals
from llmq.commands.compare import compare
from llmq.commands.convert import dequantize, export
from llmq.commands.look import inspect, list_
from llmq.commands.measure import evaluate, verify
from llmq.commands.plan import plan
from llmq.commands.quantize import quantize
from llmq.commands.report import report
from llmq.commands.share import push
from llmq.commands.talk import chat, generate, serve
from llmq.commands.terminal import console, outliving_readers, warn
from llmq.errors import LlmqError, notes, one_line, printable
from llmq.show import labelled, plain

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def main() -> None:
    """Run the command line: every foreseen failure becomes one line and a non-zero status."""
    with outliving_readers():
        _main()


def _main() -> None:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    error = Console(stderr=True, soft_wrap=True, highlight=False)
    signals.watch()
    try:
        try:
            sys.exit(app(standalone_mode=launched.leads()))  # which prints what is wrong with the command line
        finally:
            sys.stdout.flush()  # whose device may be full
    except BaseException as e:  # an interrupt comes in any guise
        signals.hold()
        done = isinstance(e, SystemExit) and not e.code
        if not done and not launched.ends_first():
            sys.exit(1)
        if (number := signals.caught()) and not done:
            error.print(plain("; ".join(["interrupted", *(notes(e) or ["nothing was changed"])]), longest=None))
            sys.exit(128 + number)
        if isinstance(e, SystemExit) or "--debug" in sys.argv:
            raise
        error.print(labelled("error", "red", e if isinstance(e, LlmqError) else _unexpected(e)))
        sys.exit(1)


def _unexpected(e: BaseException) -> str:
    """Return what to say of an exception that nobody foresaw: where it came from and what was being done."""
    if isinstance(e, MemoryError):
        return f"out of memory, running llmq {shlex.join(sys.argv[1:])}"
    here = [f for f in traceback.extract_tb(e.__traceback__) if f"{Path(__file__).parent}" in f.filename]
    at = f" ({Path(here[-1].filename).name}:{here[-1].lineno})" if here else ""
    doing = printable(shlex.join(sys.argv[1:]), 500)
    return f"{type(e).__name__}{at}: {one_line(e)}: unforeseen, a fault of llmq; `llmq --debug {doing}` shows the rest"


def _version(wanted: bool) -> None:
    if wanted:
        from llmq import __version__

        console.print(f"llmq {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Quantize Llama-family checkpoints, load them, measure them."""
    if launched.size() > 1 and context.invoked_subcommand != "quantize":
        _on_the_first(f"{context.invoked_subcommand}")


def _on_the_first(command: str) -> None:
    """Have the first of several processes do a command that they do not share; the others have nothing to do."""
    if not launched.leads():
        raise typer.Exit
    warn(f"{command} runs on the first of {launched.size()} processes: only quantize is shared by several")
    launched.leave()


app.command()(quantize)
app.command()(plan)
app.command(name="eval")(evaluate)
app.command()(compare)
app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command()(push)
app.command()(export)
app.command()(dequantize)
app.command()(verify)
app.command()(inspect)
app.command()(report)
app.command(name="list")(list_)
