"""Tables of a document that a script prints: `<!-- SCRIPT prints what follows -->` ... `<!-- until here -->`."""

from __future__ import annotations

from pathlib import Path

_END = "<!-- until here -->"


def written(doc: Path, script: str, printed: str) -> str:
    """Return a document with what a script printed in the place of what it printed before.

    Raises ValueError where the document has no such place.
    """
    begin, text = f"<!-- scripts/{script} prints what follows -->", doc.read_text()
    head, found, rest = text.partition(begin)
    if not found or _END not in rest:
        raise ValueError(f"{doc} has no lines {begin!r} and {_END!r}")
    return f"{head}{begin}\n\n{printed}\n{_END}{rest.partition(_END)[2]}"
