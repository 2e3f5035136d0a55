"""The texts to score: markup goes, the rest stands in order; the same packages give the same bytes; a lack is told."""

from __future__ import annotations

import gzip
import hashlib
import json

import make_texts
import pytest
from _plain import blocks, book, code_after, first, paragraphs, questions

PAGE = """<html><head><title>no</title><link rel="next" href="{next}" title="x"/><style>p {{}}</style></head><body>
<p id="title">no</p><ul class="docnav top"><li>no</li></ul><h1 class="title"><a id="x"></a>1.2. {head}</h1>
<div class="toc"><dl><dt>no</dt></dl></div><div class="para">
   One &amp; <code>two</code>,<br/>three.<ul><li>four</li></ul> five
</div><pre class="screen">
$ ls  -l
  a</pre><table><tr><td>no</td></tr></table><p class="title">A caption</p></body></html>"""


def test_a_page_without_its_markup():
    assert blocks(PAGE.format(next="", head="What?")) == [
        ("h1", "1.2. What?"),
        ("div", "One & two, three."),
        ("li", "four"),
        ("div", "five"),
        ("pre", "$ ls  -l\n  a"),
        ("p", "A caption"),
    ]
    assert blocks("<p>a<p>b</div>c") == [("p", "a"), ("p", "b"), ("p", "c")]


def test_a_book_is_read_by_the_link_to_the_next_page(tmp_path):
    for name, after in (("a", "c"), ("c", "b"), ("b", "a")):
        (tmp_path / f"{name}.html").write_text(PAGE.format(next=f"{after}.html", head=name))
    assert [page[5] for page in book(tmp_path / "a.html")] == ["a", "c", "b"]
    assert list(book(tmp_path / "none.html")) == []


def test_questions_reach_to_the_next_heading():
    pages = [
        PAGE.format(next="", head="Why?"),
        "<h2>No question</h2><p>a</p><h2>2. How?</h2><p>b</p><p>c</p><h2>When?</h2>",
    ]
    asked = list(questions(pages))
    assert asked[0][0] == "Why?" and asked[0][1].startswith("One & two") and asked[0][1].endswith("A caption")
    assert asked[1:] == [("How?", "b\n\nc")]


def test_paragraphs_and_parts():
    text = "short\n\n" + "a  word\n" * 40 + "\n┌──┐ " + "x " * 200 + "\n\n" + "b " * 120
    assert list(paragraphs(text)) == [("a word " * 40).strip(), ("b " * 120).strip()]
    assert code_after("int a;\n#ifdef B\nc", "B\n") == "#ifdef B\nc"
    with pytest.raises(ValueError, match="substring"):
        code_after("int a;", "B")
    assert first("one\ntwo\nthree", 9) == "one\ntwo\n" and first("abcdef", 3) == "abc" and first("ab", 3) == "ab"


@pytest.fixture
def room(tmp_path, prose):
    """What the packages hold, unpacked; two pages of the handbook in each language."""
    room = tmp_path / "room"
    files = {
        "jargon-text/usr/share/doc/jargon-text/jargon.txt.gz": gzip.compress(
            f"{prose(60)}\n\n".encode() * 200, mtime=0
        ),
        "werkzeug/werkzeug/a.py": b"def f():\n    return 1\n" * 4000,
        "boltons/boltons/b.py": b"class A:\n    pass\n" * 6000,
        "boltons/boltons/small.py": b"1\n",
        "debian-faq/usr/share/doc/debian/FAQ/a.en.html": "".join(
            f"<h3>Why {i}?</h3><p>{prose(80)}</p>" for i in range(70)
        ).encode(),
    }
    for name, mark in (("sprintf", "SPRINTF"), ("truetype", "TRUETYPE"), ("image", "IMAGE"), ("ds", "DS")):
        header = f"// declared\n#ifdef STB_{mark}_IMPLEMENTATION\n" + "int x = 1;\n" * 900
        files[f"libstb-dev/usr/include/stb/stb_{name}.h"] = header.encode()
    for language in ("de-DE", "fr-FR", "zh-CN", "en-US"):
        for start in ("the-debian-project", "unix-services"):
            page = PAGE.format(next="", head=language) + f"<p>{prose(90)}</p>" * 300
            files[f"debian-handbook/usr/share/doc/debian-handbook/html/{language}/{start}.html"] = page.encode()
    for name, content in files.items():
        (room / name).parent.mkdir(parents=True, exist_ok=True)
        (room / name).write_bytes(content)
    return room


def test_every_kind_is_made_with_its_source_and_the_same_bytes_each_time(tmp_path, room):
    outs = tmp_path / "a", tmp_path / "b"
    for out in outs:
        out.mkdir()
        assert make_texts.make(out, tmp_path, room) == {}
    sources = (outs[0] / "SOURCES.md").read_text()
    assert sources == (outs[1] / "SOURCES.md").read_text()
    for kind in make_texts.KINDS.values():
        text = (outs[0] / kind.file).read_text()
        assert 20_000 <= len(text) <= kind.most and "<" not in text
        assert hashlib.sha256(text.encode()).hexdigest() in sources
        assert all(p.licence in sources and p.version in sources for p in kind.packages)
    rows = [json.loads(line) for line in (outs[0] / "window-2048/chat.jsonl").read_text().splitlines()]
    assert all([t["role"] for t in r["messages"]][:2] == ["user", "assistant"] for r in rows) and len(rows) == 24
    assert "declared" not in (outs[0] / "window-2048/c.txt").read_text()


def test_what_cannot_be_had_is_told_and_an_old_text_of_it_is_gone(tmp_path, room, monkeypatch):
    (tmp_path / "window-2048").mkdir()
    (tmp_path / "window-2048/prose.txt").write_text("of another version")
    (room / "jargon-text/usr/share/doc/jargon-text/jargon.txt.gz").write_bytes(gzip.compress(b"too short"))
    (room / "libstb-dev/usr/include/stb/stb_ds.h").unlink()
    (room / "boltons").rename(room / "elsewhere")
    monkeypatch.setattr(make_texts, "_run", lambda *command, at=None: None)  # which downloads nothing
    missing = make_texts.make(tmp_path, tmp_path, room)
    assert missing.keys() == {"prose", "python", "c"}
    assert missing["prose"] == "only 0 characters were found" and "stb_ds.h" in missing["c"]
    assert "boltons 24.0.0 was downloaded under another name" in missing["python"]
    assert not (tmp_path / "window-2048/prose.txt").exists() and (tmp_path / "window-2048/german.txt").exists()
    assert "| prose | not there: only 0 characters were found" in (tmp_path / "SOURCES.md").read_text()


def test_a_download_that_fails_says_why(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="no-such-command"):
        make_texts._run("no-such-command")
    with pytest.raises(OSError, match=r"sh -c: it said no"):
        make_texts._run("sh", "-c", "echo it said no >&2; exit 3")
