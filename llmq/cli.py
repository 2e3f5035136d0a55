"""The command line: `llmq quantize | export | dequantize | verify | eval | generate | inspect | list`.

Bad input ends in one line on standard error and exit status 1, a signal in 128 and its number; neither leaves a
half-written OUT.
Not here: any work. Each command parses, calls the library and prints.
"""

import json
import logging
import resource
import shlex
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmq import signals
from llmq.errors import LlmqError, notes, one_line, printable
from llmq.show import Rows, labelled, lines, plain

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)
console = Console()
_SHOWN = 50  # lines of what is wrong


def main() -> None:
    """Run the command line: every foreseen failure becomes one line and a non-zero status."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    error = Console(stderr=True, soft_wrap=True, highlight=False)
    signals.watch()
    try:
        app()
    except BaseException as e:  # an interrupt comes in any guise
        signals.hold()
        done = isinstance(e, SystemExit) and not e.code
        if (number := signals.caught()) and not done:
            error.print(plain("; ".join(["interrupted", *(notes(e) or ["nothing was written"])]), longest=None))
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
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    """Quantize Llama-family checkpoints, load them, measure them."""


@app.command()
def quantize(
    src: Annotated[str, typer.Argument(help="Float checkpoint: a folder, org/name or org/name@REVISION.")],
    out: Annotated[Path, typer.Argument(help="Folder to write, or OUT.gguf.")],
    recipe: Annotated[Path | None, typer.Option(help="YAML or JSON file with any of these options.")] = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter to add to the weights: a folder or Hub id.")] = None,
    quality: Annotated[str | None, typer.Option(help="fast, balanced or best: time against error. [balanced]")] = None,
    method: Annotated[str | None, typer.Option(help="Steps by name in place of a quality: awq,gptq:damp=0.01")] = None,
    weights: Annotated[str | None, typer.Option(help="Weight grid, int:bits=4:group=128:asym; short for it:")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of a weight, 2 to 8.")] = None,
    group_size: Annotated[str | None, typer.Option(help="Columns per scale, 'channel' or 'tensor'. [128]")] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="Symmetric or asymmetric grid. [sym]")] = None,
    range_: Annotated[str | None, typer.Option("--range", help="minmax, mse, percentile, entropy, output.")] = None,
    act_bits: Annotated[int | None, typer.Option(help="8: quantize activations too (W8A8).")] = None,
    act: Annotated[str | None, typer.Option(help="Activation scales: per 'token' or static per 'tensor'.")] = None,
    act_sym: Annotated[bool | None, typer.Option("--act-sym/--act-asym", help="Zero points per token. [sym]")] = None,
    act_range: Annotated[str | None, typer.Option(help="Range of static activation scales.")] = None,
    kv_bits: Annotated[int | None, typer.Option(help="8: write static scales of the key-value cache too.")] = None,
    kv: Annotated[str | None, typer.Option(help="Those scales per 'tensor' or per 'head'. [tensor]")] = None,
    format_: Annotated[str | None, typer.Option("--format", help="gptq, awq, compressed-tensors or gguf.")] = None,
    type_: Annotated[str | None, typer.Option("--type", help="GGUF: Q4_K_M, Q8_0, F16 ... [Q4_K_M]")] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="'REGEX:bits=8,group_size=32'; GGUF: 'REGEX:type=Q6_K'; repeatable.")
    ] = None,
    skip: Annotated[list[str] | None, typer.Option(help="Regex of linears to leave float; repeatable.")] = None,
    on_misfit: Annotated[str | None, typer.Option(help="'skip' leaves linears float that no group divides.")] = None,
    target_bpw: Annotated[float | None, typer.Option(help="Bits per weight to spend where they help most.")] = None,
    bit_choices: Annotated[str | None, typer.Option(help="Bits that --target-bpw chooses from. [3,4,5,6,8]")] = None,
    lm_head: Annotated[bool | None, typer.Option("--lm-head/--no-lm-head", help="Quantize the output head.")] = None,
    experts: Annotated[str | None, typer.Option(help="'all': every token calibrates every expert.")] = None,
    calib: Annotated[str | None, typer.Option(help="A text file or folder, a dataset, or 'self'. [wikitext2]")] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences. [128]")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of each. [2048]")] = None,
    seed: Annotated[int | None, typer.Option(help="Chooses calibration windows. [0]")] = None,
    dtype: Annotated[str | None, typer.Option(help="Activations in auto, float32 or bfloat16.")] = None,
    imatrix: Annotated[str | None, typer.Option(help="GGUF: weigh errors by this importance matrix.")] = None,
    imatrix_out: Annotated[str | None, typer.Option(help="GGUF: write the calibration's importance here.")] = None,
    split_max_size: Annotated[str | None, typer.Option(help="GGUF: files of at most so much, e.g. 4G.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    allow_code: Annotated[bool, typer.Option("--allow-code", help="Let --recipe name modules to import.")] = False,
    verify: Annotated[bool, typer.Option(help="Reopen and check what was written before it becomes OUT.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT when the run has succeeded.")] = False,
) -> None:
    """Quantize a checkpoint.

    Example: `llmq quantize ./my-llama ./my-llama-int4 --method gptq --bits 4 --group-size 128 --calib text.txt`
    """
    given = {name.rstrip("_"): value for name, value in locals().copy().items()}
    from llmq.api import quantize as run

    start = time.monotonic()
    with _progress() as step:
        record = run(**given, warn=_warn, progress=step)
    _print_summary(out, record, time.monotonic() - start)


@app.command(name="eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Quantized or float checkpoint.")],
    baseline: Annotated[str | None, typer.Option(help="Float checkpoint for KL and top-1 agreement.")] = None,
    text: Annotated[Path | None, typer.Option(help="Text file to score.")] = None,
    dataset: Annotated[str, typer.Option(help="Hub dataset to score where there is no --text.")] = "wikitext2",
    convention: Annotated[str, typer.Option(help="gptq, llama.cpp or lm-eval.")] = "gptq",
    window: Annotated[int | None, typer.Option(help="Tokens of a window, in place of the convention's.")] = None,
    windows: Annotated[int | None, typer.Option(help="Score only the first N windows.")] = None,
    kv_bits: Annotated[
        int | None, typer.Option(help="8 or 4: quantize the key-value cache (2: to see it fail).")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --json.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 ...; the checkpoint's own if left out.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
) -> None:
    """Measure perplexity and, against a float baseline, KL divergence and top-1 agreement.

    Example: `llmq eval ./my-llama-int4 --baseline ./my-llama --text sample.txt`
    """
    given = {n: value for n, value in locals().copy().items() if n not in ("json_file", "overwrite")}
    from llmq.api import evaluate as run
    from llmq.checkpoint.disk import write_text
    from llmq.checkpoint.place import check_file, user_path
    from llmq.evaluation.scores import table

    figures = None if json_file is None else user_path(json_file)
    if figures:
        check_file(figures, "--json", b"{", overwrite=overwrite)
    with _progress() as step:
        found = run(**given, progress=step)
    console.print(table({model: found}))
    if figures:
        write_text(figures, json.dumps({model: found.to_json()}, indent=2) + "\n")


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Quantized or float checkpoint.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
) -> None:
    """Continue a prompt, greedily: a quick look at whether a checkpoint speaks.

    Example: `llmq generate ./my-llama-int4 "The capital of France is"`
    """
    from llmq.loading import load, load_tokenizer
    from llmq.model.pretrained import check_ids, foreign

    tokenizer = load_tokenizer(model)
    loaded: Any = load(model, device=device)
    with foreign(f"{model}: its tokenizer cannot cut the prompt"):
        encoded = tokenizer(prompt, return_tensors="pt").to(loaded.device)
    inputs = {k: encoded[k] for k in ("input_ids", "attention_mask") if k in encoded}  # not token_type_ids and the like
    if not inputs["input_ids"].numel():
        raise LlmqError("the prompt is empty; give some text to continue")
    check_ids(inputs["input_ids"], loaded)
    with foreign(f"{model}: transformers cannot generate"):
        out = loaded.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        text = tokenizer.decode(out[0], skip_special_tokens=True)
    console.print(lines(str(text)))


@app.command()
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
        _warn(warning)
    table = Rows(out)
    table.add("size", f"{done['bytes'] / 1e6:,.1f} MB in {len(done['files'])} file(s)")
    table.add("tensors", ", ".join(f"{n} {kind}" for kind, n in done["types"].items()))
    table.add("linears", ", ".join(f"{n} {outcome}" for outcome, n in done["outcomes"].items()))
    console.print(table)


@app.command()
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

    with _progress() as step:
        done = run(**given, warn=_warn, progress=step)
    table = Rows(out)
    table.add("size", f"{done['bytes'] / 1e6:,.1f} MB in {len(done['tensors'])} tensors")
    table.add("decoded", ", ".join(f"{n} weights, {kind}" for kind, n in done["decoded"]["weights"].items()))
    console.print(table)


@app.command()
def verify(
    out: Annotated[str, typer.Argument(help="A written checkpoint: a folder, Hub id or .gguf file.")],
    against: Annotated[str | None, typer.Option(help="The checkpoint it was made from, to compare weights.")] = None,
    adapter: Annotated[str | None, typer.Option(help="The LoRA adapter that was added to its weights.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all that was found to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --json.")] = False,
) -> None:
    """Reopen a written checkpoint, decode it by other code, and compare it with what was recorded when it was made.

    Example: `llmq verify ./my-llama-int4 --against ./my-llama`
    """
    from llmq.checkpoint.disk import write_text
    from llmq.checkpoint.place import check_file, user_path
    from llmq.verify import verify as run

    found = None if json_file is None else user_path(json_file)
    if found:
        check_file(found, "--json", b"{", overwrite=overwrite)
    report = run(out, against, adapter)
    if found:
        write_text(found, json.dumps(report.to_json(), indent=2) + "\n")
    for note in report.notes:
        console.print(labelled("note", "dim", note), soft_wrap=True)
    for line in report.failures[:_SHOWN]:
        console.print(labelled("wrong", "red", line), soft_wrap=True)
    if len(report.failures) > _SHOWN:
        console.print(plain(f"and {len(report.failures) - _SHOWN} more, which --json FILE lists"))
    console.print(plain(report.summary(), "green" if report.passed else "red"), soft_wrap=True)
    if not report.passed:
        raise LlmqError(f"{out} is not right: {report.failures[0]}")


@app.command()
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


@app.command(name="list")
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


def _warn(warning: str) -> None:
    console.print(labelled("warning", "yellow", warning))


@contextmanager
def _progress() -> Iterator[Any]:
    """Yield `step(done, total, what)`, shown as a bar with the time left (only where the output is a terminal)."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=None)

        def step(done: int, total: int, what: str) -> None:
            signals.check()
            bar.update(task, completed=done, total=total, description=printable(what, 100))

        yield step


