"""llmq from Python: what the command line does, with its options, defaults and messages.

    ahead = llmq.plan("./my-llama", bits=4, group_size=64, calib="text.txt")
    record = llmq.quantize("./my-llama", "./my-llama-int4", bits=4, group_size=64, calib="text.txt")
    scores = llmq.evaluate("./my-llama-int4", baseline="./my-llama", text="held-out.txt")
    record = llmq.dequantize("./my-llama-fp8", "./my-llama")

Not here: what the options of a recipe mean (recipe.py), how a run and its figures are shown (commands/).
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmq import calibration
from llmq.checkpoint import place
from llmq.checkpoint.place import user_path
from llmq.evaluation import kept, scores, several
from llmq.evaluation.streamed import Streamed
from llmq.evaluation.windows import find_convention, load_text
from llmq.export import _run as exporting
from llmq.export import _several as outputs
from llmq.export._decoded import as_folder
from llmq.export._for import asked, required
from llmq.export._outputs import Outputs
from llmq.guard.reading import json_object
from llmq.loading import as_dtype, load, load_tokenizer
from llmq.model.device import device_of
from llmq.options import spelled
from llmq.pipeline import machines, rates, run, weights, whole_model
from llmq.pipeline.estimate import Estimate, estimate
from llmq.pipeline.memory import capped
from llmq.pipeline.plan import Plan, outline
from llmq.pipeline.sinks import identity, left, refuse
from llmq.progress import Listener, Progress, Work
from llmq.recipe import KINDS, Recipe
from llmq.report import ending
from llmq.report.timings import Timings
from llmq.team import ALONE, Team, join, placed
from llmq.types import LlmqError

if TYPE_CHECKING:
    from llmq.evaluation.tasks import Task

OF_THE_RUN = (
    "src", "out", "recipe", "adapter", "runtime", "device", "max_memory", "device_memory", "allow_code", "verify",
    "overwrite", "report",
)  # fmt: skip
"""Options of `quantize` that say what is read and written, and are no part of the recipe."""


def quantize(
    src: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | None = None,
    adapter: str | Path | None = None,
    runtime: str | None = None,
    device: str = "auto",
    max_memory: str | None = None,
    device_memory: str | None = None,
    allow_code: bool = False,
    verify: bool = True,
    overwrite: bool = False,
    report: bool = False,
    warn: Callable[[str], Any] = warnings.warn,
    progress: Progress | Listener | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Quantize a checkpoint and write OUT. Returns the record of the run, the content of its quantization.json.

    src: the float checkpoint, a folder, `org/name` or `org/name@REVISION`. out: the folder to write, or OUT.gguf.
        Where `format` names several, "gptq,gguf:Q4_0,onnx", it is a folder with one place for each: the solve is
        written in the first, and exported to the others (export/_several.py).
    options: those of `Recipe`, laid over the file `recipe`, which names code outside llmq only with `allow_code`. None
        means that an option is not given.
    adapter: a LoRA adapter to add. runtime: refuse what it would not load, "vllm". verify: check what was written
        before it becomes OUT. overwrite: replace OUT. report: write a page on it into OUT (beside a GGUF file) at the
        end, and the times of the run, which nothing else keeps.
    max_memory, device_memory: the most memory that the run may take, "6GiB", of the host and of the device; the same
        bytes are written, more slowly.
    warn: called with what a user should know, most of it before the work starts.
    progress: called with blocks done, blocks in all and what is going on; or a `Listener`, which hears of every step,
        and first of the plan.
    Raises LlmqError for an option that does not exist, and as `Recipe`, `prepare` and the run do.
    """
    if len(forms := outputs.parted(options.get("format"))) > 1:
        given = {k: v for k, v in locals().items() if k not in ("src", "out", "options", "forms")} | options
        return _several(src, user_path(out), forms, given)
    there = user_path(out)
    team = join(device_of(placed(device)))
    planned = outlined(
        src, out, recipe, options, max_memory, device_memory,
        adapter=adapter, runtime=runtime, device=device, allow_code=allow_code, overwrite=overwrite, team=team,
    )  # fmt: skip
    team.first(lambda: left(planned, there, overwrite=overwrite))  # refuses what another command left
    if report:
        team.first(lambda: ending.refuse(out, overwrite=overwrite))
    warn, work = (warn, Work.of(progress)) if team.leads else (_nothing, Work())
    times = Timings()
    work = work.also(times) if report and team.leads else work
    planned = weights.read(planned, work)
    said = list(planned.warnings)
    for warning in said:
        _tell(warning, warn, work)
    if work.heard:
        ahead = estimate(planned, rates.NOMINAL, devices=team.size)
        if (seconds := 0.01 * ahead.total) > 0.3:
            ahead = ahead.at(rates.probe(planned, place.standing(there), min(3.0, seconds)))
        work.say("plan", ahead.line())
    record = run.quantize(planned, there, overwrite=overwrite, check=verify, work=work)
    for warning in record["warnings"]:
        if warning not in said:  # what calibration left out
            _tell(warning, warn, work)
    if report and team.leads:
        return record | {"report": str(ending.end(out, times, src, adapter))}
    return record


