"""Run a command as a user would and measure it: seconds and peak memory by the system's account.

Seconds by the clock are what a user waits; on a shared machine they depend on what else runs. CPU seconds (user and
system, of the process and its children) hardly do, and are the fair figure there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """What a finished command took, and what it printed where that was held back.

    peak_bytes: the largest resident set of its process; cpu_seconds: user and system, its children included.
    """

    seconds: float
    peak_bytes: int
    cpu_seconds: float
    output: str = ""


def run(*command: object, quiet: bool = True) -> Measured:
    """Run a command to its end. Ends this program with the command's own message where it fails."""
    words = [str(c) for c in command]
    print("$", " ".join(words), file=sys.stderr, flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(words, stdout=output if quiet else None, stderr=output if quiet else None)  # noqa: S603
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        output.seek(0)
        printed = output.read().decode(errors="replace")
        if status:
            sys.exit(f"failed: {' '.join(words)}\n{printed[-2000:]}")
    return Measured(seconds, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime, printed)


def llmq(*arguments: object, quiet: bool = True) -> Measured:
    """Run `llmq ARGUMENTS` in a process of its own."""
    return run(sys.executable, "-m", "llmq", *arguments, quiet=quiet)


def scores(model: Path, baseline: Path, text: Path, windows: int, *options: object) -> dict[str, Any]:
    """Return what `llmq eval` measures of a checkpoint against its float model, both in float32."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scores.json"
        options = ("--text", text, "--windows", windows, "--dtype", "float32", "--json", file, *options)
        llmq("eval", model, "--baseline", baseline, *options)
        (figures,) = json.loads(file.read_text()).values()
        return figures


def decoded(file: Path) -> Path:
    """Write the floats that a GGUF file decodes to beside it; return their folder."""
    llmq("dequantize", file, folder := file.with_suffix(".floats"), "--dtype", "float32", "--overwrite")
    return folder


def write_tokens(file: Path, model: Path, calib: Path, samples: int, seq_len: int) -> Path:
    """Write the rows of token ids that `llmq quantize --calib CALIB --seed 0` takes from a text, for the rivals."""
    from llmq.calibration import tokens
    from llmq.loading import load_tokenizer

    file.write_text(json.dumps(tokens(str(calib), load_tokenizer(str(model)), samples, seq_len, 0).tolist()))
    return file


def decibels(found: Tensor, wanted: Tensor) -> float:
    """Return by how much `wanted` is above what `found` is off, in dB of power."""
    error, signal = (found.double() - wanted.double()).square().sum(), wanted.double().square().sum()
    return float(10 * (signal / error.clamp(min=1e-300)).log10())


def divergence(found: Tensor, wanted: Tensor) -> float:
    """Return the mean KL divergence over tokens of logits `[..., T, V]` from those wanted, in nats."""
    p, q = wanted.double().log_softmax(-1), found.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def machine() -> str:
    """Return one line on what the figures were measured on."""
    import platform

    import torch

    names = [s.partition(":")[2].strip() for s in _cpuinfo() if s.startswith("model name")]
    amx = "with AMX bfloat16" if any("amx_bf16" in s for s in _cpuinfo()) else "without AMX"
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {names[0] if names else platform.machine()} {amx}, torch {torch.__version__}"


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []
