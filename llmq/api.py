"""llmq from Python: what the command line does, with its options, defaults and messages.

    record = llmq.quantize("./my-llama", "./my-llama-int4", bits=4, group_size=64, calib="text.txt")
    scores = llmq.evaluate("./my-llama-int4", baseline="./my-llama", text="held-out.txt")
    record = llmq.dequantize("./my-llama-fp8", "./my-llama")

Not here: what the options of a recipe mean (recipe.py), how a run and its figures are shown (commands/).
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmq.checkpoint.place import user_path
from llmq.evaluation import scores
from llmq.evaluation.streamed import Streamed
from llmq.evaluation.windows import find_convention, load_text
from llmq.export import floats
from llmq.loading import as_dtype, load, load_tokenizer
from llmq.pipeline import run
from llmq.pipeline.memory import capped
from llmq.pipeline.plan import prepare
from llmq.pipeline.sinks import refuse
from llmq.progress import Listener, Progress, Work
from llmq.recipe import KINDS, Recipe
from llmq.types import LlmqError

OF_THE_RUN = (
    "src",
    "out",
    "recipe",
    "adapter",
    "device",
    "max_memory",
    "device_memory",
    "allow_code",
    "verify",
    "overwrite",
)
"""Options of `quantize` that say what is read and written, and are no part of the recipe."""


def quantize(
    src: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | None = None,
    adapter: str | Path | None = None,
    device: str = "auto",
    max_memory: str | None = None,
    device_memory: str | None = None,
    allow_code: bool = False,
    verify: bool = True,
    overwrite: bool = False,
    warn: Callable[[str], Any] = warnings.warn,
    progress: Progress | Listener | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Quantize a checkpoint and write OUT. Returns the record of the run, the content of its quantization.json.

    src: the float checkpoint, a folder, `org/name` or `org/name@REVISION`. out: the folder to write, or OUT.gguf.
    options: those of `Recipe`, laid over the file `recipe`, which names code outside llmq only with `allow_code`. None
        means that an option is not given.
    adapter: a LoRA adapter to add. verify: check what was written before it becomes OUT. overwrite: replace OUT.
    max_memory, device_memory: the most memory that the run may take, "6GiB", of the host and of the device; the same
        bytes are written, more slowly.
    warn: called with what a user should know, most of it before the work starts.
    progress: called with blocks done, blocks in all and what is going on; or a `Listener`, which hears of every step.
    Raises LlmqError for an option that does not exist, and as `Recipe`, `prepare` and the run do.
    """
    for name in options.keys() - KINDS.keys():
        raise LlmqError(f"quantize takes no option {name!r} (options: {', '.join((*OF_THE_RUN, *KINDS))})")
    given = {k: str(v) if isinstance(v, Path) else v for k, v in options.items() if v is not None}
    given = given if Path(out).suffix != ".gguf" else {"format": "gguf"} | given
    what = Recipe.load(None if recipe is None else user_path(recipe), given, allow_code=allow_code)
    refuse(what, str(src), None if adapter is None else str(adapter), Path(out), overwrite=overwrite)
    plan = capped(prepare(str(src), what, device, adapter), max_memory, device_memory)
    work, said = Work.of(progress), list(plan.warnings)
    for warning in said:
        _tell(warning, warn, work)
    record = run.quantize(plan, Path(out), overwrite=overwrite, check=verify, work=work)
    for warning in record["warnings"]:
        if warning not in said:  # what calibration left out
            _tell(warning, warn, work)
    return record


def _tell(warning: str, warn: Callable[[str], Any], work: Work) -> None:
    warn(warning)
    work.say("warning", warning)


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
    work = Work.of(progress)
    record = floats.dequantize(str(src), Path(out), dtype=dtype, overwrite=overwrite, check=verify, progress=work)
    for warning in record["warnings"]:
        warn(warning)
    return record


def evaluate(
    model: str | Path,
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
    progress: Progress | Listener | None = None,
) -> scores.Evaluation:
    """Measure a checkpoint's perplexity and, against a float `baseline`, its KL divergence and top-1 agreement.

    text: a file to score; without one, `dataset` of the Hub. convention: gptq, llama.cpp or lm-eval; window: tokens of
        a window, in place of the convention's. windows: score only the first so many.
    kv_bits: 8, 4 or 2 quantize the key-value cache. dtype: in which both compute ("float32" ...), None for their own.
    stream: hold one block of each in memory at a time (evaluation/streamed.py), for models larger than memory.
    progress: called with windows done (blocks, where streamed), how many in all, and what is going on.
    Raises LlmqError as `load`, `load_text`, `Streamed` and `scores.measure` do.
    """
    work = Work.of(progress)
    scores.refuse(windows, kv_bits, stream=stream)
    how = find_convention(convention, window)
    content = load_text(None if text is None else user_path(text), dataset, how)
    tokenizer = load_tokenizer(str(model))
    work(0, 1, "loading")

    def opened(path: str | Path, name: str, bits: int | None = None) -> scores.Predicts:
        if stream:
            return Streamed(path, name, dtype=as_dtype(dtype), device=device, work=work)
        return scores.Predictor(load(path, dtype=as_dtype(dtype), device=device), name, bits)

    def scoring(done: int, total: int) -> None:
        work(done, total, "scoring")

    truth = None if baseline is None else opened(baseline, "the baseline")
    scored = opened(model, "the model", kv_bits)
    return scores.measure(scored, truth, tokenizer, content, how, windows, scoring)