def _print_summary(out: Path, summary: dict[str, Any], seconds: float) -> None:
    from llmq.checkpoint.card import errors

    size = summary["size"]
    table = Rows(out)
    table.add("size", f"{size['float_bytes'] / 1e6:,.1f} MB -> {size['bytes'] / 1e6:,.1f} MB")
    if summary["linears"]:  # none in a GGUF file of floats
        table.add("bits per quantized weight", f"{size['bits_per_weight']:.3f} (scales and zeros counted)")
        for kind, mean, worst, most in errors(summary):
            table.add(f"mean {kind}", f"{mean:.3e} (squared, relative), worst {most:.3e} {worst}")
    if left := summary["untouched"]:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        table.add(
            "matrices left as they are", f"{', '.join(left[:3])}{more} (routers, what reads images, and the like)"
        )
    if experts := summary.get("experts"):
        told = experts["tokens"]
        few = "".join(f", {len(experts[k])} with {k}" for k in ("few", "none") if experts[k])
        table.add("tokens an expert", f"{told['least']:,} to {told['most']:,}, median {told['quartiles'][1]:,}{few}")
    fallbacks = [n for n, v in summary["linears"].items() if "fallback" in v]
    if fallbacks:
        table.add("fallbacks", f"{len(fallbacks)}: {', '.join(fallbacks[:3])} (see quantization.json)")
    table.add("seconds", f"{seconds:.1f}")
    table.add("peak memory", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB")
    console.print(table)
