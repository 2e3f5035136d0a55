"""The chapters of docs/learn: their code runs, and what it prints and draws goes back into the page.

    python scripts/learn.py                          run all chapters; write outputs and pictures, in both languages
    python scripts/learn.py 02 --to calibration.ipynb    run one, and write it as a notebook too; .py is a script

A page is Markdown. Its ```python blocks run in their order in one namespace, in a folder of their own; a ```text block
behind one is what it prints. An SVG file that a chapter draws belongs into docs/learn/img. The page in Chinese has the
same blocks: code is copied from the English one by its author, outputs by this script.
Not here: the drawing (_charts.py), the tests (tests/test_learn.py).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

LEARN = Path(__file__).parents[1] / "docs" / "learn"
IMAGES = LEARN / "img"
_CELL = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\n+```text\n(?P<output>.*?)^```\n)?", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Cell:
    """A block of code and what the page says that it prints, "" for nothing."""

    code: str
    output: str


@dataclass(frozen=True)
class Ran:
    """What a chapter did when it ran: the output of each cell, and its pictures as SVG by the names of their files."""

    outputs: list[str] = field(default_factory=list)
    pictures: dict[str, str] = field(default_factory=dict)


def chapters() -> list[Path]:
    """Return the pages in English, in their order."""
    return sorted(LEARN.glob("[0-9][0-9]-*.md"))


def chinese(page: Path) -> Path:
    """Return where the same chapter lies in Chinese."""
    return LEARN / "zh" / page.name


def cells(text: str) -> list[Cell]:
    """Return the blocks of code of a page."""
    return [Cell(m["code"], m["output"] or "") for m in _CELL.finditer(text)]


def run(code: list[str], name: str) -> Ran:
    """Run blocks of code in one namespace, in an empty folder. name: of the page, for tracebacks."""
    ran, namespace = Ran(), {"__name__": name}
    with _elsewhere() as folder, _one_thread(), torch.random.fork_rng():
        for i, block in enumerate(code, start=1):
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(block, f"{name}, block {i}", "exec"), namespace)  # noqa: S102, our own pages
            ran.outputs.append(printed.getvalue())
        ran.pictures.update({p.name: p.read_text() for p in sorted(folder.glob("*.svg"))})
    return ran


@contextlib.contextmanager
def _elsewhere() -> Iterator[Path]:
    """Work in an empty folder, which is gone afterwards."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch compute on one thread: the products of a chapter are too small to share."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def written(text: str, outputs: list[str]) -> str:
    """Return a page with these outputs in the place of those it had."""
    coming = iter(outputs)

    def block(found: re.Match[str]) -> str:
        output = next(coming)
        return f"```python\n{found['code']}```\n" + (f"\n```text\n{output}```\n" if output else "")

    return _CELL.sub(block, text)


def script(text: str) -> str:
    """Return a page as a Python script in cells, its prose as comments."""
    parts = []
    for kind, part in _parts(text):
        commented = "\n".join(f"# {line}".rstrip() for line in part.splitlines())
        parts.append(f"# %% [markdown]\n{commented}\n" if kind == "markdown" else f"# %%\n{part}")
    return "\n".join(parts)


def notebook(text: str) -> dict[str, Any]:
    """Return a page as a Jupyter notebook, outputs included (nbformat 4.5)."""
    made: list[dict[str, Any]] = []
    outputs = iter(["", *(c.output for c in cells(text))])
    for i, (kind, part) in enumerate(_parts(text)):
        cell: dict[str, Any] = {"id": f"cell-{i}", "cell_type": kind, "metadata": {}, "source": part.strip("\n")}
        if kind == "code":
            output = next(outputs)
            shown = [{"output_type": "stream", "name": "stdout", "text": output}] if output else []
            cell |= {"execution_count": None, "outputs": shown}
        made.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": kernel}, "cells": made}


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """Yield prose ("markdown") and blocks ("code") in turn, first one that finds the drawing beside this script."""
    yield "code", f"import sys\n\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    at = 0
    for found in _CELL.finditer(text):
        if prose := text[at : found.start()].strip():
            yield "markdown", prose
        yield "code", found["code"]
        at = found.end()
    if prose := text[at:].strip():
        yield "markdown", prose


def _rewrite(page: Path) -> None:
    """Run a chapter, and write what it printed and drew."""
    ran = run([c.code for c in cells(page.read_text())], page.stem)
    for path in filter(Path.exists, (page, chinese(page))):
        path.write_text(written(path.read_text(), ran.outputs))
    for name, svg in ran.pictures.items():
        (IMAGES / name).write_text(svg)


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("chapters", nargs="*", help="numbers, such as 02; all where none is given")
    parser.add_argument("--to", type=Path, help="also write the one chapter as a notebook (.ipynb) or a script (.py)")
    args = parser.parse_args()
    chosen = [p for p in chapters() if not args.chapters or p.name[:2] in args.chapters]
    if unknown := set(args.chapters) - {p.name[:2] for p in chosen}:
        parser.error(f"there is no chapter {', '.join(sorted(unknown))}")
    if args.to and (len(chosen) != 1 or args.to.suffix not in (".ipynb", ".py")):
        parser.error("--to writes one chapter, whose number is given, to a file that ends in .ipynb or .py")
    for page in chosen:
        _rewrite(page)
        print(page.name)
    if args.to:
        text = chosen[0].read_text()
        args.to.write_text(json.dumps(notebook(text), indent=1) if args.to.suffix == ".ipynb" else script(text))


if __name__ == "__main__":
    _main()
