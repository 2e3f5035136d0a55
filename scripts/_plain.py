"""Documents without their markup: HTML pages as paragraphs, a book's pages in order, a FAQ as questions and answers.

    blocks("<h1>A</h1><p>b <i>c</i></p>")      [("h1", "A"), ("p", "b c")]

Not here: which documents (make_texts.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path

_BLOCKS = {"p", "div", "h1", "h2", "h3", "h4", "h5", "h6", "li", "dt", "dd", "pre", "blockquote", "tr", "table", "body"}
_LEFT_OUT = {"script", "style", "head", "table"}
_MARKS = {"toc", "docnav", "navheader", "navfooter", "legalnotice", "#banner", "#title"}  # classes and #ids left out
_VOID = {"br", "img", "hr", "link", "meta", "input", "col", "area", "base", "wbr"}


class _Blocks(HTMLParser):
    """Gathers the text of each block with the tag that it stands in."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, str]] = []
        self.open: list[tuple[str, bool]] = []  # tags, and whether what they hold is left out
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            self.text.append(" " * (tag == "br"))
            return
        if tag in _BLOCKS:
            self._end()
        named = dict(attrs)
        marks = {*(named.get("class") or "").split(), f"#{named.get('id')}"}
        within = bool(self.open) and self.open[-1][1]
        self.open.append((tag, within or tag in _LEFT_OUT or bool(marks & _MARKS)))

    def handle_endtag(self, tag: str) -> None:
        if tag in _BLOCKS:
            self._end()
        while any(t == tag for t, _ in self.open) and self.open.pop()[0] != tag:
            continue

    def handle_data(self, data: str) -> None:
        if not self.open or not self.open[-1][1]:
            self.text.append(data)

    def _end(self) -> None:
        of = next((t for t, _ in reversed(self.open) if t in _BLOCKS), "p")
        text = "".join(self.text)
        text = text.strip("\n").rstrip() if of == "pre" else " ".join(text.split())
        if text:
            self.found.append((of, text))
        self.text = []


def blocks(html: str) -> list[tuple[str, str]]:
    """Return the blocks of a page in order, each with its tag: paragraphs on one line, `pre` as it stands.

    Navigation, tables of contents, tables, scripts and legal notices are left out.
    """
    parser = _Blocks()
    parser.feed(html)
    parser.close()
    parser._end()
    return parser.found


def book(first: Path) -> Iterator[str]:
    """Yield the text of each page of a book, from its first on by the link to the next."""
    seen: set[Path] = set()
    page: Path | None = first
    while page is not None and page.exists() and page not in seen:
        seen.add(page)
        html = page.read_text(encoding="utf-8")
        yield "".join(f"{text}\n\n" for _, text in blocks(html))
        link = re.search(r'<link rel="next" href="([^"#/]+)"', html)
        page = first.parent / link[1] if link else None


def questions(pages: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (question, answer) of pages whose headings are questions; an answer reaches to the next heading."""
    for html in pages:
        asked, said = "", list[str]()
        for tag, text in [*blocks(html), ("h1", "")]:
            if tag not in ("h1", "h2", "h3", "h4"):
                said.append(text)
                continue
            if asked.endswith("?") and said:
                yield asked, "\n\n".join(said)
            asked, said = re.sub(r"^[\d.]+\s+", "", text), []


def paragraphs(text: str, least: int = 200) -> Iterator[str]:
    """Yield the paragraphs of a text that is set in lines, each of at least so many characters, on one line.

    A paragraph with lines drawn in it is a table, and left out.
    """
    for part in re.split(r"\n\s*\n", text):
        line = " ".join(part.split())
        if len(line) >= least and not re.search(r"[\u2500-\u257f]|[-=_|+]{4}", line):
            yield line


def code_after(text: str, mark: str) -> str:
    """Return a source file from the line that holds `mark` on. Raises ValueError where none does."""
    at = text.index(mark)
    return text[text.rfind("\n", 0, at) + 1 :]


def first(text: str, most: int) -> str:
    """Return the lines of a text that fit into so many characters, or a part of the first where it does not."""
    if len(text) <= most:
        return text
    end = text.rfind("\n", 0, most) + 1
    return text[: end or most]
