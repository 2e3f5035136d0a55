"""What a comparison found: a row for each candidate, the Pareto front, the advice, and the file that keeps it.

A row is on the front where no other is both smaller and closer to the float model (less KL): one may be chosen for its
size, another for its answers, and no row off the front for either.
Not here: how rows are made (_run.py), how they are shown (commands/compare.py, report/).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llmq.checkpoint.disk import write_text
from llmq.errors import LlmqError, one_line
from llmq.guard.reading import json_object

FILE, TOKENS = "compare.json", "tokens"
"""What a comparison keeps beside its checkpoints: its rows, and a folder of what was scored."""


@dataclass
class Row:
    """A candidate.

    options: of quantize. out: where it lies. bytes, bits_per_weight: of its tensors, 0 bytes until it is whole.
    seconds: of quantizing, since it last began; shares: the candidate whose solve it was exported from. readers:
    runtimes that take it. runs: whether the GPU of --on does, and why not (`note`); None where none was named.
    evaluation: `Evaluation.to_json()`. speed: tokens a second here, None where what runs it is not installed. front,
    beyond: on the Pareto front, beyond the budget.
    """

    name: str
    options: dict[str, Any]
    out: str
    bytes: int = 0
    bits_per_weight: float | None = None
    seconds: float = 0.0
    shares: str | None = None
    readers: list[str] = field(default_factory=list)
    runs: bool | None = None
    note: str = ""
    evaluation: dict[str, Any] = field(default_factory=dict)
    speed: float | None = None
    front: bool = False
    beyond: bool = False

    def of(self, options: Mapping[str, Any]) -> bool:
        """Say whether these are its options."""
        return bool(self.options == as_json(options))

    @property
    def kl(self) -> float:
        """The mean KL divergence from the float model."""
        return float(self.evaluation["kl_mean"])

    @property
    def spread(self) -> float | None:
        """Half of its 95 % interval, None where it has none."""
        low, high = self.evaluation["kl_interval"]
        return None if low is None else (high - low) / 2


@dataclass
class Comparison:
    """All rows, as the user named them, and how each two differ in KL (evaluation/several.py, `Pair.to_json`)."""

    source: str
    rows: list[Row]
    float_bytes: int = 0
    pairs: list[dict[str, Any]] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as `json.dumps` takes it."""
        return asdict(self)


def mark(rows: Sequence[Row], budget: int | None) -> None:
    """Say of each row whether it is on the Pareto front, and whether it is beyond a budget of bytes."""
    for row in rows:
        row.beyond = budget is not None and row.bytes > budget
        row.front = not any(_better(other, row) for other in rows)


def _better(a: Row, b: Row) -> bool:
    return a.bytes <= b.bytes and a.kl <= b.kl and (a.bytes < b.bytes or a.kl < b.kl)


def advice(found: Comparison, budget: int | None, on: str | None) -> list[str]:
    """Return in words which candidate to take: the closest of those that fit, and what is as close and smaller."""
    fit = [r for r in found.rows if not r.beyond and r.runs is not False]
    limits = [*([f"within {budget / 1e9:.2f} GB"] if budget else []), *([f"on {on}"] if on else [])]
    where = f" {' and '.join(limits)}" if limits else ""
    if not fit:
        return [f"none of them runs{where}: give a larger budget, or schemes of fewer bits"]
    best = min(fit, key=lambda r: r.kl)
    said = [f"closest to the float model{where}: {best.name}, KL {best.kl:.4f}, {best.bytes / 1e6:,.1f} MB"]
    for row in sorted(fit, key=lambda r: r.bytes):
        if row.bytes < best.bytes and not _differ(found.pairs, row.out, best.out):
            said.append(
                f"{row.name} is smaller, {row.bytes / 1e6:,.1f} MB, and no difference in KL is seen on this text"
            )
            break
    smallest = min(fit, key=lambda r: r.bytes)
    if smallest.bytes < best.bytes and len(said) == 1:
        said.append(f"smallest: {smallest.name}, {smallest.bytes / 1e6:,.1f} MB, KL {smallest.kl:.4f}")
    return said


def _differ(pairs: Sequence[Mapping[str, Any]], a: str, b: str) -> bool:
    """Say whether two rows are seen to differ in KL."""
    pair = next((p for p in pairs if {p["a"], p["b"]} == {a, b}), None)
    if pair is None or pair["interval"][0] is None:
        return True
    low, high = pair["interval"]
    return bool(low > 0 or high < 0)


def as_json(said: Mapping[str, Any]) -> Any:
    """Return what a file gives back of this."""
    return json.loads(json.dumps(said))


def save(folder: Path, run: Mapping[str, Any], known: Mapping[str, Row], rows: Sequence[Row]) -> None:
    """Keep what is finished, so that the same command goes on there.

    run: what the comparison is of. known: the rows that were kept before, which stay. rows: those of now.
    """
    every = {**known, **{row.name: row for row in rows}}
    write_text(folder / FILE, json.dumps({"run": run, "rows": [asdict(r) for r in every.values()]}, indent=2) + "\n")


def kept(folder: Path, run: Mapping[str, Any]) -> dict[str, Row]:
    """Return the rows that a folder keeps, of what is finished or begun, by name.

    Raises LlmqError where the folder holds another comparison, one of another llmq, or other things.
    """
    file = folder / FILE
    if not file.exists():
        if folder.is_dir() and any(folder.iterdir()):
            raise LlmqError(f"--keep {folder} holds other things and no {FILE}; name an empty folder")
        return {}
    said = json_object(file)
    if said.get("run") != as_json(run):
        raise LlmqError(f"--keep {folder} holds a comparison of another model or text; name another folder")
    try:
        return {r["name"]: Row(**r) for r in said["rows"]}
    except (KeyError, TypeError) as e:
        raise LlmqError(f"{file} is not as this llmq writes it ({one_line(e)}); remove it, and compare anew") from e
