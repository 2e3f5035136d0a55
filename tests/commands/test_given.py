"""Options that would count for nothing beside others: refused in one line, before any work."""

import pytest
from typer.testing import CliRunner

from llmq.cli import app
from llmq.types import LlmqError

COMPARE = ["compare", "m", "--schemes", "rtn"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["eval", "m", "--text", "h.txt", "--dataset", "c4"], "leave out --dataset c4, or --text"),
        ([*COMPARE, "--text", "h.txt", "--dataset", "wikitext2"], "leave out --dataset wikitext2, or --text"),
        (["eval", "m", "--tasks", "x", "--kv-bits", "8"], "--kv-bits is for text, not for tasks"),
        (["eval", "m", "--tasks", "x", "--convention", "gptq"], "--convention is for text"),
        (["eval", "m", "--tasks", "x", "--window", "8"], "--window is for text"),
        (["eval", "m", "--tasks", "x", "--windows", "0"], "--windows is for text"),
        (["eval", "m", "--tasks", "x", "--stream"], "--stream is for text"),
        (["inspect", "m", "--by", "name", "--linears"], "--by orders the lines of --baseline and --linears"),
        (["inspect", "m", "--by", "error", "--baseline", "n"], "--by orders the lines of --baseline and --linears"),
        (["inspect", "m", "--overwrite"], "--overwrite replaces a file that is asked for; give --json FILE"),
        (["verify", "m", "--overwrite"], "--overwrite replaces"),
        (["eval", "m", "--overwrite"], "--overwrite replaces"),
        ([*COMPARE, "--overwrite"], "--overwrite replaces"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_what_would_count_for_nothing_is_refused(args, said):
    with pytest.raises(LlmqError, match=said):
        CliRunner().invoke(app, args, catch_exceptions=False)


def test_a_task_and_a_text_take_the_options_of_text(monkeypatch):
    seen = {}
    monkeypatch.setattr("llmq.api.evaluate_tasks", lambda models, names, **given: {})
    monkeypatch.setattr("llmq.api.evaluate_all", lambda **given: seen.update(given))
    args = ["eval", "m", "--tasks", "x", "--dataset", "c4", "--kv-bits", "8"]
    assert CliRunner().invoke(app, args, catch_exceptions=False).exit_code == 0
    assert (seen["dataset"], seen["convention"], seen["kv_bits"]) == ("c4", "gptq", 8)
