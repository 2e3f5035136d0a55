"""The tasks that people quote (hellaswag, arc_easy ...), by lm-evaluation-harness on a model that llmq has loaded.

    found = run({"a": open_a}, open_baseline, ["arc_easy"], limit=100)
    found["a"]["arc_easy"].value       0.62     its accuracy, with the 95 % interval `half`
    found["a"]["arc_easy"].said        "no difference from the baseline seen ..."

Which items there are, how they are asked and how an answer is scored is the harness'; its data is the Hub's, and a task
of one's own is a folder of its YAML files. The same items are put to model and baseline, so that they are compared item
by item (paired.py): a difference far below the spread of either figure is seen.
Not here: perplexity and KL (scores.py), which say more of quantization, at less cost.
"""

import difflib
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmq.errors import LlmqError, one_line, printable
from llmq.evaluation import paired
from llmq.extras import require

Opened = tuple[Any, Any]
"""A transformers model and its tokenizer."""
_FIRST = ("acc_norm", "acc", "exact_match")  # of the metrics of a task, what people quote
_BATCH = 4


@dataclass(frozen=True)
class Task:
    """A model's figure in a task, the mean over its items.

    metric: which. half: of the 95 % interval of `value`. baseline: its figure; difference: the model's minus it, with
    the half of its interval, and p: that both are equally good, by McNemar's test, where items are right or wrong; None
    without a baseline. said: the difference in words.
    """

    name: str
    metric: str
    items: int
    value: float
    half: float
    baseline: float | None = None
    difference: float | None = None
    difference_half: float | None = None
    p: float | None = None
    said: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields as `json.dumps` takes them."""
        return dict(vars(self))


def require_harness() -> None:
    """Raise LlmqError, with the command that installs it, where lm-eval is missing."""
    require(("lm_eval",), "tasks", "--tasks are run")


def run(
    models: Mapping[str, Callable[[], Opened]],
    baseline: Callable[[], Opened] | None,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    folder: Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, dict[str, Task]]:
    """Return the figures of each model in each task.

    limit: only the first so many items of a task, of each of a group's. folder: of tasks of one's own, whose YAML files
    may name Python code, which is run. progress: called with (models done, how many, a name).
    Raises LlmqError where lm-eval is missing, for a task that it does not know, and where its data cannot be had.
    """
    require_harness()
    if limit is not None and limit < 1:
        raise LlmqError(f"--limit {limit}: give 1 item or more")
    opened = {**({} if baseline is None else {"the baseline": baseline}), **models}
    with _harness():
        manager = _manager(tasks, folder)
        asked = dict[str, dict[str, dict[str, Tensor]]]()
        for i, (name, open_) in enumerate(opened.items()):
            if progress:
                progress(i, len(opened), name)
            asked[name] = _asked(*open_(), tasks, limit, manager)
    truth = asked["the baseline"] if baseline is not None else {t: {} for t in tasks}
    return {name: {t: _task(t, name, asked[name][t], truth[t]) for t in tasks} for name in models}


def _manager(tasks: Sequence[str], folder: Path | None) -> Any:
    """Return the harness' index of tasks. Raises LlmqError for one that is not in it."""
    from lm_eval.tasks import TaskManager

    if folder is not None and not folder.is_dir():
        raise LlmqError(f"--task-path {folder} is no folder; name one that holds YAML files of tasks")
    manager = TaskManager(include_path=None if folder is None else str(folder))
    known = set(manager.all_tasks)
    if unknown := [t for t in tasks if t not in known]:
        near = difflib.get_close_matches(unknown[0], known)
        like = f" (near it: {', '.join(near)})" if near else ""
        raise LlmqError(f"lm-eval knows no task {printable(unknown[0], 80)}{like}; `lm-eval ls tasks` lists them")
    return manager


def _asked(
    model: Any, tokenizer: Any, tasks: Sequence[str], limit: int | None, manager: Any
) -> dict[str, dict[str, Tensor]]:
    """Return what a model got for each item, by task and metric: float64 `[n]`, in the order of the items."""
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    try:
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=_BATCH),
            tasks=list(tasks), limit=limit, task_manager=manager, log_samples=True, bootstrap_iters=0,
        )  # fmt: skip
    except (OSError, LookupError, RuntimeError, TypeError, ValueError, datasets.exceptions.DatasetsError) as e:
        raise LlmqError(f"lm-eval cannot run {', '.join(tasks)}: {one_line(e)}") from e
    parts = found.get("group_subtasks", {})
    return {t: _items([found["samples"][leaf] for leaf in _leaves(t, parts, found["samples"])], t) for t in tasks}


def _leaves(task: str, parts: Mapping[str, Sequence[str]], samples: Mapping[str, Any]) -> list[str]:
    """Return the tasks that a group is made of, in order; the task itself where it is none."""
    if task in samples:
        return [task]
    return [leaf for part in parts.get(task, ()) for leaf in _leaves(part, parts, samples)]


def _items(tasks: Sequence[Sequence[Mapping[str, Any]]], name: str) -> dict[str, Tensor]:
    """Return the metrics that are a number for every item of all tasks. Raises LlmqError where there is none."""
    whole = [sorted(samples, key=lambda s: s["doc_id"]) for samples in tasks]
    items = [s for samples in whole for s in samples if s.get("filter") == samples[0].get("filter")]  # once for each
    names = set.intersection(*(set(s["metrics"]) for s in items)) if items else set()
    numbers = {m: [s[m] for s in items] for m in names if all(isinstance(s.get(m), int | float) for s in items)}
    if not numbers:
        raise LlmqError(f"{name} has no figure for each item by itself; its text is scored by --text, or by lm-eval")
    return {m: torch.tensor(values, dtype=torch.float64) for m, values in numbers.items()}


def _task(name: str, model: str, of: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> Task:
    """Return a model's figure, and how it differs from the baseline's where there is one."""
    metric = next((m for m in _FIRST if m in of), sorted(of)[0])
    own = paired.mean(of[metric])
    if not truth:
        return Task(name, metric, len(of[metric]), own.mean, own.half)
    apart = paired.mean(of[metric] - truth[metric])
    binary = all(bool(((x == 0) | (x == 1)).all()) for x in (of[metric], truth[metric]))
    p = paired.mcnemar(of[metric] == 1, truth[metric] == 1) if binary else None
    said = paired.says(apart, model, "the baseline", f"{name} {metric}", less=False)
    found = Task(name, metric, len(of[metric]), own.mean, own.half, float(truth[metric].mean()))
    return Task(**vars(found) | {"difference": apart.mean, "difference_half": apart.half, "p": p, "said": said})


@contextmanager
def _harness() -> Iterator[None]:
    """Have the harness say nothing but what is wrong while it runs."""
    log = logging.getLogger("lm_eval")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):  # its bars
            yield
    finally:
        log.setLevel(before)