def _several(src: str | Path, out: Path, forms: list[str], given: dict[str, Any]) -> dict[str, Any]:
    """Quantize in the first format, then export to the others, OUT being a folder with a place for each.

    Where an earlier run of this very command was ended, what is in its place already is left as it is.
    """
    where, given = outputs.places(out, forms), outputs.risen(given, forms)
    first, *others = where.values()
    more = {n: given[n] for n in ("max_memory", "device_memory", "adapter", "allow_code", "overwrite")}
    recipe = {n: v for n, v in given.items() if n in KINDS}
    planned = outlined(src, None, given["recipe"], recipe, device=given["device"], runtime=None, **more)
    made_by = identity(planned) | {"formats": forms}
    overwrite = bool(given["overwrite"])
    began = Outputs(out, made_by, [first, *others], overwrite=overwrite)
    team = join(device_of(placed(given["device"])))
    left_over = team.first(lambda: [p for p in (first, *others) if not began.done(p)])
    for text, target in zip(forms[1:], others, strict=True):
        if target in left_over:
            outputs.require(target, text, overwrite=overwrite)
    said = [warning for text in forms[1:] for warning in outputs.foresee(planned, text)]
    with began.begun() if team.leads else nullcontext():
        record = quantize(src, first, **given) if first in left_over else json_object(first / place.RECORD)
        after = {n: given[n] for n in ("verify", "overwrite", "warn", "progress")}
        for text, target in zip(forms[1:], others, strict=True):
            if team.leads and target in left_over:
                with outputs.told_how_to_go_on(first):
                    convert(first, target, text, **after)
    return record | {"warnings": [*record["warnings"], *said], "also": [str(p) for p in others]}


def _nothing(_warning: str) -> None:
    """Leave it to the first process to say."""


def _tell(warning: str, warn: Callable[[str], Any], work: Work) -> None:
    warn(warning)
    work.say("warning", warning)


def plan(
    src: str | Path,
    out: str | Path | None = None,
    *,
    recipe: str | Path | None = None,
    adapter: str | Path | None = None,
    runtime: str | None = None,
    device: str = "auto",
    max_memory: str | None = None,
    device_memory: str | None = None,
    allow_code: bool = False,
    overwrite: bool = False,
    devices: int = 1,
    device_like: str | None = None,
    seconds: float = 3.0,
    **options: Any,
) -> Estimate:
    """Return what `quantize` would write, hold in memory, take and be read by; no weight is read.

    src, out and options are those of `quantize`; without `out`, which alone says that a GGUF file is wanted if `format`
        does not, what is against OUT is not known, and the disk that is probed is that of the working folder.
    devices: how many processes share the work, each with a device. device_like: a machine that is not there, "h100":
        arithmetic by its data sheet, in place of `device`. seconds: how long this machine is probed.
    Raises LlmqError for what `quantize` would refuse before any work, with the same line, but for what only the weights
        can say, such as NaN.
    """
    if device_like is not None and device != "auto":
        raise LlmqError(f"--device-like {device_like} is a machine that is not here; leave out --device {device}")
    like = None if device_like is None else (device_like, machines.machine(device_like))
    where = device if like is None else torch.device("cuda")
    planned = outlined(
        src, out, recipe, options, max_memory, device_memory,
        adapter=adapter, runtime=runtime, device=where, allow_code=allow_code, overwrite=overwrite,
    )  # fmt: skip
    if like is not None:
        return estimate(planned, machines.on_paper(like[1], planned), like=like, devices=devices)
    if planned.method.finishers:
        whole_model.check_memory(planned)
    if out is None:
        return estimate(planned, rates.probe(planned, Path.cwd(), seconds), devices=devices)
    there = user_path(out)
    goes_on = left(planned, there, overwrite=overwrite)
    place.require(there, sum(planned.disk().values()))
    ahead = estimate(planned, rates.probe(planned, place.standing(there), seconds), devices=devices)
    return replace(ahead, goes_on=goes_on)


