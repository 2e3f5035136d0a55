"""What a verification found: a line for each thing that is wrong, how many things of each kind were looked at.

Not here: what is looked at (the other files of this folder), printing (commands/).
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from llmq.errors import printable


@dataclass
class Report:
    """The outcome for one checkpoint.

    failures: what is wrong. notes: what a reader should know and is no fault.
    checked: how many of each kind were looked at. figures: numbers measured on the way.
    """

    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: Counter[str] = field(default_factory=Counter)
    figures: dict[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.failures

    def fail(self, line: str) -> None:
        """Add what is wrong, made printable, once."""
        line = printable(line, 400)
        if line not in self.failures:
            self.failures.append(line)

    def note(self, line: str) -> None:
        """Add what is worth knowing, made printable."""
        self.notes.append(printable(line, 400))

    def expect(self, good: bool, line: str) -> bool:
        """Add `line` unless `good`; return `good`."""
        if not good:
            self.fail(line)
        return good

    def count(self, kind: str, n: int = 1) -> None:
        """Count things looked at."""
        self.checked[kind] += n

    def summary(self) -> str:
        """Return PASS or FAIL, and what was looked at, in a line."""
        seen = ", ".join(f"{n:,} {kind}" for kind, n in self.checked.items())
        return (
            f"PASS: {seen}" if self.passed else f"FAIL: {len(self.failures):,} found wrong in {seen or 'nothing read'}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything, for `--json`."""
        return {
            "passed": self.passed,
            "failures": self.failures,
            "notes": self.notes,
            "checked": dict(self.checked),
            "figures": self.figures,
        }
