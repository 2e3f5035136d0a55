"""All checkpoints in a table: size, errors, what it cost in perplexity and KL, what it took."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmq.report.plots._plot import Cell, Figure, Plot, Table, megabytes, number, percent
from llmq.report.read import Told
from llmq.show import span


@dataclass(frozen=True)
class Glance(Plot):
    """The table of all checkpoints; a column that nothing fills is left out."""

    section, rank, title = "At a glance", 10, "Figures"
    reads = (
        "Errors are means, squared and relative: 0.01 is an error of a tenth of the values. A click on a head sorts."
    )
    wide = True

    def figures(self, told: Sequence[Told]) -> Iterator[Figure]:
        """Yield the table; of one checkpoint the figures stand above."""
        if len(told) < 2:
            return
        rows = [_row(one) for one in told]
        heads = [head for head in rows[0] if any(row[head].text for row in rows)]
        yield Figure(table=Table(heads, [[row[head] for head in heads] for row in rows]))


def _row(one: Told) -> dict[str, Cell]:
    found, whole = one.figures, one.sized("float_bytes")
    before, after = found.get("baseline_perplexity"), found.get("perplexity")
    taken = one.timings
    return {
        "checkpoint": Cell(one.label),
        "format": Cell(one.method),
        "method": Cell(one.steps),
        "size": megabytes(one.size),
        "of float": percent(one.size / whole if whole else None),
        "bits a weight": number(one.sized("bits_per_weight") or None),
        "weight error": number(one.mean("weight")),
        "output error": number(one.mean("output")),
        "perplexity": number(after, 4),
        "change": percent(after / before - 1 if after and before else None, 2),
        "KL": number(found.get("kl_mean")),
        "KL, 99 %": number(found.get("kl_p99")),
        "top-1": percent(found.get("top1"), 2),
        "time": Cell(span(taken.seconds), taken.seconds) if taken else Cell(""),
        "most memory": Cell(f"{taken.most / 1e9:.2f} GB", taken.most) if taken else Cell(""),
        "trouble": number(sum(bool(line.trouble) for line in one.lines) or None),
    }
