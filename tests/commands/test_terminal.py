"""Readers of what is printed that go away."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from llmq import cli
from llmq.commands.terminal import outliving_readers
from llmq.errors import LlmqError


@pytest.mark.parametrize("ends", [os.pipe, pty.openpty])
def test_what_nobody_reads_goes_nowhere(monkeypatch, ends):
    reading, writing = ends()
    with os.fdopen(writing, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        os.close(reading)
        with outliving_readers():
            print("heard by nobody", flush=True)
            print("this neither")
        assert os.fstat(unread.fileno()).st_rdev == Path(os.devnull).stat().st_rdev


def test_a_full_disk_is_no_reader_that_went_away(monkeypatch):
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", os.fdopen(full.fileno(), "w", closefd=False))
        with pytest.raises(LlmqError, match="cannot be written: No space left on device"), outliving_readers():
            print("lost")


def test_the_command_line_says_so_in_one_line(monkeypatch, capsys):
    with Path("/dev/full").open("wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", os.fdopen(full.fileno(), "w", closefd=False))
        monkeypatch.setattr(sys, "argv", ["llmq", "--version"])
        with pytest.raises(SystemExit) as e:
            cli.main()
    said = capsys.readouterr().err
    assert e.value.code == 1 and said.count("\n") == 1 and "make room where it goes" in said


def test_a_stream_that_was_closed_leads_nowhere(tmp_path):
    """Nor does the next file that is opened get its number, and what libraries print there."""
    seen = tmp_path / "1"
    program = f"""
import atexit, os, sys
from llmq import cli
atexit.register(lambda: os.symlink(os.readlink("/proc/self/fd/1"), {str(seen)!r}))
sys.argv = ["llmq", "--version"]
cli.main()
"""
    done = subprocess.run(["/bin/sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, program])
    assert done.returncode == 0 and seen.readlink() == Path(os.devnull)
