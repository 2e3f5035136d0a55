"""A GGUF file opened: keys, and tensors as views into the mapped file; a truncated one is refused by name.

Not here: what the keys mean to a runtime (architecture.py, tokenizer.py), decoding a type (grids/).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import gguf

from llmq.reading import field, parse_json
from llmq.types import LlmqError


class GgufFile:
    """The keys and tensors of one file.

    Raises LlmqError for a file that is missing, not GGUF, or shorter than its header says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():
            raise LlmqError(f"{path} is not a file; give a .gguf file")
        with path.open("rb") as f:
            if f.read(4) != b"GGUF":
                raise LlmqError(f"{path} is not a GGUF file (it does not begin with GGUF)")
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OverflowError, MemoryError, UnicodeDecodeError) as e:
            raise LlmqError(f"{path} is truncated or damaged ({_line(e)}); download or write it again") from e
        self.tensors = {t.name: t for t in self._reader.tensors}
        size = path.stat().st_size
        for t in self._reader.tensors:
            if t.data_offset + t.n_bytes > size:
                raise LlmqError(
                    f"{path} is truncated: tensor {t.name} ends at byte {t.data_offset + t.n_bytes:,} of {size:,}; "
                    "download or write it again"
                )

    def value(self, key: str) -> Any:
        """Return the value of a key, None where the file does not have it."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def report(self) -> dict[str, Any]:
        """Return the record of the run that wrote the file, empty where there is none. Raises LlmqError for junk.

        Older files hold the lines of the linears alone.
        """
        text, where = self.value("llmq.report"), f"{self.path}, llmq.report"
        found = {} if text is None else parse_json(str(text), where)
        report = field({"llmq.report": found}, "llmq.report", dict, str(self.path))
        return report if "linears" in report or not report else {"linears": report}

    def keys(self) -> list[str]:
        """Return the names of all keys."""
        return [k for k in self._reader.fields if not k.startswith("GGUF.")]

    def kinds(self) -> Counter[str]:
        """Return how many tensors there are of each type."""
        return Counter(t.tensor_type.name for t in self._reader.tensors)

    def data_bytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(int(t.n_bytes) for t in self._reader.tensors)


def _line(e: BaseException) -> str:
    return (" ".join(str(e).split()) or type(e).__name__)[:120]
