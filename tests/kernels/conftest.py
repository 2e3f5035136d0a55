"""Shared by the kernel tests: one interpreter process for all of rung 1, since interpreted functions cannot compile."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def interpreted():
    """Run tests/kernels/interpreted.py under TRITON_INTERPRET=1 once; return its measurements by name."""
    import llmq_kernels

    package = Path(llmq_kernels.__file__).parents[1]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(package), env.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, HERE / "interpreted.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
