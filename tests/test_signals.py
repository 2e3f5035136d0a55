"""Ctrl-C, SIGTERM and SIGHUP end a run alike: one line, 128 and the signal's number, whatever comes after the first."""

import os
import signal
import subprocess
import sys

import pytest

HOOK = """
import os, signal, sys, time
import llmq.cli as cli, llmq.signals as signals

def stop(name):
    os.kill(os.getpid(), getattr(signal, name))

def app(**_):
    {body}

cli.app = app
sys.argv = ["llmq"]
cli.main()
"""


def run(body, **options):
    code = HOOK.format(body=body.replace("\n", "\n    "))
    # a runner in the background ignores SIGINT, one that ran `main` itself all three; and so would its children
    default = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    options.setdefault(
        "preexec_fn", lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGTERM, signal.SIGHUP)]
    )
    return subprocess.run([sys.executable, "-c", default + code], capture_output=True, text=True, timeout=60, **options)


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_each_ends_in_one_line(name, status):
    done = run(f"stop({name!r}); time.sleep(5)")
    assert (done.returncode, done.stderr) == (status, "interrupted; nothing was changed\n")


@pytest.mark.parametrize("second", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    "place",
    [
        "try:\n    stop('SIGINT'); time.sleep(5)\nfinally:\n    stop('{}'); time.sleep(0.05)",  # as it cleans up
        "cli.notes = lambda e: [stop('{}')] and ['said']\nstop('SIGINT'); time.sleep(5)",  # while the line is made
        "stop('SIGINT'); stop('{}'); time.sleep(5)",
    ],
)  # fmt: skip
def test_a_second_one_at_once_changes_nothing(place, second):
    done = run(place.format(second))
    assert done.returncode == 130 and done.stderr.startswith("interrupted; ") and done.stderr.count("\n") == 1, done


def test_a_later_one_ends_a_run_whose_end_does_not_come():
    late = "signals._GESTURE = 0.01; time.sleep(0.05); stop('SIGTERM'); time.sleep(9)"
    done = run(f"try:\n    stop('SIGINT'); time.sleep(5)\nfinally:\n    {late}")
    assert done.returncode == 143 and done.stderr.startswith("interrupted again") and done.stderr.count("\n") == 1, done


def test_one_that_is_ignored_stays_ignored():
    done = run(
        "stop('SIGHUP'); print('went on')",
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "went on\n", ""), done


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_where_finished_work_was_left_is_in_the_line():
    done = run("e = KeyboardInterrupt(); e.add_note('kept in out'); signals._first.append((15, 0)); raise e")
    assert (done.returncode, done.stderr) == (143, "interrupted; kept in out\n")
    body = (
        "try:\n    try:\n        stop('SIGINT'); time.sleep(5)\n"
        "    except KeyboardInterrupt as e:\n        e.add_note('kept in out'); raise\n"
        "except KeyboardInterrupt:\n    raise SystemExit(130)"
    )
    done = run(body)  # as click turns it
    assert (done.returncode, done.stderr) == (130, "interrupted; kept in out\n")
