"""Which runtimes take a file that llmq writes, as rows, and what of a file some of them do not take.

    known = table(("vLLM", True, "", "ran"), ("llama.cpp", False, "it reads GGUF", "source"))
    limits = [Limit("3-bit gptq is read by GPTQModel, not by vLLM", refuses=("vLLM",))]
    readers(known, limits)      # vLLM: False, "3-bit gptq is read by ..."; llama.cpp as it is
    told(limits)                # the same line, as a warning before a run

A format knows its readers and finds the limits of a plan (formats/); docs/readers.md says what ran and how.
Not here: any fact about a format.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from llmq.errors import LlmqError

RUNTIMES = {
    "transformers": "5.24",
    "vLLM": "0.32",
    "SGLang": "0.5",
    "llama.cpp": "October 2026",
    "TensorRT-LLM": "commit 008e0af",
}
"""The runtimes that are looked at, and the version of each."""
LLAMA_CPP = (
    "llama.cpp",
    False,
    "it reads GGUF; `llmq export OUT OUT.gguf` keeps the codes where a type holds them",
    "source",
)
"""The row of formats whose codes a GGUF file can hold, see `table`."""
TAKES = {
    "transformers": "gptq or awq without --lm-head, and compressed-tensors",
    "vLLM": "4 bits per channel or by groups of 32, 64 or 128, symmetric in gptq, either way in awq and "
    "compressed-tensors; 8 bits on GPUs; --bits 8 --act-bits 8; fp8, nvfp4, mxfp4 and mxfp8 in compressed-tensors, and "
    "--format modelopt",
    "SGLang": "4 and 8 bits per channel or by groups of 32, 64 or 128, symmetric in gptq; --bits 8 --act-bits 8; "
    "fp8 and nvfp4 in compressed-tensors",
    "llama.cpp": "--format gguf",
    "TensorRT-LLM": "--format modelopt; compressed-tensors where all linears are of one scheme, of nvfp4 or fp8",
}
"""What each is known to take, in words for a message."""


@dataclass(frozen=True)
class Reader:
    """Whether a runtime takes a file, and how that is known.

    accepts: None where it is not known. reason: why not, or what it takes to. known: "ran" where files of llmq of this
    format were loaded and compared, "source" where its source was read, "" of what is not known.
    """

    runtime: str
    version: str
    accepts: bool | None
    reason: str = ""
    known: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the row."""
        return asdict(self)


@dataclass(frozen=True)
class Limit:
    """Something of a file that some runtimes do not take, or take in part.

    text: what, in one line. refuses: those that do not load it, or compute rubbish from it. notes: those that take it
    with what the line says. told: whether the user is warned before a run; else the plan alone says it.
    known: how it is known where that differs from the format as a whole.
    """

    text: str
    refuses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    told: bool = True
    known: str = ""


def table(*rows: tuple[str, bool | None, str, str]) -> tuple[Reader, ...]:
    """Return readers from (runtime, accepts, reason, known), each with the version that is looked at."""
    return tuple(Reader(name, RUNTIMES[name], accepts, why, known) for name, accepts, why, known in rows)


def readers(known: Iterable[Reader], limits: Sequence[Limit]) -> list[Reader]:
    """Return the rows of a plan: what is known of the format, with the limits that its linears meet."""
    return [_limited(row, limits) for row in known]


def _limited(row: Reader, limits: Sequence[Limit]) -> Reader:
    if row.accepts is False:
        return row
    refusing = [limit for limit in limits if row.runtime in limit.refuses]
    met = refusing or [limit for limit in limits if row.runtime in limit.notes]
    if not met:
        return row
    texts = [*([] if refusing or not row.reason else [row.reason]), *(limit.text for limit in met)]
    how = next((limit.known for limit in met if limit.known), row.known)
    return replace(row, accepts=False if refusing else row.accepts, reason="; ".join(texts), known=how)


def told(limits: Iterable[Limit]) -> list[str]:
    """Return the lines that a user is warned with before a run."""
    return [limit.text for limit in limits if limit.told]


def runtime(name: str) -> str:
    """Return the runtime that a name means, whatever its case. Raises LlmqError, with all names, for another."""
    found = next((known for known in RUNTIMES if known.lower() == name.strip().lower()), None)
    if found is None:
        raise LlmqError(f"--for {name!r}: no such runtime is known (there are: {', '.join(map(str.lower, RUNTIMES))})")
    return found


def require(rows: Iterable[Reader], name: str) -> None:
    """Raise LlmqError, saying what it would take, where the runtime of that name does not take the file, or may not."""
    wanted = runtime(name)
    row = next((r for r in rows if r.runtime == wanted), Reader(wanted, RUNTIMES[wanted], None))
    if not row.accepts:
        why = row.reason or "nothing is known of this format there"
        verb = "does not take this" if row.accepts is False else "is not known to take this"
        raise LlmqError(f"{row.runtime} {row.version} {verb}: {why}. It takes {TAKES[wanted]}")
