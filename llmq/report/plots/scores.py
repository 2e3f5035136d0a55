"""What `llmq eval` found: perplexity and how far the answers are from the float model's."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmq.report.plots._plot import Cell, Figure, Plot, Table, number, percent
from llmq.report.read import Told

ABSENT = "It was not evaluated: llmq eval OUT --baseline SRC --text TEXT --keep, then the report again."


@dataclass(frozen=True)
class Scores(Plot):
    """A row for each text that a checkpoint was scored on."""

    section, rank, title = "Evaluation", 700, "Perplexity and distance from the float model"
    reads = (
        "KL is the mean over tokens, in nats; 99 % is what 99 of 100 tokens lie below. Top-1: how often both models "
        "rank the same token first."
    )
    wide = True

    def figures(self, told: Sequence[Told]) -> Iterator[Figure]:
        """Yield the table, and what is lacking."""
        rows = [_row(one, found) for one in told for found in one.evaluations]
        if rows:
            heads = [head for head in rows[0] if any(row[head].text for row in rows)]
            yield Figure(table=Table(heads, [[row[head] for head in heads] for row in rows]))
        for one in told:
            if not one.evaluations:
                yield Figure(one.label, lacks=ABSENT)


def _row(one: Told, found: Mapping[str, Any]) -> dict[str, Cell]:
    before, after = found.get("baseline_perplexity"), found.get("perplexity")
    error = found.get("kl_standard_error")
    return {
        "checkpoint": Cell(one.label),
        "text": Cell(str(found.get("text") or "")),
        "convention": Cell(str(found.get("convention") or "")),
        "perplexity": number(after, 4),
        "float": number(before, 4),
        "change": percent(after / before - 1 if after and before else None, 2),
        "KL": number(found.get("kl_mean")),
        "± standard error": number(error, 2),
        "KL, 99 %": number(found.get("kl_p99")),
        "KL, 99.9 %": number(found.get("kl_p999")),
        "top-1": percent(found.get("top1"), 2),
    }
