"""A GGUF file while it is made: where its parts are staged, and how it is put in place.

Not here: what it holds (formats/gguf.py), its bytes (container.py).
"""

from pathlib import Path

from llmq.checkpoint import Sink, disk
from llmq.gguf import container


class GgufSink(Sink):
    """The parts of a GGUF file while they are made; they are staged in a folder beside OUT."""

    @property
    def whole(self) -> Path:
        """The file, or the first of its shards."""
        return self.files()[0]

    def check(self) -> None:
        """Raise LlmqError unless OUT can become a GGUF file, or is one that may be replaced."""
        container.check_out(self.out, overwrite=self.overwrite)

    def target(self, name: str) -> Path:
        """Return where a staged file will lie."""
        return self.out.with_name(name)

    def put(self, names: list[str]) -> None:
        """Give the files their names: each in one step, the first shard, which a reader opens, last."""
        for name in reversed(names):
            if (self.stage / name).exists():
                disk.put_file(self.stage / name, self.target(name))

    def stale(self, names: list[str]) -> list[Path]:
        """Return the old file, or its shards, that the new ones do not replace by name; the telling first one last."""
        old = [self.out, *container.shards(self.out)]
        return [p for p in reversed(old) if p.exists() and p.name not in names]
