"""The command line as a user meets it: each command in a process of its own, and one line for each failure.

One is started as a user starts it; the others are forked from a process that has imported llmq (_forked.py).
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from _forked import llmq as run

import llmq
from llmq import cli, launched, signals
from llmq.commands import terminal


@pytest.fixture
def text(tmp_path, prose):
    (tmp_path / "t.txt").write_text(prose(3000))
    return tmp_path / "t.txt"


def test_generate_leaves_out_what_no_model_takes(tiny_checkpoint, capsys):
    folder = tiny_checkpoint()
    file = folder / "tokenizer_config.json"
    wanted = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask", "special_tokens_mask"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | wanted))
    cli.generate(str(folder), "The first city", max_new_tokens=4, device="cpu")
    assert capsys.readouterr().out.startswith("The first city")


def test_several_calibration_texts(tiny_checkpoint, tmp_path, text, prose):
    """Dealt by weight, recorded, and the card says them by name."""
    (tmp_path / "other.txt").write_text(prose(300, seed=3))
    given = ("--calib", f"{text}:weight=3", "--calib", tmp_path / "other.txt")
    options = ("--method", "gptq", "--group-size", 32, "--samples", 8, "--seq-len", 32, *given)
    done = run("quantize", tiny_checkpoint(), out := tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "quantization.json").read_text())
    assert [(p["samples"], p["share"]) for p in record["calibration"]] == [(6, 0.75), (2, 0.25)]
    assert record["recipe"]["calib"] == [f"{text}:weight=3", str(tmp_path / "other.txt")]
    card = (out / "README.md").read_text()
    assert f"75% {text.name}, 25% other.txt" in card and str(tmp_path) not in card
    done = run("plan", tiny_checkpoint(), *options[:-1], "no:weight=x")
    assert done.returncode == 1 and "a weight is a number above 0" in done.stderr and done.stderr.count("\n") == 1


def test_quantize_eval_generate_inspect(tiny_checkpoint, tmp_path, text):
    folder, out = tiny_checkpoint(), tmp_path / "out"
    options = ["--group-size", 32, "--samples", 8, "--seq-len", 32, "--calib", text]
    done = run("quantize", folder, out, *options)
    assert done.returncode == 0, done.stderr
    assert "bits per quantized weight" in done.stdout and "peak memory" in done.stdout
    again = run("quantize", folder, out, *options)
    assert again.returncode == 1 and "--overwrite" in again.stderr and again.stderr.count("\n") == 1
    assert run("quantize", folder, out, *options, "--overwrite").returncode == 0
    figures = tmp_path / "figures.json"
    done = run(
        "eval",
        out,
        "--baseline",
        folder,
        "--text",
        text,
        "--convention",
        "llama.cpp",
        "--windows",
        2,
        "--json",
        figures,
    )
    assert done.returncode == 0, done.stderr
    (measured,) = json.loads(figures.read_text()).values()
    assert measured["kl_mean"] > 0 and measured["perplexity"] > 1
    done = run("generate", out, "The first city", "--max-new-tokens", 4)
    assert done.returncode == 0 and done.stdout.startswith("The first city")
    done = run("inspect", out, "--linears")
    assert done.returncode == 0 and "model.layers.1.mlp.down_proj" in done.stdout and "gptq" in done.stdout


def test_help_has_an_example_for_every_command():
    assert run("--help").returncode == 0
    for command in ("quantize", "plan", "eval", "generate", "inspect", "list"):
        done = run(command, "--help")
        assert done.returncode == 0 and f"llmq {command}" in done.stdout and "Example" in done.stdout


def test_the_version_is_printed_by_a_process_that_is_started_as_a_user_does():
    done = subprocess.run([sys.executable, "-m", "llmq", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"llmq {llmq.__version__}"


@pytest.fixture
def unread():
    """Return a pipe that nobody reads any more, as behind `| head`."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def test_a_run_goes_on_when_nobody_reads_what_it_prints(tiny_checkpoint, tmp_path, text, unread):
    options = ["--group-size", 32, "--samples", 8, "--seq-len", 32, "--calib", text]
    done = run("quantize", tiny_checkpoint(), tmp_path / "out", *options, stdout=unread)
    assert done.returncode == 0 and (tmp_path / "out" / "quantization.json").exists()