def outlined(
    src: str | Path,
    out: str | Path | None,
    recipe: str | Path | None,
    options: dict[str, Any],
    max_memory: str | None = None,
    device_memory: str | None = None,
    *,
    adapter: str | Path | None = None,
    runtime: str | None = None,
    device: str | torch.device = "auto",
    allow_code: bool = False,
    overwrite: bool = False,
    team: Team = ALONE,
) -> Plan:
    """Return the plan of `quantize` by the headers, and refuse all that they can say."""
    for name in options.keys() - KINDS.keys():
        raise LlmqError(f"quantize takes no option {name!r} (options: {', '.join((*OF_THE_RUN, *KINDS))})")
    given = {k: spelled(v) for k, v in options.items() if v is not None}
    if out is not None and place.one_file(user_path(out)):
        given = {"format": "gguf"} | given
    given, said = given if runtime is None else asked(given, runtime), given
    what = Recipe.load(None if recipe is None else user_path(recipe), given, allow_code=allow_code)
    if out is not None:
        added, there = None if adapter is None else str(adapter), user_path(out)
        team.first(lambda: refuse(what, str(src), added, there, overwrite=overwrite))
    planned = outline(str(src), what, device, adapter)
    if planned.calibrates():
        calibration.require(planned.method.recipe.calib, planned.method.recipe.samples or 0)
    if runtime is not None:
        warnings_ = required(planned, runtime, "OUT" if out is None else str(out), said, given)
        planned = replace(planned, warnings=[*planned.warnings, *warnings_])
    return capped(planned, max_memory, device_memory)


def dequantize(
    src: str | Path,
    out: str | Path,
    *,
    dtype: str = "bfloat16",
    verify: bool = True,
    overwrite: bool = False,
    warn: Callable[[str], Any] = warnings.warn,
    progress: Progress | Listener | None = None,
) -> dict[str, Any]:
    """Write a quantized checkpoint as a float one. Returns the content of its dequantization.json.

    src: a checkpoint of any format that llmq reads, a folder, `org/name`, `org/name@REVISION` or FILE.gguf. out: the
        folder to write.
    dtype: of what is decoded, bfloat16, float16 or float32; what is float stays as it is.
    verify: read again what was written before it becomes OUT. overwrite: replace OUT.
    warn: called with what a user should know. progress: called with tensors done, tensors in all and a name.
    Raises LlmqError where SRC is not quantized or not whole, and where OUT cannot be written.
    """
    return convert(src, out, f"float:{dtype}", verify=verify, overwrite=overwrite, warn=warn, progress=progress)


def convert(
    src: str | Path,
    out: str | Path,
    to: str | None = None,
    *,
    requantize: str | None = None,
    verify: bool = True,
    overwrite: bool = False,
    warn: Callable[[str], Any] = warnings.warn,
    progress: Progress | Listener | None = None,
    **options: str | None,
) -> dict[str, Any]:
    """Write a quantized checkpoint in another form, with the codes that it has: `llmq export`.

    src: a checkpoint of any format that llmq reads, a folder, `org/name` or `org/name@REVISION`. out: what to write.
    to: `TARGET[:option=value...]`: gguf:Q4_0, float, ...; None goes by the suffix of OUT.
    requantize: what a linear whose codes the target cannot keep is rounded to; None refuses it.
    options: of the target, by name: `embeddings="Q6_K"` is `gguf:embeddings=Q6_K`.
    verify: read again what was written before it becomes OUT. overwrite: replace OUT.
    warn: called with what a user should know. progress: called with tensors done, tensors in all and a name.
    Returns what the target says of it: bytes, warnings, and the number of linears by outcome.
    Raises LlmqError where SRC is not quantized or not whole, codes cannot be kept, and where OUT cannot be written.
    """
    work = Work.of(progress)
    given = {"requantize": requantize, "overwrite": overwrite, "check": verify, "progress": work}
    done = exporting.export(str(src), user_path(out), to, **given, **options)  # type: ignore[arg-type]
    for warning in done["warnings"]:
        warn(warning)
    return done


def evaluate(model: str | Path, **options: Any) -> scores.Evaluation:
    """Measure one checkpoint: `evaluate_all` of it alone, whose options it takes. Returns its figures."""
    return evaluate_all([model], **options).evaluations[str(model)]


