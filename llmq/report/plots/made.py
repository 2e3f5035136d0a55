"""How a checkpoint was made: its source, the recipe that repeats it, and what ran."""

from dataclasses import dataclass

from llmq.report.plots._plot import Cell, Figure, OfEach, Table
from llmq.report.read import Told


@dataclass(frozen=True)
class Made(OfEach):
    """A table of what was said and what ran."""

    section, rank, title = "How it was made", 800, "Recipe"
    reads = "The options that repeat the run; recipe.yaml has them too."

    def figure(self, one: Told) -> Figure:
        """Return the table."""
        source, recipe = one.of("source", dict, {}), one.of("recipe", dict, {})
        said = {
            "source": source.get("name"),
            "commit": source.get("commit"),
            **{k: v for k, v in recipe.items() if v not in (None, [], False)},
            **{k: one.record.get(k) for k in ("dtype", "device", "threads", "torch", "llmq")},
        }
        rows = [[Cell(k.replace("_", "-")), Cell(_text(v))] for k, v in said.items() if v is not None]
        if not rows:
            return Figure(one.label, lacks="No llmq made it: nothing is known but its files.")
        return Figure(one.label, table=Table(["option", "value"], rows))


def _text(value: object) -> str:
    """Return a value in words; of a path its last part, as a page is handed on."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.rstrip("/").rpartition("/")[2] if text.startswith(("/", "./", "../", "~")) else text
