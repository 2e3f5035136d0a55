"""`llmq eval`, `llmq verify` and `llmq generate`: how good a checkpoint is, whether it is right, whether it speaks.

Not here: the work (evaluation/, verify/).
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llmq.commands.terminal import console, progress
from llmq.errors import LlmqError
from llmq.show import labelled, lines, plain

_SHOWN = 50  # lines of what is wrong


def evaluate(
    models: Annotated[list[str], typer.Argument(help="Checkpoints, quantized or float, or .gguf files.")],
    baseline: Annotated[str | None, typer.Option(help="Float checkpoint for KL and top-1 agreement.")] = None,
    text: Annotated[
        Path | None, typer.Option(help="Text file to score, or a folder: each file or sub-folder is a category.")
    ] = None,
    dataset: Annotated[str, typer.Option(help="Hub dataset to score where there is no --text.")] = "wikitext2",
    convention: Annotated[str, typer.Option(help="gptq, llama.cpp or lm-eval.")] = "gptq",
    window: Annotated[int | None, typer.Option(help="Tokens of a window, in place of the convention's.")] = None,
    windows: Annotated[int | None, typer.Option(help="Score only the first N windows, of each category.")] = None,
    kv_bits: Annotated[
        int | None, typer.Option(help="8 or 4: quantize the key-value cache (2: to see it fail).")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Hold one block at a time: models beyond memory.")] = False,
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
    given = {n: value for n, value in locals().copy().items() if n not in ("json_file", "log_json", "overwrite")}
    from llmq.api import evaluate_all as run
    from llmq.checkpoint.disk import write_text
    from llmq.checkpoint.place import check_file, user_path
    from llmq.evaluation import shown
    from llmq.evaluation.scores import table

    figures = None if json_file is None else user_path(json_file)
    if figures:
        check_file(figures, "--json", b"{", overwrite=overwrite)
    with progress(log_json) as work:
        found = run(**given, progress=work)
    console.print(table(found.evaluations))
    for name, e in found.evaluations.items():
        if e.categories:
            console.print(shown.categories(name, e))
    for line in shown.lines(found):
        console.print(plain(line), soft_wrap=True)
    if figures:
        write_text(figures, json.dumps(found.to_json(), indent=2) + "\n")


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
    from llmq.checkpoint.place import check_file, user_path
    from llmq.readable import readers_of
    from llmq.readers import row
    from llmq.verify import verify as run

    found = None if json_file is None else user_path(json_file)
    if found:
        check_file(found, "--json", b"{", overwrite=overwrite)
    reader = row(readers_of(out), runtime, "--runtime") if runtime is not None else None
    with progress() as work:
        report = run(out, against, adapter, work)
    if reader and reader.accepts:
        report.note(reader.use(out))
    elif reader:
        report.fail(reader.refusal())
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
