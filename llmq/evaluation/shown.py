"""What is printed of categories, pairs and tasks, beside the table of models (scores.py)."""

from collections.abc import Iterator, Mapping

from llmq.evaluation.scores import Evaluation
from llmq.evaluation.several import Several
from llmq.evaluation.tasks import Task
from llmq.show import Rows


def categories(name: str, e: Evaluation) -> Rows:
    """Return a table of an evaluation's categories, one a row; those that lose most come first."""
    of = e.categories or {}
    against = e.kl_mean is not None
    heads = ("change", "KL", "95 %", "top-1") if against else ()
    out = Rows(f"{name}, by category", "category", "tokens", "perplexity", *heads, box=None)
    for column in out.columns[1:]:
        column.justify = "right"
    for category, c in sorted(of.items(), key=lambda item: -(item[1]["kl_mean"] if against else item[1]["perplexity"])):
        cells = [f"{c['tokens']:,}", f"{c['perplexity']:.3f}"]
        if against:
            low, high = c["kl_interval"]
            spread = "?" if low is None else f"{low:.4f} to {high:.4f}"
            change = 100 * (c["perplexity"] / c["baseline_perplexity"] - 1)
            cells += [f"{change:+.2f} %", f"{c['kl_mean']:.5f}", spread, f"{c['top1']:.2%}"]
        out.add(category, *cells)
    return out


def lines(found: Several) -> Iterator[str]:
    """Yield in words the worst category of each model, and how models differ: each from the next worse."""
    for name, e in found.evaluations.items():
        if e.categories and e.kl_mean:
            worst = max(e.categories, key=lambda c: e.categories[c]["kl_mean"] if e.categories else 0.0)
            kl = e.categories[worst]["kl_mean"]
            yield f"{name}: most is lost in {worst}, KL {kl:.5f}, {kl / e.kl_mean:.1f} times that of all"
    yield from (pair.said for pair in found.neighbours)


def tasks(found: Mapping[str, Mapping[str, Task]]) -> Rows:
    """Return a table of tasks by model, and of the baseline beside it where there is one."""
    against = any(t.baseline is not None for of in found.values() for t in of.values())
    heads = ("baseline", "difference", "p") if against else ()
    out = Rows("tasks: figure ± (95 %)", "model", "task", "metric", "items", "figure", *heads, box=None)
    for name, of in found.items():
        for t in of.values():
            cells = [f"{t.items:,}", f"{t.value:.4f} ± {t.half:.4f}"]
            if t.baseline is not None and t.difference is not None:
                p = "" if t.p is None else f"{t.p:.3f}"
                cells += [f"{t.baseline:.4f}", f"{t.difference:+.4f} ± {t.difference_half:.4f}", p]
            out.add(name, t.name, t.metric, *cells)
    return out