def evaluate_all(
    models: Sequence[str | Path],
    *,
    baseline: str | Path | None = None,
    text: str | Path | None = None,
    dataset: str = "wikitext2",
    convention: str = "gptq",
    window: int | None = None,
    windows: int | None = None,
    kv_bits: int | None = None,
    stream: bool = False,
    dtype: str | None = None,
    device: str = "auto",
    keep: bool = False,
    held: several.TokenStore | None = None,
    progress: Progress | Listener | None = None,
) -> several.Several:
    """Measure checkpoints' perplexity and, against a float `baseline`, KL divergence and top-1 agreement.

    models: folders, Hub ids or GGUF files, whose weights are decoded and scored as floats. All are scored on the same
        tokens, so that each two of them are told apart by their difference (evaluation/several.py).
    text: a file to score, or a folder, each of whose files and sub-folders is a category with figures of its own;
        without one, `dataset` of the Hub. convention: gptq, llama.cpp or lm-eval; window: tokens of a window, in place
        of the convention's. windows: score only the first so many, of each category.
    kv_bits: 8, 4 or 2 quantize the key-value cache. dtype: in which all compute ("float32" ...), None for their own.
    stream: hold one block of each in memory at a time (evaluation/streamed.py), for models larger than memory.
    keep: keep the figures beside the checkpoint (evaluation/kept.py), where its card and its report find them.
    held: keeps what was made of every token, by model; what is in it is not run again.
    progress: called with windows done (blocks, where streamed), how many in all, and what is going on.
    Raises LlmqError as `load`, `load_text`, `Streamed` and `several.measure` do.
    """
    work, names = Work.of(progress), list(dict.fromkeys(map(str, models)))
    scores.refuse(windows, kv_bits, stream=stream)
    for name in names if keep else ():
        kept.place(name)
    how = find_convention(convention, window)
    work(0, 1, "loading")

    def opened(path: str, name: str, bits: int | None = None) -> scores.Predicts:
        if stream:
            return Streamed(path, name, dtype=as_dtype(dtype), device=device, work=work)
        return scores.Predictor(load(path, dtype=as_dtype(dtype), device=device), name, bits)

    with ExitStack() as stack:
        folders = {n: stack.enter_context(as_folder(n, dtype or "bfloat16", work)) for n in names}
        tokenizers = {n: load_tokenizer(folder) for n, folder in folders.items()}
        content = load_text(None if text is None else user_path(text), dataset, how, tokenizers[names[0]])
        truth = None if baseline is None else opened(str(baseline), "the baseline")
        openers = {n: partial(opened, f, "the model", kv_bits) for n, f in folders.items()}
        found = several.measure(openers, truth, tokenizers, content, how, windows, _scoring(work, names), held=held)
    for name, e in found.evaluations.items() if keep else ():
        kept.keep(name, kept.entry(e.to_json(), text=text or dataset, baseline=baseline, windows=windows))
    return found


def _scoring(work: Work, names: Sequence[str]) -> Callable[[int, int, str], None]:
    return lambda done, total, name: work(done, total, f"scoring {name}" if len(names) > 1 else "scoring")


def evaluate_tasks(
    models: Sequence[str | Path],
    tasks: Sequence[str],
    *,
    baseline: str | Path | None = None,
    limit: int | None = None,
    task_path: str | Path | None = None,
    dtype: str | None = None,
    device: str = "auto",
    keep: bool = False,
    progress: Progress | Listener | None = None,
) -> "dict[str, dict[str, Task]]":
    """Run tasks of lm-evaluation-harness (hellaswag, arc_easy ...) on checkpoints. Returns figures by model and task.

    models, baseline, dtype, device, keep: as in `evaluate_all`. limit: only the first so many items of each task.
    task_path: a folder of tasks of one's own; its YAML files may name Python code beside them, which is run.
    Raises LlmqError as `load` and `tasks.run` do; the package is `llmq-quant[tasks]`.
    """
    from llmq.evaluation import tasks as harness

    work, names = Work.of(progress), list(dict.fromkeys(map(str, models)))
    harness.require_harness()
    for name in names if keep else ():
        kept.place(name)

    def opened(folder: str) -> harness.Opened:
        return load(folder, dtype=as_dtype(dtype), device=device), load_tokenizer(folder)

    with ExitStack() as stack:
        folders = {n: stack.enter_context(as_folder(n, dtype or "bfloat16", work)) for n in names}
        openers = {n: partial(opened, folder) for n, folder in folders.items()}
        truth = None if baseline is None else partial(opened, str(baseline))
        where = None if task_path is None else user_path(task_path)
        found = harness.run(openers, truth, tasks, limit=limit, folder=where, progress=work)
    for name, of in found.items() if keep else ():
        figures = {"tasks": {t: task.to_json() for t, task in of.items()}, "limit": limit}
        kept.keep(name, kept.entry(figures, text=None, baseline=baseline))
    return found
