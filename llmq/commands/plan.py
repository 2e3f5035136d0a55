"""`llmq plan`: what `llmq quantize` with the same options would write, hold in memory, take, and be read by.

Not here: finding it out (pipeline/estimate.py), the options that it shares with `quantize` (quantize.py).
"""

import inspect
import json
from collections.abc import Iterable
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmq.commands.borrowed import borrowing
from llmq.commands.given import place_of_json
from llmq.commands.quantize import quantize
from llmq.commands.terminal import console, warn
from llmq.show import Rows, span

if TYPE_CHECKING:
    from llmq.pipeline.estimate import Estimate

_OF_A_RUN = ("out", "verify", "report", "log_json")  # which nothing plans


@borrowing({quantize: inspect.signature(quantize).parameters.keys() - {*_OF_A_RUN}})
def plan(
    out: Annotated[Path | None, typer.Argument(help="Folder or OUT.gguf that would be written.")] = None,
    devices: Annotated[int, typer.Option(help="Processes that share the work, each with a device.")] = 1,
    device_like: Annotated[str | None, typer.Option(help="On paper: a100, h100, h200, b200, l40s ...")] = None,
    linears: Annotated[bool, typer.Option("--linears", help="One line for every linear.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write all of it to this file.")] = None,
    **options: Any,
) -> None:
    """Say what `quantize` would write, hold in memory, take, and be read by. No weight is read.

    Example: `llmq plan ./my-llama --bits 4 --group-size 128 --for vllm`
    """
    from llmq.api import plan as run
    from llmq.checkpoint.disk import write_text

    file = place_of_json(json_file, overwrite=bool(options["overwrite"]), replaces=True)
    asked = {name.rstrip("_"): value for name, value in options.items()}
    found = run(out=out, devices=devices, device_like=device_like, **asked)
    for warning in found.warnings:
        warn(warning)
    if out is not None:
        found = replace(found, readers=[r.at(str(out)) for r in found.readers])
    for table in tables(found, linears=linears):
        console.print(table)
    if file:
        write_text(file, json.dumps(found.to_json(), indent=2) + "\n")


def tables(found: "Estimate", *, linears: bool = False) -> Iterable[Rows]:
    """Yield what is shown of an estimate."""
    table = Rows(found.source)
    table.add("method, format", f"{found.method}, {found.format}")
    bits = "" if found.bits_per_weight is None else f", {found.bits_per_weight:.3f} bits per quantized weight"
    table.add("size", f"{found.float_bytes / 1e6:,.1f} MB -> {found.bytes / 1e6:,.1f} MB{bits}")
    for grid, rows in groupby(sorted(found.linears, key=lambda r: r.grid), key=lambda r: r.grid):
        of_grid = list(rows)
        table.add(f"  {grid}", f"{len(of_grid)} matrices, {sum(r.bytes for r in of_grid) / 1e6:,.1f} MB")
    table.add("  float", f"{found.floats['tensors']} tensors, {found.floats['bytes'] / 1e6:,.1f} MB")
    each = ", of a process" if found.devices > 1 else ""
    for where, peak in found.memory.items():
        if peak["bytes"]:
            most = f"{peak['bytes'] / 1e9:.2f} GB at {peak['at']}"
            table.add(f"{where} memory at most{each}", f"{most}: {_largest(peak['terms'])}")
    if found.batches:
        table.add("  batches suspended", f"{found.alive} of {found.batches}")
    table.add("disk meanwhile", f"{sum(found.disk.values()) / 1e9:.2f} GB: {_largest(found.disk)}")
    slowest = sorted(found.seconds.items(), key=lambda s: -s[1])[:4]
    shares = ", ".join(f"{kind} {span(seconds)}" for kind, seconds in slowest)
    table.add("time", f"about {span(found.total)}, of which {shares} ({_how(found)})")
    if found.goes_on:
        table.add("goes on", f"{found.goes_on}; all of the above is of a whole run")
    yield table
    readers = Rows("", "read by", "version", "", "why, how", "known by")
    for r in found.readers:
        readers.add(r.runtime, r.version, {True: "yes", False: "no", None: "?"}[r.accepts], r.reason, r.known)
    yield readers
    if linears:
        shown = Rows("", "linear", "shape", "site", "grid", "bytes")
        shown.columns[0].no_wrap = True  # a name is to be read whole on a narrow terminal too
        for row in found.linears:
            shown.add(row.name, list(row.shape), row.site, row.grid, f"{row.bytes:,}")
        yield shown


def _how(found: "Estimate") -> str:
    """Return where the rates come from, in words."""
    shared = f", {found.devices} processes, arithmetic" if found.devices > 1 else ""
    return f"{found.how}{shared}" if found.how != "probe" else f"probed here{shared}"


def _largest(terms: dict[str, int]) -> str:
    """Return the largest of some bytes, by name."""
    ordered = sorted(terms.items(), key=lambda t: -t[1])
    return ", ".join(f"{name} {size / 1e9:.2f}" for name, size in ordered[:4] if size)
