"""docs/learn: a chapter, run anew, prints and draws what its page shows, in Chinese the same; notebooks are whole."""

import json
import re
import runpy
import sys

import learn
import pytest
from _charts import Chart

PAGES = {page.name[:2]: page for page in learn.chapters()}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def same(output, shown):
    """Whether two outputs are alike; the last decimal may differ by one, as processors sum in different orders."""
    if NUMBER.sub("#", output).split() != NUMBER.sub("#", shown).split():
        return False
    pairs = zip(NUMBER.findall(output), NUMBER.findall(shown), strict=True)
    return all(a == b or abs(float(a) - float(b)) < 1.01 * unit(b) for a, b in pairs)


def unit(number):
    """What the last decimal of a number counts, 0 where it has none."""
    return 10.0 ** -len(number.partition(".")[2]) if "." in number else 0.0


def numbers_apart(text):
    """What a picture says without its coordinates, and these."""
    return NUMBER.sub("#", text), [float(n) for n in NUMBER.findall(text)]


@pytest.mark.parametrize("number", PAGES)
def test_a_chapter_prints_and_draws_what_its_page_shows(number):
    page = PAGES[number]
    cells = learn.cells(page.read_text())
    ran = learn.run([c.code for c in cells], page.stem)
    for cell, output in zip(cells, ran.outputs, strict=True):
        anew = f"{page.name}; `python scripts/learn.py {number}` writes it anew: {cell.code}\n{output}"
        assert same(output, cell.output), anew
    for name, svg in ran.pictures.items():
        assert f"](img/{name})" in page.read_text()
        shape, at = numbers_apart(svg)
        kept, wanted = numbers_apart((learn.IMAGES / name).read_text())
        assert shape == kept and at == pytest.approx(wanted, abs=1.0)


@pytest.mark.parametrize("number", PAGES)
def test_the_chinese_page_has_the_same_code_outputs_pictures_and_sources(number):
    page, other = PAGES[number].read_text(), learn.chinese(PAGES[number]).read_text()
    assert learn.cells(other) == learn.cells(page)
    for pattern in (r"img/[\w.-]+", r"https?://[^)\s>]+"):
        assert sorted(re.findall(pattern, other)) == sorted(re.findall(pattern, page))
    assert len(re.findall("^#+ ", other, re.MULTILINE)) == len(re.findall("^#+ ", page, re.MULTILINE))


def test_links_lead_to_files_and_no_picture_is_left_over():
    linked = set()
    for page in learn.LEARN.rglob("*.md"):
        text = re.sub("```.*?```", "", page.read_text(), flags=re.DOTALL)
        assert len(re.findall("^# ", text, re.MULTILINE)) == 1
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page}: {target}"
            linked.add((page.parent / target).resolve())
    assert {p.resolve() for p in learn.IMAGES.iterdir()} <= linked
    assert {p.resolve() for p in learn.chapters()} <= linked


@pytest.mark.parametrize(
    ("output", "alike"), [("a 1.24\n", True), ("a 1.25\n", False), ("b 1.23\n", False), ("a 1\n", False)]
)
def test_the_last_decimal_alone_may_differ(output, alike):
    assert same(output, "a 1.23\n") is alike
    assert same("codes [7, 8]", "codes [7, 8]") and not same("codes [7, 8]", "codes [7, 9]")
    assert same("  9.9 dB", " 10.0 dB") and not same("0x76", "0x75")


def test_outputs_are_written_into_a_page_and_taken_out_again():
    page = (
        "# A\n\n```python\nprint(1)\n```\n\n```text\n0\n```\n\nb\n\n```python\nx = 1\n```\n\nc\n\n```text\nfree\n```\n"
    )
    assert [c.output for c in learn.cells(page)] == ["0\n", ""]
    made = learn.written(page, learn.run([c.code for c in learn.cells(page)], "page").outputs)
    assert made == page.replace("\n0\n", "\n1\n")
    assert learn.written(made, ["", "2\n"]) == made.replace("\n\n```text\n1\n```", "").replace(
        "x = 1\n```\n", "x = 1\n```\n\n```text\n2\n```\n"
    )


def test_a_chapter_is_a_script_and_a_notebook(tmp_path, capsys, monkeypatch):
    page = PAGES["01"]
    (tmp_path / "chapter.py").write_text(learn.script(page.read_text()))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    runpy.run_path("chapter.py")
    assert capsys.readouterr().out == "".join(c.output for c in learn.cells(page.read_text()))
    made = json.loads(json.dumps(learn.notebook(page.read_text())))
    code = [c for c in made["cells"] if c["cell_type"] == "code"]
    assert len({c["id"] for c in made["cells"]}) == len(made["cells"])
    assert [c["source"] + "\n" for c in code[1:]] == [c.code for c in learn.cells(page.read_text())]
    assert "# 1. The affine map" in made["cells"][1]["source"] and code[2]["outputs"][0]["text"].startswith("scale")


def test_a_chart_scales_and_says_what_it_shows(tmp_path):
    chart = Chart("x & y", "error", log=True)
    chart.line("a", [0.0, 1.0, 2.0], [1.0, 10.0, 100.0])
    chart.bars("b", [0.0, 1.0], [10.0, 100.0])
    chart.mark("here", 1.0)
    chart.save(str(tmp_path / "a.svg"))
    svg = (tmp_path / "a.svg").read_text()
    (path,) = re.findall(r'd="M(.*?)"', svg)
    (x0, y0), (x1, y1), (x2, y2) = ([float(n) for n in point.split()] for point in path.split(" L"))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y1 < y0
    assert "x &amp; y" in svg and svg.count('class="bar s1"') == 2 and "prefers-color-scheme: dark" in svg
    assert re.findall(r'class="mark \w+" x1="([\d.]+)"', svg) == [f"{x1:.1f}"]
