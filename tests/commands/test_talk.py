"""`llmq chat` as a user meets it: at a terminal of its own, and with lines from a pipe."""

import io
import os
import signal
import time
from contextlib import suppress

import pytest
from _forked import Terminal
from _parrot import Parrot
from transformers import AutoTokenizer, GenerationConfig

import llmq
from llmq import cli, signals
from llmq.talk.conversation import Conversation
from llmq.talk.speaker import Sampling, TooLongError


def said(talk, text):
    answer = talk.ask(text)
    found = "".join(answer)
    talk.keep(text, found)
    return found


def test_turns_go_through_the_template_after_what_the_model_is_told():
    talk = Conversation(Parrot(), Sampling(100), system="be kind")
    assert said(talk, "hi") == "<s>be kind<u>hi"
    assert said(talk, "on") == "<s>be kind<u>hi<a><s>be kind<u>hi<u>on"
    talk.reset()
    assert said(talk, "hi") == "<s>be kind<u>hi"
    talk.tell(None)
    assert said(talk, "hi") == "<u>hi"


def test_a_base_model_writes_on():
    talk = Conversation(Parrot(chats=False), Sampling(100))
    assert said(talk, "ab") == "ab" and said(talk, "c") == "ababc"
    with pytest.raises(Exception, match="can be told nothing"):
        talk.tell("be kind")


def test_turns_that_are_too_long_say_how_to_begin_anew_and_are_not_kept():
    talk = Conversation(Parrot(context=12), Sampling(100))
    said(talk, "hi")
    with pytest.raises(TooLongError, match="/reset forgets"):
        talk.ask("and so on")
    assert len(talk.turns) == 2


def test_ctrl_c_asks_once_and_then_insists():
    before = signal.getsignal(signal.SIGINT)
    with signals.asked() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGINT) == before and signals.caught() is None


def test_lines_from_a_pipe_are_answered_one_by_one(tiny_checkpoint, monkeypatch, capsys):
    lines = 'The first city\n/stats\n/nothing\n/system be kind\n"""two\nlines"""\n/exit\nnever\n'
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    folder = str(tiny_checkpoint())
    cli.chat(folder, system=None, max_new_tokens=4, temperature=None, top_p=None, seed=None, context=None, device="cpu")
    printed = capsys.readouterr().out
    assert "tokens a second" in printed and "key-value cache" in printed and "there is no /nothing" in printed
    assert printed.count("--max-new-tokens") == 2


def interrupt(terminal, pattern):
    """Press Ctrl-C until a pattern is there: Python sleeps over one that comes just as it begins to wait for a line."""
    for _ in range(5):
        terminal.type("\x03")
        with suppress(TimeoutError):
            return terminal.until(pattern, 5)
    return terminal.until(pattern)


def endless(folder):
    """Keep the model of a checkpoint from ending an answer, which a random one does after some tokens."""
    settings, tokenizer = GenerationConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    settings.suppress_tokens = sorted({settings.eos_token_id, tokenizer.eos_token_id} - {None})
    settings.save_pretrained(folder)
    return folder


def test_ctrl_c_stops_an_answer_and_not_the_chat(tiny_checkpoint):
    folder = endless(tiny_checkpoint(max_position_embeddings=100_000))
    terminal = Terminal("chat", folder, "--device", "cpu", "--max-new-tokens", 90_000, "--temperature", 2)
    terminal.until("> $")
    terminal.type("The first city\n")
    terminal.until(r"\r\n.{20}")
    terminal.type("\x03")
    assert "(stopped)" in terminal.until(r"\)\r\n> $")
    terminal.type("half a line")
    interrupt(terminal, r"/exit or Ctrl-D leaves\r\n> $")
    terminal.type("/stats\n")
    assert "tokens a second" in terminal.until(r"> $")
    terminal.type("\x04")
    assert terminal.ends() == 0


def test_bytes_that_are_no_text_are_refused_before_the_model_is_opened():
    for ask in (lambda: cli.generate("no-model", "a\udcff"), lambda: cli.chat("no-model", system="a\udcff")):
        with pytest.raises(llmq.LlmqError, match="what was typed is no UTF-8 text"):
            ask()
