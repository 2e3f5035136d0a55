"""What went wrong with numbers, and what the run warned of: dampings, fallbacks, clipped scales, warnings."""

from dataclasses import dataclass

from llmq.report.plots._plot import Cell, Figure, OfEach, Table
from llmq.report.read import Told

_SHOWN = 200


@dataclass(frozen=True)
class Trouble(OfEach):
    """A table of all linears with trouble, and the warnings of the run."""

    section, rank, title = "Trouble and warnings", 500, "Dampings, fallbacks, warnings"
    reads = "What each kind means stands in docs/record.md."
    wide = True

    def figure(self, one: Told) -> Figure:
        """Return the table."""
        warnings = [str(w) for w in one.of("warnings", list, [])]
        rows = [[Cell(x.name), Cell(kind), Cell(words)] for x in one.lines for kind, words in x.trouble.items()]
        says = [f"Warning: {w}" for w in warnings[:_SHOWN]]
        if more := sum(max(len(found) - _SHOWN, 0) for found in (rows, warnings)):
            says.append(f"{more:,} more are in the record.")
        if not rows:
            says.append("No linear had trouble with its numbers." if one.lines else "Nothing was recorded of linears.")
        table = Table(["linear", "what", "how"], rows[:_SHOWN]) if rows else None
        return Figure(one.label, table=table, says=says)
