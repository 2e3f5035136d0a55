"""What is known of the blocks that are done, as it is kept on the disk (checkpoint/journal.py) and read back.

    journal.advance(*kept(report), parts)            of one block: its record, its importance, the H of its sites
    known.add(journal.step(i), shapes)

A run reads back what it has just kept, as one that goes on reads what an earlier run kept: both end in the same bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llmq.checkpoint.journal import Kept
from llmq.guard.reading import Entry
from llmq.model.folding import Fold
from llmq.pipeline.loaded import Report
from llmq.pipeline.records import Record
from llmq.stats import MeanSquare


@dataclass
class Known:
    """What is known of the blocks so far. hessians: H of their linears, by full name, where finishers want it."""

    record: Record = field(default_factory=Record)
    importance: dict[str, MeanSquare] = field(default_factory=dict)
    hessians: dict[str, Entry] = field(default_factory=dict)

    def add(self, block: Kept, shapes: Mapping[str, Sequence[int]]) -> None:
        """Add a block. shapes: of the checkpoint's tensors."""
        facts = block.facts["record"]
        folds = [Fold.from_json(f, "the journal", shapes) for f in facts["folds"]]
        self.record.add(Record(**{**facts, "folds": folds}))
        for i, names in enumerate(block.facts["importance"]):
            stat = MeanSquare(0)
            prefix = f"importance {i} "
            stat.totals = {n.removeprefix(prefix): t.read() for n, t in block.tensors.items() if n.startswith(prefix)}
            self.importance |= dict.fromkeys(names, stat)
        for i, names in enumerate(block.facts["hessians"]):
            self.hessians |= dict.fromkeys(names, block.tensors[f"hessian {i}"])


def kept(report: Report) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what is known of a block as tensors and facts. What several linears share is kept once."""
    record, stats = report.record, {id(s): s for s in report.importance.values()}
    for stat in stats.values():
        stat.close_part()
    tensors = {f"importance {i} {n}": t for i, s in enumerate(stats.values()) for n, t in s.totals.items()}
    tensors |= {f"hessian {i}": H_KK for i, H_KK in enumerate(report.hessians.values())}
    return tensors, {
        "record": {**vars(record), "folds": [f.to_json() for f in record.folds]},
        "importance": [[n for n, s in report.importance.items() if id(s) == key] for key in stats],
        "hessians": [list(names) for names in report.hessians],
    }
