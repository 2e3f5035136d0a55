"""The package stands alone: torch, triton and the standard library, no `kernels` package, no device at import."""

import ast
import subprocess
import sys
from pathlib import Path

import llmq_kernels

ROOT = Path(llmq_kernels.__file__).parent


def imported(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)


def test_it_imports_torch_and_triton_only():
    found = {name for file in ROOT.glob("*.py") for name in imported(file)}
    assert {"torch", "triton"} <= found
    assert found - set(sys.stdlib_module_names) == {"torch", "triton", "llmq_kernels"}


def test_no_package_is_called_kernels():
    assert not (ROOT.parent / "__init__.py").exists()


def test_the_import_asks_no_device_and_needs_no_driver():
    code = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
def refuse(*args, **kwargs):
    raise SystemExit("a device was asked")
torch.cuda._lazy_init = torch.cuda.is_available = torch.cuda.device_count = refuse
from triton.runtime import driver
type(driver).active = property(refuse)
import llmq_kernels, llmq_kernels.cases
"""
    done = subprocess.run([sys.executable, "-c", code, str(ROOT.parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
