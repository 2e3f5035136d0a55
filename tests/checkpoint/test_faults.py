"""Killed or out of disk at any step: OUT is the old one or the new one, whole, and the same command ends the matter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import llmq

CHECK = Path(llmq.__file__).parents[1] / "scripts/check_faults.py"
STEPS = 3  # of each case, and as many stretches of it; 20 where the script is run by itself


def test_killed_or_full_at_any_step_out_is_the_old_or_the_new_one():
    done = subprocess.run(
        [sys.executable, CHECK, "--steps", str(STEPS), "--json"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {f["case"]: f["trials"] for f in map(json.loads, done.stdout.splitlines()[1:])}
    assert len(found) == 9 and all(len(trials) == STEPS for trials in found.values())
    killed = [t for case, trials in found.items() if case.endswith("killed") for t in trials]
    assert all(t["status"] == -9 for t in killed) and {t["old"] for t in killed} == {True, False}
    full = [t for case, trials in found.items() if case.endswith("full") for t in trials]
    assert sum(t["status"] == 1 for t in full) > 2 * STEPS
    assert sum("goes on from block 1 of 2" in t["said"] for t in full) > 0
    assert sum("going on from" in t["then"] for t in killed + full) > 0
