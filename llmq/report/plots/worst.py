"""The linears with the largest errors, and why, as far as that is known."""

from dataclasses import dataclass

from llmq.report.plots._plot import Cell, Figure, OfEach, Table, number
from llmq.report.read import Line, Told
from llmq.report.reasons import reasons

_SHOWN, _READ = 20, 8  # linears in the table, and those of them whose weights are read for a reason


@dataclass(frozen=True)
class Worst(OfEach):
    """A table of the worst linears."""

    section, rank, title = "Errors", 120, "The worst linears"
    reads = "Why: what their record, their input's channels and their weights tell. All: llmq inspect OUT --linears."
    wide = True

    def figure(self, one: Told) -> Figure:
        """Return the table."""
        worst = one.worst(_SHOWN)
        if not worst:
            return Figure(one.label, lacks="No errors were recorded.")
        heads = ["linear", "bits", "output error", "weight error", "why"]
        rows = [_row(line, reasons(one, line, look=i < _READ)) for i, line in enumerate(worst)]
        return Figure(one.label, table=Table(heads, rows))


def _row(line: Line, why: list[str]) -> list[Cell]:
    errors = [number(line.error(kind)) for kind in ("output", "weight")]
    return [Cell(line.name), number(line.bits), *errors, Cell("; ".join(why))]
