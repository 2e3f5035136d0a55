"""`llmq report`: where the page goes, what is refused; `llmq quantize --report` beside a GGUF file."""

import pytest
from typer.testing import CliRunner

from llmq import cli, extras
from llmq.commands.terminal import console

GGUF = ("--format", "gguf:pre=gpt-2", "--type", "Q4_0", "--quality", "fast", "--device", "cpu")


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Lines are not broken, whatever console an earlier test has made."""
    monkeypatch.setattr(console, "width", 400)


def run(*args):
    return CliRunner().invoke(cli.app, list(map(str, args)))


def test_a_gguf_files_report_lies_beside_it(tiny_checkpoint, tmp_path, monkeypatch):
    src, out = tiny_checkpoint(), tmp_path / "m.gguf"
    done = run("quantize", src, out, *GGUF, "--report")
    assert done.exit_code == 0, done.exception
    assert {p.name for p in tmp_path.iterdir()} == {"m.gguf", "m.report.html", "m.timings.json"}
    assert "m.report.html" in done.output
    before = out.read_bytes()
    out.unlink()
    again = run("quantize", src, out, *GGUF, "--report")
    assert "m.report.html exists" in str(again.exception) and not out.exists()  # before the work
    assert run("quantize", src, out, *GGUF, "--report", "--overwrite").exit_code == 0 and out.read_bytes() == before
    assert run("verify", out).exit_code == 0
    monkeypatch.chdir(tmp_path)
    assert run("report", "m.gguf", "m.gguf").exit_code == 0 and (tmp_path / "report.html").is_file()


def test_what_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mine.html").write_text("<p>mine")
    for args, match in (
        ((tmp_path / "nothing", "--html", tmp_path / "r.html"), "nothing"),
        ((tmp_path, "--html", tmp_path / "mine.html", "--overwrite"), "holds something else"),
        ((tmp_path, "--html", tmp_path / "r.html", "--png", tmp_path / "mine.html"), "is a file; name a folder"),
    ):
        done = run("report", *args)
        assert done.exit_code and match in str(done.exception), match
    monkeypatch.setattr(extras, "find_spec", lambda _name: None)
    done = run("report", tmp_path)
    assert "package altair, which is not installed: pip install 'llmq-quant[report]'" in str(done.exception)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.html"]
