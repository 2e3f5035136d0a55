"""Which configuration is fastest: measured once per device, shape and bucket of M, and kept on disk.

    choose(op, device, key, candidates, run)  ->  Config
    milliseconds(run, repeats)                ->  list of floats

The answers of a device lie in one JSON file, `<cache>/<device name>-<triton version>.json`, replaced atomically, so
that several processes may write: the last one wins, and each loses at most a measurement. Nothing is measured where
there is one candidate, in Triton's interpreter, while a CUDA graph is captured, or after `measuring(False)`: then the
first candidate is taken and not recorded. No device is asked anything before the first choice on it.

Not here: the candidates, which belong to their kernels.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.runtime.errors import OutOfResources

from llmq_kernels.errors import KernelError
from llmq_kernels.launch import OPTIONS

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Config:
    """A tile shape and a launch.

    BM, BN: rows and columns of a tile; split_k: parts that K is cut into; registers: the most a thread may use, 0 for
    ptxas's choice (told a bound, it does not spill to reach an occupancy that nobody asked for).
    """

    BM: int
    BN: int
    split_k: int
    warps: int
    stages: int
    registers: int = 0

    def options(self) -> dict[str, Any]:
        """Return the launch options for Triton."""
        found = {"num_warps": self.warps, "num_stages": self.stages, **OPTIONS}
        if self.registers and torch.version.hip is None:
            found["maxnreg"] = self.registers
        return found


TURNS, REPEATS = 4, 5
"""How often all candidates are timed one after the other, and how often each in a turn."""
LIBRARY = Config(0, 0, 1, 0, 0)
"""The candidate that is no kernel of ours: the library multiplies what ours have decoded (dense.py) or quantized."""


@dataclass
class _State:
    folder: Path = Path.home() / ".cache" / "llmq_kernels"
    measuring: bool = True


_state = _State()
_known: dict[Path, dict[str, Config]] = {}
"""What the files say, by file and name."""
_chosen: dict[tuple[str, torch.device, tuple[Any, ...]], Config] = {}
"""What this process has been told, by what it asked."""
settled: dict[tuple[Any, ...], Callable[..., Any]] = {}
"""By all that bears on it, the call of a kernel whose configuration has been chosen, with nothing left to look up."""
_MOST_SETTLED = 4096


def bucket(M: int) -> int:
    """Return the bucket of M tokens: the next power of two, at most 2048."""
    return min(2048, 1 << (M - 1).bit_length())


def cache_folder(folder: Path | str | None = None) -> Path:
    """Return where choices are kept, after moving it to `folder` if one is given."""
    if folder is not None:
        _state.folder = Path(folder)
        _known.clear()
        forget()
    return _state.folder


def measuring(on: bool) -> None:
    """Say whether `choose` may time kernels; off, every choice that is not known is the first candidate."""
    _state.measuring = on
    forget()


def forget() -> None:
    """Forget what this process has been told; files stay."""
    _chosen.clear()
    settled.clear()


def settle(
    key: tuple[Any, ...], op: str, device: torch.device, asked: tuple[Any, ...], call: Callable[..., Any]
) -> None:
    """Keep a call, where the choice that it was made by is kept: not that of a capture."""
    if (op, device, asked) in _chosen:
        if len(settled) >= _MOST_SETTLED:  # of prompts of many lengths
            settled.clear()
        settled[key] = call


def choose(
    op: str,
    device: torch.device,
    key: tuple[Any, ...],
    candidates: Callable[[], Sequence[Config]],
    run: Callable[[Config], Any],
) -> Config:
    """Return the fastest of `candidates()` for `key` on `device`, timing `run(config)` where it is not known.

    Raises KernelError where the device has the resources for none of them.
    """
    asked = op, device, key
    if asked in _chosen:  # as in every step of decode but the first: what follows takes longer than the kernel
        return _chosen[asked]
    options = candidates()
    if len(options) > 1 and device.type != "cpu":
        name = " ".join(map(str, (op, *key)))
        found = _measured(device, name, options, run)
        if found is None and torch.cuda.is_current_stream_capturing():
            return options[0]
    else:
        found = None
    _chosen[asked] = found or options[0]
    return _chosen[asked]


def _measured(
    device: torch.device, name: str, options: Sequence[Config], run: Callable[[Config], Any]
) -> Config | None:
    """Return the fastest, known or timed now; None where nothing may be timed."""
    file = _state.folder / f"{_slug(device)}-triton{triton.__version__}.json"
    known = _known.setdefault(file, {})
    if name not in known:  # another process may have measured it since
        known.update(_read(file))
    if known.get(name) in options:  # and not what another version of the kernel chose
        return known[name]
    if not _state.measuring or torch.cuda.is_current_stream_capturing():
        return None
    times = _times(run, [c for c in options if _fits(run, c)])
    if not times:
        raise KernelError(f"{_slug(device)} has too little shared memory for any configuration of {name}")
    known[name] = min(times, key=lambda c: times[c])
    _write(file, known)
    return known[name]


def _slug(device: torch.device) -> str:
    return "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name(device))


def _fits(run: Callable[[Config], Any], config: Config) -> bool:
    """Say whether the device has the resources for a configuration; it is compiled now, if it was not."""
    try:
        run(config)
    except OutOfResources:
        return False
    return True


def _times(run: Callable[[Config], Any], options: Sequence[Config]) -> dict[Config, float]:
    """Return the least of `TURNS` x `REPEATS` times of each configuration, in milliseconds.

    The least, as all that disturbs makes it longer: by the median of ten, an H200 chose some that took three times it.
    In turns, as a device whose clock still rises, or falls, would favour those that are timed when it is high.
    """
    found = dict.fromkeys(options, math.inf)
    for _ in range(TURNS):
        for config in options:
            found[config] = min(found[config], *milliseconds(functools.partial(run, config), REPEATS))
    return found


def milliseconds(run: Callable[[], Any], repeats: int) -> list[float]:
    """Return the times of `run` on the current device, weights in memory and not in the L2 cache.

    A kernel of a decode step takes less time than its launch. What is written to empty the cache also keeps the device
    busy until the launch has been queued, so that it is the kernel that is timed, and not the processor.
    """
    size = max(torch.cuda.get_device_properties().L2_cache_size, 32 << 20)
    other = torch.empty(2 * size, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        for _ in range(8):
            other.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [b.elapsed_time(e) for b, e in events]


def _read(file: Path) -> dict[str, Config]:
    """Return the choices in a file; none where it is missing, or (with a log line) not readable as choices."""
    if not file.exists():
        return {}
    try:
        return {k: Config(**v) for k, v in json.loads(file.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as e:
        log.warning("%s holds no autotune choices (%s); it will be replaced", file, e)
        return {}


def _write(file: Path, choices: dict[str, Config]) -> None:
    """Merge `choices` into a file and replace it atomically."""
    merged = _read(file) | choices
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
    with os.fdopen(handle, "w") as out:
        json.dump({k: asdict(v) for k, v in sorted(merged.items())}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    Path(name).replace(file)
