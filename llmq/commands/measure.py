"""`llmq eval` and `llmq verify`: how good a checkpoint is, whether it is right.

Not here: the work (evaluation/, verify/).
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmq.commands.given import place_of_json, scored
from llmq.commands.terminal import console, progress
from llmq.errors import LlmqError
from llmq.show import labelled, plain

if TYPE_CHECKING:
    from llmq.evaluation.several import Several
    from llmq.evaluation.tasks import Task

_SHOWN = 50  # lines of what is wrong
_OF_TEXT = ("convention", "window", "windows", "kv_bits", "stream")
_OF_THE_COMMAND = ("json_file", "log_json", "overwrite", "tasks", "limit", "task_path")


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Checkpoints, quantized or float, or .gguf files.")],
    baseline: Annotated[str | None, typer.Option(help="Float checkpoint for KL and top-1 agreement.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text file to score, or a folder: each file or sub-folder is a category.")
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Hub dataset to score without --text. [wikitext2]")] = None,
    convention: Annotated[str | None, typer.Option(help="gptq, llama.cpp or lm-eval. [gptq]")] = None,
    window: Annotated[int | None, typer.Option(help="Tokens of a window, in place of the convention's.")] = None,
    windows: Annotated[int | None, typer.Option(help="Score only the first N windows, of each category.")] = None,
    kv_bits: Annotated[
        int | None, typer.Option(help="8 or 4: quantize the key-value cache (2: to see it fail).")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Hold one block at a time: models beyond memory.")] = False,
    tasks: Annotated[
        str | None, typer.Option(help="hellaswag,arc_easy ...: tasks of lm-eval; text only where it is named too.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first N items of each task.")] = None,
    task_path: Annotated[
        Path | None, typer.Option(help="Folder of your own tasks; runs the Python code that its YAML files name.")
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the figures in MODEL, for its card and report.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --json.")] = False,
    log_json: Annotated[Path | None, typer.Option(help="Log every step for machines: a JSON object a line.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 ...; the checkpoint's own if left out.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda ...")] = "auto",
) -> None:
    """Measure perplexity and, against a float baseline, KL divergence and top-1 agreement; tell several models apart.

    Example: `llmq eval ./my-llama-int4 --baseline ./my-llama --text sample.txt`
    """
    given = {n: value for n, value in locals().copy().items() if n not in _OF_THE_COMMAND}
    from llmq.api import evaluate_all, evaluate_tasks
    from llmq.checkpoint.disk import write_text

    figures = place_of_json(json_file, overwrite=overwrite)
    if tasks is None and (limit is not None or task_path is not None):
        raise LlmqError("--limit and --task-path are for tasks; say --tasks hellaswag,arc_easy, or leave them out")
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    shared = {n: given[n] for n in ("baseline", "dtype", "device", "keep")}
    scores_text = not names or text is not None or dataset is not None
    idle = [] if scores_text else [n for n in _OF_TEXT if given[n] is not None and given[n] is not False]
    if idle:
        option = f"--{idle[0].replace('_', '-')}"
        raise LlmqError(f"{option} is for text, not for tasks; give --text or --dataset too, or leave {option} out")
    given |= scored(text, dataset, convention)
    with progress(log_json) as work:
        run = evaluate_tasks(models, names, limit=limit, task_path=task_path, progress=work, **shared) if names else {}
        of_text = evaluate_all(**given, progress=work) if scores_text else None
    found = of_text.to_json() if of_text else {}
    for name, of in run.items():
        found[name] = found.get(name, {}) | {"tasks": {t: task.to_json() for t, task in of.items()}}
    if run:
        _show_tasks(run)
    if of_text:
        _show(of_text)
    if figures:
        write_text(figures, json.dumps(found, indent=2) + "\n")


def _show_tasks(found: "dict[str, dict[str, Task]]") -> None:
    from llmq.evaluation import shown

    console.print(shown.tasks(found))
    for task in (t for of in found.values() for t in of.values() if t.said):
        console.print(plain(task.said), soft_wrap=True)


def _show(found: "Several") -> None:
    from llmq.evaluation import shown
    from llmq.evaluation.scores import table

    console.print(table(found.evaluations))
    for name, e in found.evaluations.items():
        if e.categories:
            console.print(shown.categories(name, e))
    for line in shown.lines(found):
        console.print(plain(line), soft_wrap=True)


def verify(
    out: Annotated[str, typer.Argument(help="A written checkpoint: a folder, Hub id or .gguf file.")],
    against: Annotated[str | None, typer.Option(help="The checkpoint it was made from, to compare weights.")] = None,
    adapter: Annotated[str | None, typer.Option(help="The LoRA adapter that was added to its weights.")] = None,
    runtime: Annotated[str | None, typer.Option(help="Check that it loads in vllm, mlx ..., by its rules.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all that was found to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --json.")] = False,
) -> None:
    """Reopen a written checkpoint, decode it by other code, and compare it with what was recorded when it was made.

    Example: `llmq verify ./my-llama-int4 --against ./my-llama`
    """
    from llmq.checkpoint.disk import write_text
    from llmq.readable import readers_of
    from llmq.readers import row
    from llmq.verify import verify as run

    found = place_of_json(json_file, overwrite=overwrite)
    reader = row(readers_of(out), runtime, "--runtime") if runtime is not None else None
    with progress() as work:
        report = run(out, against, adapter, work)
    if reader and reader.accepts:
        report.note(reader.use(out))
    elif reader:
        report.fail(reader.refusal(out))
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
