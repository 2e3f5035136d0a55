"""What is seen of long work: a bar, lines at a sensible pace, a log that machines read."""

import io
import json
import signal

import pytest
from rich.console import Console
from typer.testing import CliRunner

from llmq import cli, signals
from llmq.commands.terminal import progress
from llmq.commands.watching import Bar, Everyone, JsonLog, Lines, held, span, together
from llmq.progress import Event, Memory, Work
from llmq.types import LlmqError

MEMORY = Memory(1_800_000_000, 2_100_000_000)


def at(seconds, done=12, kind="begin", **more):
    known = {"what": f"block {done}", "total": 32, "step": "", "names": (), "left": 240.0, "memory": MEMORY}
    return Event(kind=kind, done=done, seconds=seconds, **known | more)


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (7500, "2 h 5 min")])
def test_a_time_is_said_in_the_unit_that_suits_it(seconds, said):
    assert span(seconds) == said


def test_the_linears_of_a_site_are_named_together_and_memory_in_gigabytes():
    assert together(["self_attn.q_proj", "self_attn.k_proj"]) == "self_attn.q_proj, k_proj" and together(()) == ""
    assert held(MEMORY) == "1.8 GB now, 2.1 GB at most"
    assert held(Memory(0, 0, 10**10, 2 * 10**10)).endswith("; GPU 10.0 GB now, 20.0 GB at most")


def test_lines_say_all_of_a_block_and_keep_their_distance():
    out = io.StringIO()
    lines = Lines(Console(file=out, width=40))
    for event in (at(9, 11), at(38), at(39, 12, "step"), at(40, 13), at(48.1, 14, left=None), at(60, 32, left=0.0)):
        lines.hear(event)
    assert out.getvalue().splitlines() == [
        "block 12, 12 of 32 done, 38 s, 4 min left, 1.8 GB now, 2.1 GB at most",
        "block 14, 14 of 32 done, 48 s, 1.8 GB now, 2.1 GB at most",
        "block 32, 60 s, 1.8 GB now, 2.1 GB at most",  # which is no block, but what follows them
    ]


def test_a_bar_shows_the_site_and_the_step_and_is_wiped_off():
    out = io.StringIO()
    with Bar(Console(file=out, width=160, force_terminal=True)) as bar:
        bar.hear(at(38, kind="step", step="solve", names=("mlp.gate_proj", "mlp.up_proj")))
        bar.hear(at(39, kind="warning", what="[red]no markup"))
        bar._bar.refresh()
    text = out.getvalue()
    for part in ("block 12: mlp.gate_proj, up_proj: solve", "12/32", "4 min left", "2.1 GB at most"):
        assert part in text
    assert "no markup" not in text


def test_a_signal_ends_the_work_at_any_event(monkeypatch):
    monkeypatch.setattr(signals, "_first", [(signal.SIGTERM, 0.0)])
    with pytest.raises(KeyboardInterrupt):
        Work(Everyone([])).step("solve")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_log_is_appended_to_even_where_its_last_line_is_torn(tmp_path):
    file = tmp_path / "log.json"
    with JsonLog(file, print) as log:
        log.hear(at(38, kind="step", step="solve", names=("q_proj",), left=None))
        first = read(file)  # each line is there at once
    assert [e["event"] for e in first] == ["open", "step"]
    assert first[1] | {"time": 0} == {
        "event": "step", "time": 0, "what": "block 12", "done": 12, "total": 32, "step": "solve", "names": ["q_proj"],
        "seconds": 38, "memory": {"now": MEMORY.now, "most": MEMORY.most},
    }  # fmt: skip
    with file.open("a") as f:
        f.write('{"event": "be')
    with pytest.raises(LlmqError), JsonLog(file, print):
        raise LlmqError("the disk is full")
    lines = file.read_text().splitlines()
    assert json.loads(lines[-1])["error"] == "LlmqError: the disk is full" and lines[-3].startswith('{"event": "be')
    assert [json.loads(line)["event"] for line in lines if line[-1] == "}"] == ["open", "step", "end", "open", "failed"]


def test_what_is_no_such_log_is_left_alone(tmp_path):
    other = tmp_path / "notes.json"
    other.write_text('{"mine": 1}')
    for path in (other, tmp_path, tmp_path / "none" / "log.json"):
        with pytest.raises(LlmqError, match="--log-json"):
            JsonLog(path, print)
    assert other.read_text() == '{"mine": 1}'


def test_a_log_without_room_does_not_end_the_work():
    warned = []
    with JsonLog("/dev/full", warned.append) as log:
        log.hear(at(1))
        log.hear(at(2))
    assert len(warned) == 1 and "No space left" in warned[0]


def test_of_several_processes_the_first_logs(tmp_path, monkeypatch):
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        with progress(tmp_path / rank) as work:
            work(0, 1, "block 0")
    assert [p.name for p in tmp_path.iterdir()] == ["0"] and len(read(tmp_path / "0")) == 3


def test_a_run_logs_every_block_site_and_step(tiny_checkpoint, tmp_path, prose):
    src, text, file = tiny_checkpoint(), tmp_path / "t.txt", tmp_path / "log.json"
    text.write_text(prose(1500))
    sizes = ["--group-size", "32", "--samples", "2", "--seq-len", "16", "--method", "awq,gptq", "--calib", str(text)]
    command = ["quantize", str(src), str(tmp_path / "out"), "--log-json", str(file), *sizes]
    assert CliRunner().invoke(cli.app, command).exit_code == 0
    assert CliRunner().invoke(cli.app, command).exit_code == 1  # OUT exists
    events = read(file)
    again = [e["event"] for e in events].index("open", 1)
    first = events[:again]
    assert events[-1]["event"] == "failed" and "--overwrite" in events[-1]["error"]
    begun = [e["what"] for e in first if e["event"] == "begin"]
    assert [what for what in begun if what.startswith("block")] == ["block 0", "block 1"] and begun[-1] == "verifying"
    steps = [(e["what"], e["step"], tuple(e["names"])) for e in first if e["event"] == "step"]
    qkv = tuple(f"self_attn.{n}_proj" for n in "qkv")
    own = [step for what, step, _ in steps if what == "block 1"]
    assert own[:3] == ["load", "awq", "forward"] and own[-2:] == ["pack", "write"]
    assert ("block 1", "forward", qkv) in steps and ("block 1", "solve", qkv) in steps
    assert len([s for s in own if s == "solve"]) == 4
    told = [e for e in first if "memory" in e]
    assert all(0 < e["memory"]["now"] <= e["memory"]["most"] + 2**21 for e in told)
    assert [e["seconds"] for e in told[:-1]] == sorted(e["seconds"] for e in told[:-1])
    assert any(e["event"] == "trouble" and "few tokens" in e["what"] for e in first)  # 32 of them
    assert first[-1]["event"] == "end"
