import io

import pytest
from rich.console import Console

from llmq.show import Rows, labelled, lines, plain

HOSTILE = "[/red]a[red]b[/red] \x1b]0;title\x07\x1b[2J\rerror: all is well :smile:"


def printed(what, width=400):
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=False).print(what)
    return out.getvalue()


@pytest.mark.parametrize("what", [plain(HOSTILE), labelled("warning", "yellow", HOSTILE), lines(HOSTILE)])
def test_text_of_files_is_printed_as_text(what):
    shown = printed(what)
    assert "[/red]a[red]b[/red]" in shown and "\\x1b]0;title\\x07\\x1b[2J" in shown and ":smile:" in shown
    assert shown.count("\n") == 1 and all(c.isprintable() for c in shown.rstrip("\n"))


def test_cells_and_titles_of_tables_are_text():
    table = Rows(HOSTILE, "tensor")
    table.add(HOSTILE)
    shown = printed(table)
    assert "\x1b" not in shown and shown.count("[/red]") == 4


@pytest.mark.parametrize("headers", [(), ("--scheme", "short for")])
def test_no_word_of_a_table_is_cut(headers):
    table = Rows("", *headers)
    table.add("fp8-block", "fp8:group=128x128," * 3)
    shown = printed(table, width=40)
    assert "…" not in shown and shown.count("128x128") >= 2 and "fp8-block" in shown


def test_several_lines_keep_their_breaks_and_spaces():
    assert lines("def f():\n    return 1\x1b[0m").plain == "def f():\n    return 1\\x1b[0m"