@pytest.mark.parametrize(("args", "status"), [(["list"], 0), (["list", "--help"], 0), (["inspect", "nothing"], 1)])
def test_a_short_command_ends_as_ever_when_nobody_reads_what_it_prints(unread, args, status):
    done = run(*args, stdout=unread)
    assert (done.returncode, done.stderr.count("\n")) == (status, status)


def test_list_names_every_file():
    done = run("list")
    for name in ("gptq", "awq", "migrate", "rtn", "mse", "entropy", "compressed_tensors"):
        assert name in done.stdout
    assert "families" not in done.stdout  # of which there is none


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("quantize", "/no/such/folder", "OUT"), "is not a folder"),
        (("quantize", "SRC", "OUT", "--method", "gtpq"), "did you mean 'gptq'"),
        (("quantize", "SRC", "OUT", "--group-size", "48"), "does not divide"),
        (("quantize", "SRC", "OUT", "--group-size", "32", "--calib", "EMPTY"), "empty|0 tokens|no text"),
        (("quantize", "SRC", "OUT", "--group-size", "32", "--device", "warp"), "device 'warp'"),
        (("eval", "SRC", "--text", "EMPTY", "--window", "64"), "tokens"),
        (("inspect", "/no/such/folder"), "is not a folder"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else None,
)
def test_bad_input_is_one_line_and_nothing_is_written(tiny_checkpoint, tmp_path, args, message):
    (tmp_path / "empty.txt").write_text("")
    names = {"SRC": tiny_checkpoint(), "OUT": tmp_path / "out", "EMPTY": tmp_path / "empty.txt"}
    done = run(*[names.get(a, a) for a in args])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and done.stderr.strip().count("\n") == 0, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["empty.txt"]


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_says_what_is_wrong_with_the_command_line(monkeypatch, capsys, rank):
    for name, number in {"RANK": rank, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(number))
    monkeypatch.setattr(sys, "argv", ["llmq", "quantize", "--no-such-option"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == (2, 1)[rank] and ("no-such-option" in capsys.readouterr().err) == (rank == 0)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_number_of_a_process_that_is_none_is_one_line(monkeypatch, capsys, name):
    monkeypatch.setenv(name, "abc")
    monkeypatch.setattr(sys, "argv", ["llmq", "list", "schemes"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said == f"error: {name}='abc' in the environment is no number; start llmq with torchrun, or unset it\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_commands_that_several_processes_do_not_share_run_on_the_first(monkeypatch, capsys, rank):
    for name, number in {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(number))
    monkeypatch.setattr(sys, "argv", ["llmq", "inspect", "/no/such/folder"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr()
    assert ended.value.code == (1, 0)[rank]
    assert ("first of 2 processes" in told.out, "is not a folder" in told.err) == (rank == 0, rank == 0)
    assert rank or launched.size() == 1  # what it calls waits for nobody


def test_an_interrupt_leaves_what_was_finished_and_says_where(tiny_checkpoint, tmp_path, text):
    command = [sys.executable, "-m", "llmq", "quantize", tiny_checkpoint(num_hidden_layers=120), tmp_path / "out"]
    options = ["--group-size", "32", "--samples", "64", "--seq-len", "64", "--calib", text]
    process = subprocess.Popen(
        [*map(str, [*command, *options])],
        stderr=subprocess.PIPE,
        text=True,
        # a runner that was started in the background ignores SIGINT, and so would its children
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )
    stage = tmp_path / "out.llmq-partial"
    while not (stage / "journal/now.json").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and stderr.count("\n") == 1, stderr
    assert stderr.startswith(f"interrupted; what was finished stays in {stage} (") and stage.is_dir()
    assert re.search(r"; the same command goes on from block \d+ of 120; --overwrite begins anew\n", stderr)
    assert not (tmp_path / "out").exists()


def test_an_interrupt_that_c_code_turned_into_an_error_is_an_interrupt(monkeypatch, capsys):
    def app(**_):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    with interruptible(monkeypatch, app), pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted; nothing was changed\n"


def test_an_interrupt_that_c_code_lost_ends_the_next_step(monkeypatch):
    with interruptible(monkeypatch, None), terminal.progress() as step:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            step(1, 2, "block 1")


@contextlib.contextmanager
def interruptible(monkeypatch, app):
    """Run `app` for the command line, its handlers in place and no signal seen; all put back at the end."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(n, signal.SIG_DFL) for n in numbers]
    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(signals, "_first", [])
    signals.watch()
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_gguf_quantize_export_inspect(tiny_checkpoint, tmp_path):
    folder, out = tiny_checkpoint(), tmp_path / "out.gguf"
    done = run("quantize", folder, out, "--type", "Q8_0", "--method", "rtn")
    assert done.returncode == 0, done.stderr
    assert "bits per quantized weight" in done.stdout and [p.name for p in tmp_path.iterdir()] == ["out.gguf"]
    done = run("inspect", out, "--linears")
    assert done.returncode == 0, done.stderr
    assert "17 Q8_0" not in done.stdout and "16 Q8_0, 5 F32" in done.stdout and "blk.1.ffn_down.weight" in done.stdout
    ours = tmp_path / "ours"
    assert run("quantize", folder, ours, "--method", "rtn", "--group-size", 32).returncode == 0
    done = run("export", ours, tmp_path / "ours.gguf")
    assert done.returncode == 0 and "14 values exact" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "SRC", "DIR", "--format", "gguf"), "is a folder"),
        (("inspect", "SHORT"), "truncated"),
        (("export", "SRC", "out.gguf"), "is a float checkpoint"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else None,
)
def test_gguf_failures_are_one_line(tiny_checkpoint, tmp_path, arguments, message):
    names = {"SRC": tiny_checkpoint(), "DIR": tmp_path / "folder", "SHORT": tmp_path / "short.gguf"}
    names["DIR"].mkdir()
    names["SHORT"].write_bytes(b"GGUF\x03\0\0\0" + bytes([9]) * 40)
    paths = [names.get(a, tmp_path / a if a.endswith(".gguf") else a) for a in arguments]
    done = run(*paths)
    assert done.returncode == 1 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "short.gguf"]


def unforeseen(monkeypatch, capsys, error, *options):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("llmq.inspection.inspect", fail)
    monkeypatch.setattr(sys, "argv", ["llmq", *options, "inspect", "m\x1b[2J"])
    with pytest.raises((SystemExit, type(error))) as e:
        cli.main()
    return e.value, capsys.readouterr().err


def test_an_exception_that_nobody_foresaw_is_one_line_with_the_way_to_the_rest(monkeypatch, capsys):
    end, said = unforeseen(monkeypatch, capsys, ZeroDivisionError("division\nby zero"))
    assert isinstance(end, SystemExit) and end.code == 1 and said.count("\n") == 1
    assert said.startswith("error: ZeroDivisionError (look.py:") and "division by zero" in said
    assert "llmq --debug inspect" in said and "\x1b" not in said
    end, said = unforeseen(monkeypatch, capsys, MemoryError())
    assert isinstance(end, SystemExit) and "out of memory" in said


def test_debug_shows_where_an_exception_comes_from(monkeypatch, capsys):
    end, _ = unforeseen(monkeypatch, capsys, ZeroDivisionError("by zero"), "--debug")
    assert isinstance(end, ZeroDivisionError)
